"""Embedding pools: pooled or single rows, through the dense heads, cut to width and normalised."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from functools import partial
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from carpool.engine.packing import PackedBatch, places_of, spans
from carpool.engine.params import EmbedDType
from carpool.engine.poolers.methods import FUSED, READ, pool
from carpool.engine.poolers.pooler import Pooled, Reads, Row, Rows, is_whole, split, together, token_rows
from carpool.engine.sequence import Sequence
from carpool.engine.side_files import PoolingMode
from carpool.engine.staging import upload
from carpool.kernels import ops


class EmbedHead:
    """Dense heads, then the Matryoshka cut, L2 normalisation and numbers that each request asks for."""

    def __init__(self, dense: Seq[nn.Module], normalize: bool, dimensions: int | None) -> None:
        """`normalize` and `dimensions` are the defaults of requests that do not say."""
        self._dense = nn.Sequential(*dense)
        self._normalize = normalize
        self._dimensions = dimensions

    @property
    def is_bare(self) -> bool:
        """Whether there is nothing before the cut."""
        return not len(self._dense)

    def dense(self, rows: Tensor) -> Tensor:
        """float32 [R, H] → [R, D]."""
        through: Tensor = self._dense(rows)
        return through

    def widths(self, sequences: Seq[Sequence], native: int) -> NDArray[np.int32]:
        """int32 [B]: components that the vectors of each keep."""
        return np.array([seq.params.dimensions or self._dimensions or native for seq in sequences], np.int32)

    def normalize(self, sequences: Seq[Sequence]) -> NDArray[np.bool_]:
        """bool [B]: whose vectors get unit length."""
        wishes = [seq.params.use_activation for seq in sequences]
        return np.array([self._normalize if wish is None else wish for wish in wishes], np.bool_)

    def dtypes(self, sequences: Seq[Sequence]) -> list[EmbedDType]:
        """The numbers that the vectors of each come in: what was asked for, of those of unit length.

        Others may hold more than 16 bits do, and whoever asked is to be told so; so they come in float32.
        """
        units = self.normalize(sequences)
        return [
            seq.params.embed_dtype if unit else "float32" for seq, unit in zip(sequences, units, strict=True)
        ]

    def finish(
        self, rows: Tensor, picked: NDArray[np.int64] | None, sequences: Seq[Sequence], counts: Seq[int]
    ) -> Pooled:
        """`picked` of the rows [R, D], or all, cut, normalised and cast; counts[i] of them belong to sequence i.

        Each result is [count, width].
        """
        widths, normalize = self.widths(sequences, rows.shape[1]), self.normalize(sequences)
        dtypes = self.dtypes(sequences)
        parts = []
        for dtype in dict.fromkeys(dtypes):
            mine = [i for i, own in enumerate(dtypes) if own == dtype]
            own_counts = [counts[i] for i in mine]
            chosen = picked
            if len(mine) < len(dtypes):
                among = places_of(tuple(accumulate(counts, initial=0)), mine)
                chosen = among if picked is None else picked[among]
            index = [] if chosen is None else [chosen.astype(np.int32)]
            *places, width, unit = upload(
                rows.device,
                *index,
                np.repeat(widths[mine], own_counts),
                np.repeat(normalize[mine], own_counts),
            )
            finished, _ = ops.gather_rows(rows, places[0] if places else None, width, unit, dtype)
            parts.append((mine, Pooled((finished,), partial(_cut, own_counts, widths[mine]))))
        return together(parts)


def _cut(counts: Seq[int], widths: NDArray[np.int32], arrays: Seq[Row]) -> Rows:
    """One array [R, D] → a view [count, width] for each sequence."""
    return [text[:, :width] for text, width in zip(split(arrays[0], counts), widths, strict=True)]


class EmbedPool:
    """One vector a text. Several `modes` are concatenated."""

    def __init__(self, modes: Seq[PoolingMode], head: EmbedHead) -> None:
        self._modes = modes
        self._head = head

    @property
    def reads(self) -> Reads:
        return READ.get(self._modes[0], "all") if len(self._modes) == 1 else "all"

    def __call__(
        self, hidden: Tensor, packed: PackedBatch, places: Seq[int], sequences: Seq[Sequence]
    ) -> Pooled:
        cu_seqlens, longest = packed.cu_seqlens, packed.max_seqlen
        if any(seq.skip for seq in sequences):
            hidden, cu_seqlens, longest = _without_prompts(hidden, packed, places, sequences)
            places = range(len(sequences))
        whole = is_whole(places, len(cu_seqlens) - 1)
        if whole and len(self._modes) == 1 and self._modes[0] in FUSED and self._head.is_bare:
            dtypes = set(self._head.dtypes(sequences))
            if len(dtypes) == 1:
                return self._at_once(hidden, cu_seqlens, longest, sequences, dtypes.pop())
        pooled = [pool(mode, hidden, cu_seqlens, longest) for mode in self._modes]
        vectors = pooled[0] if len(pooled) == 1 else torch.cat(pooled, dim=1)
        if not whole:
            (index,) = upload(hidden.device, np.array(places, np.int64))
            vectors = vectors[index]
        finished = self._head.finish(self._head.dense(vectors), None, sequences, [1] * len(sequences))
        return finished.then(lambda texts: [vector for (vector,) in texts])

    def _at_once(
        self,
        hidden: Tensor,
        cu_seqlens: Tensor,
        longest: int,
        sequences: Seq[Sequence],
        dtype: EmbedDType,
    ) -> Pooled:
        """All sequences of a batch, in its order, with nothing between pooling and finish: one operation."""
        modes = np.full(len(sequences), FUSED[self._modes[0]], np.int8)
        widths, normalize = self._head.widths(sequences, hidden.shape[1]), self._head.normalize(sequences)
        mode, width, unit = upload(hidden.device, modes, widths, normalize)
        vectors, _ = ops.pool_rows(hidden, cu_seqlens, mode, width, unit, dtype, longest)
        return Pooled(
            (vectors,),
            lambda arrays: [row[:width] for row, width in zip(arrays[0], widths.tolist(), strict=True)],
        )


def _without_prompts(
    hidden: Tensor, packed: PackedBatch, places: Seq[int], sequences: Seq[Sequence]
) -> tuple[Tensor, Tensor, int]:
    """The rows of these sequences alone, less those of their prompts; of a text that is nothing else, its last.

    Also their cumulative lengths, int32, and the most tokens of one.
    """
    bounds = packed.bounds
    kept = [
        (min(bounds[place] + seq.skip, bounds[place + 1] - 1), bounds[place + 1])
        for place, seq in zip(places, sequences, strict=True)
    ]
    lengths = [end - start for start, end in kept]
    ends = np.array([*accumulate(lengths, initial=0)], np.int32)
    rows, cu_seqlens = upload(hidden.device, spans(kept), ends)
    return hidden[rows], cu_seqlens, max(lengths)


class TokenEmbedPool:
    """One vector a token."""

    def __init__(self, head: EmbedHead) -> None:
        self._head = head

    def __call__(
        self, hidden: Tensor, packed: PackedBatch, places: Seq[int], sequences: Seq[Sequence]
    ) -> Pooled:
        if not self._head.is_bare:
            rows, lengths = token_rows(hidden, packed, places)
            return self._head.finish(self._head.dense(rows.float()), None, sequences, lengths)
        lengths = packed.lengths
        picked = None if is_whole(places, len(lengths)) else places_of(packed.bounds, places)
        return self._head.finish(hidden, picked, sequences, [lengths[i] for i in places])
