"""Packing: a Batch becomes one packed row of tensors. No padding anywhere."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import accumulate, chain, groupby

import torch
from torch import Tensor

from carpool.engine.batch import Batch


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """`B` sequences end to end: `T` tokens.

    input_ids and position_ids int64 [T]; cu_seqlens int32 [B+1], the cumulative lengths from 0; `runs` are the
    (length, count) of neighbouring sequences of equal length; `adapters` are the sequences' own, () for all 0.
    `unseen` are from where on each sequence's tokens are not looked at, () for nowhere.
    """

    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    runs: tuple[tuple[int, int], ...]
    token_type_ids: Tensor | None = None  # None is type 0 throughout
    adapters: tuple[int, ...] = ()
    unseen: tuple[int | None, ...] = ()

    @property
    def max_seqlen(self) -> int:
        return max(length for length, _ in self.runs)

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        return [length for length, count in self.runs for _ in range(count)]


def pack(batch: Batch, device: torch.device) -> PackedBatch:
    """Lay the batch's sequences end to end, in its order."""
    starts = [seq.type_start for seq in batch.sequences]
    adapters = [seq.adapter for seq in batch.sequences]
    unseen = [seq.unseen for seq in batch.sequences]
    return pack_ids([seq.token_ids for seq in batch.sequences], device, starts, adapters, unseen)


def pack_ids(
    token_ids: list[list[int]],
    device: torch.device,
    type_starts: list[int | None] | None = None,
    adapters: list[int] | None = None,
    unseen: Seq[int | None] = (),
) -> PackedBatch:
    """Lay lists of ids end to end, in the order given. From `type_starts[i]` on, tokens of i are of type 1."""
    lengths = [len(ids) for ids in token_ids]
    ids = torch.tensor(list(chain.from_iterable(token_ids)), dtype=torch.int64)
    cu_seqlens = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    torch.cumsum(torch.tensor(lengths), 0, out=cu_seqlens[1:])
    starts = torch.repeat_interleave(cu_seqlens[:-1].long(), torch.tensor(lengths))
    types = None
    if type_starts is not None and any(start is not None for start in type_starts):
        split = [
            length if start is None else start for start, length in zip(type_starts, lengths, strict=True)
        ]
        types = torch.arange(len(ids)) - starts >= torch.repeat_interleave(
            torch.tensor(split), torch.tensor(lengths)
        )
        types = types.long().to(device)
    return PackedBatch(
        input_ids=ids.to(device),
        position_ids=(torch.arange(len(ids)) - starts).to(device),
        cu_seqlens=cu_seqlens.to(device),
        runs=tuple((length, len(list(same))) for length, same in groupby(lengths)),
        token_type_ids=types,
        adapters=tuple(adapters) if adapters and any(adapters) else (),
        unseen=tuple(unseen) if any(place is not None for place in unseen) else (),
    )


def select(batch: PackedBatch, chosen: Seq[int]) -> tuple[PackedBatch, Tensor]:
    """These sequences of a batch as one of their own, in the order given; int64 [T]: where their tokens came from."""
    starts, lengths = batch.cu_seqlens.tolist(), batch.lengths
    device = batch.input_ids.device
    places = torch.cat([torch.arange(starts[i], starts[i + 1], device=device) for i in chosen])
    own = [lengths[i] for i in chosen]
    types = batch.token_type_ids
    return (
        PackedBatch(
            input_ids=batch.input_ids[places],
            position_ids=batch.position_ids[places],
            cu_seqlens=torch.tensor([0, *accumulate(own)], dtype=torch.int32, device=device),
            runs=tuple((length, len(list(same))) for length, same in groupby(own)),
            token_type_ids=None if types is None else types[places],
            adapters=tuple(batch.adapters[i] for i in chosen) if batch.adapters else (),
            unseen=tuple(batch.unseen[i] for i in chosen) if batch.unseen else (),
        ),
        places,
    )
