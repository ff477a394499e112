"""CLIP and SigLIP texts: their embeddings take a packed row for one text and refuse it as too long."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.models.clip.modeling_clip import CLIPTextEmbeddings
from transformers.models.siglip.modeling_siglip import SiglipTextEmbeddings

from carpool.engine.models.patches.layer import PackedLayer, become


class PackedClipEmbeddings(PackedLayer, CLIPTextEmbeddings):  # type: ignore[misc]
    def forward(self, input_ids: Tensor, position_ids: Tensor, **_: Any) -> Tensor:
        """int64 [1, T] each → [1, T, H]."""
        rows: Tensor = self.token_embedding(input_ids) + self.position_embedding(position_ids)
        return rows


class PackedSiglipEmbeddings(PackedLayer, SiglipTextEmbeddings):  # type: ignore[misc]
    def forward(self, input_ids: Tensor, position_ids: Tensor, **_: Any) -> Tensor:
        """int64 [1, T] each → [1, T, H]."""
        rows: Tensor = self.token_embedding(input_ids) + self.position_embedding(position_ids)
        return rows


def apply(backbone: nn.Module) -> None:
    become(backbone, (PackedClipEmbeddings, PackedSiglipEmbeddings))
