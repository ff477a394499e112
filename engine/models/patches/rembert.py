"""RemBERT: plain attention that it computes itself."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.models.rembert.modeling_rembert import RemBertSelfAttention

from carpool.engine.models.attention import packed_attention
from carpool.engine.models.patches.layer import PackedLayer, become


class PackedSelfAttention(PackedLayer, RemBertSelfAttention):  # type: ignore[misc]
    @property
    def is_causal(self) -> bool:
        return bool(self.is_decoder)

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        """hidden_states [1, T, H] → ([1, T, H], None)"""
        shape = (*hidden_states.shape[:2], -1, self.attention_head_size)
        query, key, value = (
            project(hidden_states).view(shape).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        out, _weights = packed_attention(self, query, key, value, None)
        return out.flatten(2), None


def apply(backbone: nn.Module) -> None:
    become(backbone, (PackedSelfAttention,))
