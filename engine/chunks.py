"""Chunks: of prompts that are run in parts, the hidden states that go to the pooler as one."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import NamedTuple

import torch
from torch import Tensor

from carpool.engine.batch import Batch
from carpool.engine.packing import PackedBatch, pack_ids
from carpool.engine.sequence import Sequence


class Finished(NamedTuple):
    """Those of a batch of which nothing is left to run, `numbers` being their places in it.

    hidden [T, H], `packed` and `places` are as a Pooler takes them, and as if they had been run whole. Where the last
    token is all that is asked for, and others ran what is before it, a prompt is what was run of it.
    """

    hidden: Tensor
    packed: PackedBatch
    sequences: Seq[Sequence]
    places: Seq[int]
    numbers: Seq[int]


def finished(
    batch: Batch, distinct: Batch, packed: PackedBatch, hidden: Tensor, places: Seq[int]
) -> Finished:
    """hidden [T, H] of `packed`, which is `distinct`, whose sequences at `places` do the work of the `batch`.

    Of a prompt that goes on, its hidden states are kept with it if they are asked for, until the last of them are here.
    """
    every = range(len(batch.sequences))
    numbers = [i for i in every if batch.counts[i] == batch.sequences[i].remaining]
    if len(numbers) == len(every) and not any(map(_carried, distinct.sequences)):
        return Finished(hidden, packed, batch.sequences, places, numbers)
    whole: dict[int, Tensor] = {}  # by place
    parts = torch.split(hidden, packed.lengths)
    for place, (seq, count, part) in enumerate(zip(distinct.sequences, distinct.counts, parts, strict=True)):
        before = _carried(seq)
        if count == seq.remaining:
            whole[place] = torch.cat((*before, part)) if before else part
            seq.carried = None
        elif not last_only(seq):
            # A copy: it may wait for long, and would hold on to all that was in its row.
            seq.carried = (*before, part.clone())
    sequences = [batch.sequences[i] for i in numbers]
    if not whole:
        return Finished(hidden[:0], packed, sequences, (), numbers)
    ids = [distinct.sequences[place].token_ids[-len(rows) :] for place, rows in whole.items()]
    order = {place: i for i, place in enumerate(whole)}
    own_places = [order[places[i]] for i in numbers]
    rows = torch.cat(list(whole.values()))
    return Finished(rows, pack_ids(ids, hidden.device), sequences, own_places, numbers)


def last_only(seq: Sequence) -> bool:
    """Whether it is asked for the result of its last token alone, as those are that take from others what they ran."""
    return seq.prompt is not None and seq.prompt.reuse


def _carried(seq: Sequence) -> tuple[Tensor, ...]:
    """The hidden states of its tokens that were run in batches before, [n, H] each; () if they are not asked for.

    If it had to start again from nothing, what it has from the first time does not count.
    """
    if not seq.computed or last_only(seq):
        return ()
    carried: tuple[Tensor, ...] = seq.carried
    assert sum(map(len, carried)) == seq.computed, "a part of a prompt is missing"
    return carried
