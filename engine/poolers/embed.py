"""Embedding pools: pooled or single rows, through the dense heads, cut to width and normalised."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from itertools import accumulate, chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from carpool.engine.poolers.methods import METHODS
from carpool.engine.poolers.pooler import Rows, split, token_rows
from carpool.engine.sequence import Sequence
from carpool.engine.side_files import PoolingMode
from carpool.kernels.reference import cut_and_normalize


class EmbedHead:
    """Dense heads, then the Matryoshka cut and L2 normalisation that each request asks for."""

    def __init__(self, dense: Seq[nn.Module], normalize: bool, dimensions: int | None) -> None:
        """`normalize` and `dimensions` are the defaults of requests that do not say."""
        self._dense = nn.Sequential(*dense)
        self._normalize = normalize
        self._dimensions = dimensions

    def __call__(self, rows: Tensor, sequences: Seq[Sequence], repeats: Seq[int]) -> NDArray[np.float32]:
        """float32 rows [R, H] → [R, D]; `repeats[i]` rows belong to sequence i. Cut components are 0."""
        vectors = self._dense(rows)
        device = vectors.device
        repeat = torch.tensor(repeats, device=device)
        widths = torch.tensor([self.width(seq, vectors.shape[1]) for seq in sequences], device=device)
        wishes = [seq.params.use_activation for seq in sequences]
        normalize = torch.tensor(
            [self._normalize if wish is None else wish for wish in wishes], device=device
        )
        finished = cut_and_normalize(
            vectors, widths.repeat_interleave(repeat), normalize.repeat_interleave(repeat)
        )
        host: NDArray[np.float32] = finished.cpu().numpy()
        return host

    def width(self, seq: Sequence, native: int) -> int:
        """Components that this sequence's vectors keep."""
        return seq.params.dimensions or self._dimensions or native


class EmbedPool:
    """One vector a text. Several `modes` are concatenated."""

    def __init__(self, modes: Seq[PoolingMode], head: EmbedHead) -> None:
        self._methods = [METHODS[mode] for mode in modes]
        self._head = head

    def __call__(
        self, hidden: Tensor, cu_seqlens: Tensor, places: Seq[int], sequences: Seq[Sequence]
    ) -> Rows:
        if any(seq.skip for seq in sequences):
            hidden, cu_seqlens = _without_prompts(hidden, cu_seqlens, places, sequences)
            places = range(len(sequences))
        pooled = [method(hidden, cu_seqlens) for method in self._methods]
        vectors = pooled[0] if len(pooled) == 1 else torch.cat(pooled, dim=1)
        if list(places) != list(range(len(vectors))):
            vectors = vectors[list(places)]
        finished = self._head(vectors, sequences, [1] * len(places))
        return [row[: self._head.width(seq, len(row))] for row, seq in zip(finished, sequences, strict=True)]


def _without_prompts(
    hidden: Tensor, cu_seqlens: Tensor, places: Seq[int], sequences: Seq[Sequence]
) -> tuple[Tensor, Tensor]:
    """The rows of these sequences alone, less those of their prompts; of a text that is nothing else, its last."""
    bounds = cu_seqlens.tolist()
    kept = [
        range(min(bounds[place] + seq.skip, bounds[place + 1] - 1), bounds[place + 1])
        for place, seq in zip(places, sequences, strict=True)
    ]
    ends = [0, *accumulate(map(len, kept))]
    return hidden[list(chain.from_iterable(kept))], torch.tensor(
        ends, dtype=torch.int32, device=hidden.device
    )


class TokenEmbedPool:
    """One vector a token."""

    def __init__(self, head: EmbedHead) -> None:
        self._head = head

    def __call__(
        self, hidden: Tensor, cu_seqlens: Tensor, places: Seq[int], sequences: Seq[Sequence]
    ) -> Rows:
        rows, lengths = token_rows(cu_seqlens, places)
        finished = self._head(hidden[rows].float(), sequences, lengths)
        texts = zip(split(finished, lengths), sequences, strict=True)
        return [text[:, : self._head.width(seq, text.shape[1])] for text, seq in texts]
