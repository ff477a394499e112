"""Late chunking: a text is run whole, and the vectors of its tokens are averaged in runs of a fixed length."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

Range = tuple[int, int]  # from the first to behind the last


@dataclass(frozen=True, slots=True)
class LateChunk:
    """Which tokens of the prompt it is made of, and which characters of the text; of special tokens alone, none."""

    token_range: Range
    char_range: Range | None


@dataclass(frozen=True, slots=True)
class LateChunkingMetadata:
    """What the rows of a result are: one a chunk. The last may be shorter."""

    chunk_size: int
    input_tokens: int
    chunks: list[LateChunk]

    @classmethod
    def of(cls, offsets: Seq[Range], size: int) -> LateChunkingMetadata:
        """`offsets`: the characters that each token stands for, none of a special one."""
        chunks = []
        for first in range(0, len(offsets), size):
            told = [(start, end) for start, end in offsets[first : first + size] if start < end]
            characters = (min(start for start, _ in told), max(end for _, end in told)) if told else None
            chunks.append(LateChunk((first, min(first + size, len(offsets))), characters))
        return cls(size, len(offsets), chunks)


def chunk_means(rows: Tensor, size: int, *, unit: bool) -> Tensor:
    """float32 [tokens, D] → [chunks, D], of unit length if asked for."""
    means = torch.stack([part.mean(dim=0) for part in torch.split(rows, size)])
    return torch.nn.functional.normalize(means, dim=1) if unit else means
