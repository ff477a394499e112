"""RoFormer: rotary positions counted over the whole row, and attention that it computes itself."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.models.roformer.modeling_roformer import (
    RoFormerSelfAttention,
    RoFormerSinusoidalPositionalEmbedding,
)

from carpool.engine.models.attention import packed_attention, under_way
from carpool.engine.models.patches.layer import PackedLayer, become


class PackedPositions(PackedLayer, RoFormerSinusoidalPositionalEmbedding):  # type: ignore[misc]
    def forward(self, *_: Any, **__: Any) -> Tensor:
        """[T, D]: sines and cosines of each token's place in its sequence."""
        return nn.functional.embedding(under_way().positions, self.weight)


class PackedSelfAttention(PackedLayer, RoFormerSelfAttention):  # type: ignore[misc]
    @property
    def is_causal(self) -> bool:
        return bool(self.is_decoder)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        sinusoidal_pos: Tensor | None = None,
        *_: Any,
        **__: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states [1, T, H], sinusoidal_pos [1, 1, T, D] → ([1, T, H], None)"""
        shape = (*hidden_states.shape[:2], -1, self.attention_head_size)
        query, key, value = (
            project(hidden_states).view(shape).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        query, key, *rotated = self.apply_rotary_position_embeddings(
            sinusoidal_pos, query, key, value if self.rotary_value else None
        )
        out, _weights = packed_attention(self, query, key, rotated[0] if rotated else value, None)
        return out.flatten(2), None


def apply(backbone: nn.Module) -> None:
    become(backbone, (PackedPositions, PackedSelfAttention))
