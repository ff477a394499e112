"""T5, mT5 and UMT5 encoders: attention goes through the registry, with a learned bias of the whole row's size."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.models.mt5.modeling_mt5 import MT5Attention
from transformers.models.t5.modeling_t5 import T5Attention
from transformers.models.umt5.modeling_umt5 import UMT5Attention

from carpool.engine.models.attention import under_way
from carpool.engine.models.patches.layer import PackedLayer, become


class PackedT5Attention(PackedLayer, T5Attention):  # type: ignore[misc]
    def compute_bias(self, *_: Any, device: Any = None, **__: Any) -> Tensor:
        """[N, 2M - 1] by distance, where the stock layer has [1, N, T, T]."""
        buckets = self._relative_position_bucket(
            under_way().distances(device),
            bidirectional=not self.is_decoder,
            num_buckets=self.relative_attention_num_buckets,
            max_distance=self.relative_attention_max_distance,
        )
        bias: Tensor = self.relative_attention_bias(buckets)
        return bias.t()


class PackedMT5Attention(PackedLayer, MT5Attention):  # type: ignore[misc]
    compute_bias = PackedT5Attention.compute_bias


class PackedUMT5Attention(PackedLayer, UMT5Attention):  # type: ignore[misc]
    def compute_bias(self, *_: Any, device: Any = None, **__: Any) -> Tensor:
        """[N, 2M - 1] by distance; each layer has its own."""
        bias: Tensor = self.relative_attention_bias(
            self._relative_position_bucket(under_way().distances(device))
        )
        return bias.t()


def apply(backbone: nn.Module) -> None:
    become(backbone, (PackedT5Attention, PackedMT5Attention, PackedUMT5Attention))
