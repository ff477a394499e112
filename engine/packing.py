"""Packing: a Batch becomes one packed row of tensors. No padding anywhere."""

from dataclasses import dataclass
from itertools import chain, groupby

import torch
from torch import Tensor

from carpool.engine.batch import Batch


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """`B` sequences end to end: `T` tokens.

    input_ids and position_ids int64 [T]; cu_seqlens int32 [B+1], the cumulative lengths from 0; `runs` are the
    (length, count) of neighbouring sequences of equal length.
    """

    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    runs: tuple[tuple[int, int], ...]

    @property
    def max_seqlen(self) -> int:
        return max(length for length, _ in self.runs)

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)


def pack(batch: Batch, device: torch.device) -> PackedBatch:
    """Lay the batch's sequences end to end, in its order."""
    return pack_ids([seq.token_ids for seq in batch.sequences], device)


def pack_ids(token_ids: list[list[int]], device: torch.device) -> PackedBatch:
    """Lay lists of ids end to end, in the order given."""
    lengths = [len(ids) for ids in token_ids]
    ids = torch.tensor(list(chain.from_iterable(token_ids)), dtype=torch.int64)
    cu_seqlens = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    torch.cumsum(torch.tensor(lengths), 0, out=cu_seqlens[1:])
    starts = torch.repeat_interleave(cu_seqlens[:-1].long(), torch.tensor(lengths))
    return PackedBatch(
        input_ids=ids.to(device),
        position_ids=(torch.arange(len(ids)) - starts).to(device),
        cu_seqlens=cu_seqlens.to(device),
        runs=tuple((length, len(list(same))) for length, same in groupby(lengths)),
    )
