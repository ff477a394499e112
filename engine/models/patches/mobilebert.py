"""MobileBERT: a token's embedding is made of its own and its two neighbours', which must be of its sequence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.mobilebert.modeling_mobilebert import MobileBertEmbeddings

from carpool.engine.models.attention import under_way
from carpool.engine.models.patches.layer import PackedLayer, become


class PackedEmbeddings(PackedLayer, MobileBertEmbeddings):  # type: ignore[misc]
    def forward(self, input_ids: Tensor, token_type_ids: Tensor, position_ids: Tensor, **_: Any) -> Tensor:
        """int64 [1, T] each → [1, T, H]: the stock forward, a run of equal lengths at a time."""
        runs = zip(
            *(under_way().split(x[0, :, None]) for x in (input_ids, token_type_ids, position_ids)),
            strict=True,
        )
        rows = [super(PackedEmbeddings, self).forward(*(x[..., 0] for x in run)) for run in runs]
        return torch.cat([row.flatten(0, 1) for row in rows])[None]


def apply(backbone: nn.Module) -> None:
    become(backbone, (PackedEmbeddings,))
