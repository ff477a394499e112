"""DeBERTa v1: disentangled attention with a row of the tables for every distance."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.models.deberta.modeling_deberta import DebertaEncoder, DisentangledSelfAttention

from carpool.engine.models.patches import disentangled
from carpool.engine.models.patches.disentangled import Positions, table
from carpool.engine.models.patches.layer import become


class PackedEncoder(disentangled.PackedEncoder, DebertaEncoder):  # type: ignore[misc]
    def span(self) -> int:
        return int(self.max_relative_positions)

    def make_tables(self) -> None:
        """Give every layer its table of projected positions."""
        for layer in self.layer:
            attention = layer.attention.self
            attention.positions = None
            if self.relative_attention:
                rows = DebertaEncoder.get_rel_embedding(self)
                kinds, heads = attention.pos_att_type, attention.num_attention_heads
                attention.positions = Positions(
                    keys=table(attention.pos_proj, rows, heads) if "c2p" in kinds else None,
                    queries=table(attention.pos_q_proj, rows, heads) if "p2c" in kinds else None,
                )


class PackedSelfAttention(disentangled.PackedSelfAttention, DisentangledSelfAttention):  # type: ignore[misc]
    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One layer makes all three, a head's side by side; the key has no bias."""
        shape = (self.num_attention_heads, -1)
        query, key, value = self.in_proj(hidden).view(len(hidden), *shape).chunk(3, dim=-1)
        return query + self.q_bias.view(shape), key, value + self.v_bias.view(shape)

    def kinds(self) -> int:
        return len(self.pos_att_type)


def apply(backbone: nn.Module) -> None:
    if any(getattr(module, "talking_head", False) for module in backbone.modules()):
        return  # no published model mixes heads so
    become(backbone, (PackedEncoder, PackedSelfAttention))
    for module in backbone.modules():
        if isinstance(module, PackedEncoder):
            module.make_tables()
