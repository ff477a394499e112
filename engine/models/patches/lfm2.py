"""LFM2: between attention layers, short causal convolutions, which must not reach into the sequence before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.lfm2.modeling_lfm2 import Lfm2ShortConv
from transformers.models.lfm2_moe.modeling_lfm2_moe import Lfm2MoeShortConv

from carpool.engine.models.attention import under_way
from carpool.engine.models.patches.layer import PackedLayer, become


class PackedShortConv(PackedLayer, Lfm2ShortConv):  # type: ignore[misc]
    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        """[1, T, H] → [1, T, H]. The kernel is a few tokens long and has a weight a channel: a sum of shifted rows."""
        before, after, x = self.in_proj(under_way().hide(hidden_states[0])).chunk(3, dim=-1)
        x = before * x
        kernel = self.conv.weight[:, 0].t()  # [K, H], the last row for the token itself
        place = under_way().positions[:, None]
        mixed = x * kernel[-1]
        for back in range(1, len(kernel)):
            mixed = mixed + torch.where(place >= back, x.roll(back, 0), 0) * kernel[-1 - back]
        if self.conv.bias is not None:
            mixed = mixed + self.conv.bias
        out: Tensor = self.out_proj(after * mixed)
        return out[None]


class PackedMoeShortConv(PackedLayer, Lfm2MoeShortConv):  # type: ignore[misc]
    forward = PackedShortConv.forward


def apply(backbone: nn.Module) -> None:
    become(backbone, (PackedShortConv, PackedMoeShortConv))
