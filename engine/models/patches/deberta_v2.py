"""DeBERTa v2 and v3: disentangled attention, distances in buckets; v2's xlarge has a convolution behind layer one."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.models.deberta_v2.modeling_deberta_v2 import (
    ConvLayer,
    DebertaV2Encoder,
    DisentangledSelfAttention,
    make_log_bucket_position,
)

from carpool.engine.models.attention import under_way
from carpool.engine.models.patches import disentangled
from carpool.engine.models.patches.disentangled import Positions, table
from carpool.engine.models.patches.layer import PackedLayer, become


class PackedEncoder(disentangled.PackedEncoder, DebertaV2Encoder):  # type: ignore[misc]
    def span(self) -> int:
        return int(self.position_buckets if self.position_buckets > 0 else self.max_relative_positions)

    def bucket(self, distances: Tensor) -> Tensor:
        if self.position_buckets <= 0:
            return distances
        bucketed: Tensor = make_log_bucket_position(
            distances, self.position_buckets, self.max_relative_positions
        )
        return bucketed.long()

    def make_tables(self) -> None:
        """Give every layer its table of projected positions."""
        for layer in self.layer:
            attention = layer.attention.self
            attention.positions = None
            if self.relative_attention:
                rows = DebertaV2Encoder.get_rel_embedding(self)[: 2 * self.span()]
                kinds, heads = attention.pos_att_type, attention.num_attention_heads
                key, query = (
                    ("key_proj", "query_proj")
                    if attention.share_att_key
                    else ("pos_key_proj", "pos_query_proj")
                )
                attention.positions = Positions(
                    keys=table(getattr(attention, key), rows, heads) if "c2p" in kinds else None,
                    queries=table(getattr(attention, query), rows, heads) if "p2c" in kinds else None,
                )


class PackedSelfAttention(disentangled.PackedSelfAttention, DisentangledSelfAttention):  # type: ignore[misc]
    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shape = (len(hidden), self.num_attention_heads, -1)
        query, key, value = (
            project(hidden).view(shape) for project in (self.query_proj, self.key_proj, self.value_proj)
        )
        return query, key, value


class PackedConvLayer(PackedLayer, ConvLayer):  # type: ignore[misc]
    def forward(self, hidden_states: Tensor, residual_states: Tensor, input_mask: Tensor) -> Tensor:
        """[1, T, H] each → [1, T, H]: the stock forward, a run of equal lengths at a time."""
        row = under_way()
        runs = zip(
            *(row.split(x) for x in (hidden_states[0], residual_states[0], input_mask[0, :, None])),
            strict=True,
        )
        mixed = [super(PackedConvLayer, self).forward(h, r, mask[..., 0]) for h, r, mask in runs]
        return torch.cat([run.flatten(0, 1) for run in mixed])[None]


def apply(backbone: nn.Module) -> None:
    become(backbone, (PackedEncoder, PackedSelfAttention, PackedConvLayer))
    for module in backbone.modules():
        if isinstance(module, PackedEncoder):
            module.make_tables()
