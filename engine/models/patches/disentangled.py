"""Disentangled attention: what the patches of both DeBERTas have in common.

What a query has to do with a position depends on weights alone: the projected tables are made once, when the patch is
applied, and all replicas share them. The distances' rows in them are found once a batch, in the encoder, and travel to
the layers as the stock argument `relative_pos`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from carpool.engine.models.attention import attend, note, row_of, under_way
from carpool.engine.models.patches.layer import PackedLayer
from carpool.kernels.attention import DISENTANGLED
from carpool.kernels.ops import disentangled_attention

_MOST = 512  # tokens: what most of these models take


@dataclass(frozen=True, slots=True)
class Positions:
    """A layer's projected tables, float32 [P, N, D]; None for a kind of attention that the model has not."""

    keys: Tensor | None
    queries: Tensor | None

    def __deepcopy__(self, memo: dict[int, Any]) -> Positions:
        return self  # never written to: replicas share it as they share weights


class Rows(NamedTuple):
    """int64 [2M - 1], by how far a key stands behind its query: the row of the tables."""

    there: Tensor  # where the tables are
    host: list[int]


class PackedEncoder(PackedLayer):
    """Over either encoder."""

    relative_attention: bool
    _rows: Rows | None = None  # for the longest text so far

    def get_attention_mask(self, attention_mask: Tensor) -> Tensor:
        """As it comes: the stock layer makes [1, 1, T, T] of it."""
        return attention_mask

    def get_rel_embedding(self) -> None:
        """Nothing: the layers have their tables."""

    def get_rel_pos(self, *_: Any, **__: Any) -> Rows | None:
        """The rows for this batch's distances."""
        if not self.relative_attention:
            return None
        row = under_way()
        rows, longest = self._rows, row.longest
        if rows is None or len(rows.host) < 2 * longest - 1 or rows.there.device != row.cu_seqlens.device:
            rows = self._rows = self._rows_for(longest, row.cu_seqlens.device)
        middle = len(rows.host) // 2
        near = slice(middle - longest + 1, middle + longest)
        return Rows(rows.there[near], rows.host[near])

    @torch.inference_mode(False)  # replicas copy them outside
    def _rows_for(self, longest: int, device: torch.device) -> Rows:
        """For more than is asked: they are carried to the device, which takes waiting for it, seldom or never again."""
        most = max(_MOST, 1 << (longest - 1).bit_length())
        span = self.span()
        back = torch.arange(most - 1, -most, -1)  # the tables count the other way round
        host = (self.bucket(back) + span).clamp(0, 2 * span - 1)
        return Rows(host.to(device), host.tolist())

    def span(self) -> int:
        """Half the rows of the tables."""
        raise NotImplementedError

    def bucket(self, distances: Tensor) -> Tensor:
        """int64, of the same shape: nearest distances each their own, farther ones perhaps several together."""
        return distances


class PackedSelfAttention(PackedLayer):
    """Over either attention layer."""

    is_causal = False
    positions: Positions | None
    pos_att_type: list[str]

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[T, H] → query, key and value [T, N, D]."""
        raise NotImplementedError

    def forward(
        self, hidden_states: Tensor, *_: Any, relative_pos: Rows | None = None, **__: Any
    ) -> tuple[Tensor, None]:
        """hidden_states [1, T, H] → ([1, T, H], None)"""
        assert isinstance(self, nn.Module)
        row = row_of(self)
        query, key, value = self.project(hidden_states[0])
        scale = 1 / math.sqrt(query.shape[-1] * (1 + self.kinds()))
        if relative_pos is None or self.positions is None:
            out = attend(query, key, value, row, scale=scale)
        else:
            note(DISENTANGLED)
            out = disentangled_attention(
                query,
                key,
                value,
                row.runs,
                scale=scale,
                rows_of=relative_pos.there,
                on_host=relative_pos.host,
                position_keys=self.positions.keys,
                position_queries=self.positions.queries,
            )
        return out.flatten(1)[None], None

    def kinds(self) -> int:
        """How many products of a content with a position are meant to be in a score."""
        return ("c2p" in self.pos_att_type) + ("p2c" in self.pos_att_type)


@torch.no_grad()
def table(project: nn.Module, embeddings: Tensor, heads: int) -> Tensor:
    """embeddings [P, H] projected, in heads: float32 [P, N, D]."""
    rows: Tensor = project(embeddings)
    return rows.view(len(rows), heads, -1).float()
