"""MPNet: one learned bias by distance, shared by all layers, added in an attention of its own."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.mpnet.modeling_mpnet import MPNetEncoder, MPNetLayer, MPNetSelfAttention

from carpool.engine.models.attention import packed_attention, under_way
from carpool.engine.models.patches.layer import PackedLayer, become


class PackedEncoder(PackedLayer, MPNetEncoder):  # type: ignore[misc]
    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> BaseModelOutput:
        """hidden_states [1, T, H]. Its layers may have become one, and give a tensor each."""
        bias = self.compute_position_bias(hidden_states)
        for layer in self.layer:
            hidden_states = layer(hidden_states, position_bias=bias)
        return BaseModelOutput(last_hidden_state=hidden_states)

    def compute_position_bias(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """[N, 2M - 1] by distance, where the stock layer has [1, N, T, T]."""
        buckets = self.relative_position_bucket(under_way().distances(x.device))
        bias: Tensor = self.relative_attention_bias(buckets)
        return bias.t()


class Packed(PackedLayer, MPNetLayer):  # type: ignore[misc]
    def forward(self, hidden_states: Tensor, position_bias: Tensor) -> Tensor:
        """hidden_states [1, T, H] → [1, T, H], where the stock layer has a tuple: so surgery knows it for BERT's."""
        (attended,) = self.attention(hidden_states, position_bias=position_bias)
        done: Tensor = self.output(self.intermediate(attended), attended)
        return done


class PackedSelfAttention(PackedLayer, MPNetSelfAttention):  # type: ignore[misc]
    is_causal = False

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor]:
        """hidden_states [1, T, H] → ([1, T, H],)"""
        shape = (*hidden_states.shape[:2], -1, self.attention_head_size)
        query, key, value = (
            project(hidden_states).view(shape).transpose(1, 2) for project in (self.q, self.k, self.v)
        )
        out, _weights = packed_attention(self, query, key, value, None, position_bias=position_bias)
        return (self.o(out.flatten(2)),)


def apply(backbone: nn.Module) -> None:
    become(backbone, (PackedEncoder, Packed, PackedSelfAttention))
