"""Classification pools: a pooled row, or every row, through the head to logits and on to probabilities."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor, nn

from carpool.engine.packing import PackedBatch, places_of
from carpool.engine.poolers.methods import READ, pool
from carpool.engine.poolers.pooler import Pooled, Reads, is_whole, split, token_rows
from carpool.engine.sequence import Sequence
from carpool.engine.side_files import PoolingMode
from carpool.engine.staging import upload
from carpool.kernels import ops
from carpool.kernels.reference import IDENTITY, SIGMOID, SOFTMAX

Activate = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class ClassifyHead:
    """rows [R, H] → logits [R, labels] by the `head`; then (logit - mean) / sigma.

    `activate` makes probabilities of logits, for those who want them; `by_default` is for those who do not say.
    """

    head: nn.Module
    activate: Activate
    by_default: bool = True
    logit_mean: float = 0.0
    logit_sigma: float = 1.0

    def logits(self, rows: Tensor) -> Tensor:
        """float32 [R, H] → [R, labels], as the head has them."""
        logits: Tensor = self.head(rows)
        return logits

    def calibrated(self, logits: Tensor) -> Tensor:
        return (logits - self.logit_mean) / self.logit_sigma

    def finish(
        self, logits: Tensor, sequences: Seq[Sequence], counts: Seq[int], *, calibrated: bool = False
    ) -> Tensor:
        """[R, labels] calibrated, if they are not yet, and activated for those who want it: as many, float32.

        counts[i] of the rows belong to sequence i.
        """
        wishes = [seq.params.use_activation for seq in sequences]
        each = np.array([self.by_default if wish is None else wish for wish in wishes], np.bool_)
        wanted = np.repeat(each, counts)
        kind = _kind(self.activate)
        if kind is not None:
            (kinds,) = upload(logits.device, np.where(wanted, kind, IDENTITY).astype(np.int8))
            mean, sigma = (0.0, 1.0) if calibrated else (self.logit_mean, self.logit_sigma)
            return ops.activate_rows(logits, kinds, mean, sigma)
        plain = logits if calibrated else self.calibrated(logits)
        if each.all():
            return self.activate(plain)
        (chosen,) = upload(logits.device, wanted)
        return torch.where(chosen[:, None], self.activate(plain), plain)


class ClassifyPool:
    """One result a text: [labels]. The head is behind the pooling `mode` or, if `late`, before it."""

    def __init__(self, mode: PoolingMode, head: ClassifyHead, late: bool = False) -> None:
        self._mode = mode
        self._head = head
        self._late = late

    @property
    def reads(self) -> Reads:
        return READ.get(self._mode, "all")

    def __call__(
        self, hidden: Tensor, packed: PackedBatch, places: Seq[int], sequences: Seq[Sequence]
    ) -> Pooled:
        rows = self._head.calibrated(self._head.logits(hidden.float())) if self._late else hidden
        pooled = pool(self._mode, rows, packed.cu_seqlens, packed.max_seqlen)
        if not is_whole(places, len(pooled)):
            (index,) = upload(hidden.device, np.array(places, np.int64))
            pooled = pooled[index]
        logits = pooled if self._late else self._head.logits(pooled)
        finished = self._head.finish(logits, sequences, [1] * len(sequences), calibrated=self._late)
        return Pooled((finished,), lambda arrays: list(arrays[0]))


class TokenClassifyPool:
    """One result a token: [tokens, labels].

    A process reward model keeps the rows of `step_tag_id` only, and of the labels those in `returned_token_ids`;
    the activation is over what is kept.
    """

    def __init__(
        self, head: ClassifyHead, step_tag_id: int | None = None, returned_token_ids: Seq[int] | None = None
    ) -> None:
        self._head = head
        self._step_tag_id = step_tag_id
        self._columns = list(returned_token_ids) if returned_token_ids else None

    def __call__(
        self, hidden: Tensor, packed: PackedBatch, places: Seq[int], sequences: Seq[Sequence]
    ) -> Pooled:
        if self._step_tag_id is None:
            rows, counts = token_rows(hidden, packed, places)
        else:
            rows, counts = _steps(hidden, packed, places, sequences, self._step_tag_id)
        logits = self._head.logits(rows.float())
        if self._columns is not None:
            (columns,) = upload(hidden.device, np.array(self._columns, np.int64))
            logits = logits.index_select(1, columns)
        finished = self._head.finish(logits, sequences, counts)
        return Pooled((finished,), lambda arrays: split(arrays[0], counts))


def _steps(
    hidden: Tensor, packed: PackedBatch, places: Seq[int], sequences: Seq[Sequence], tag: int
) -> tuple[Tensor, list[int]]:
    """The rows of the tag's tokens, and how many each sequence has. The host has the ids: no device is asked."""
    token_ids = np.fromiter(chain.from_iterable(seq.token_ids for seq in sequences), np.int64)
    (steps,) = upload(hidden.device, places_of(packed.bounds, places)[token_ids == tag])
    return hidden[steps], [seq.token_ids.count(tag) for seq in sequences]


def activation_named(name: str) -> Activate:
    """Identity, sigmoid and softmax by name; softmax is over the labels."""
    named: dict[str, Activate] = {"identity": _identity, "sigmoid": torch.sigmoid, "softmax": _softmax}
    return named[name]


def _identity(logits: Tensor) -> Tensor:
    return logits


def _softmax(logits: Tensor) -> Tensor:
    return torch.softmax(logits, dim=-1)


def _kind(activate: Activate) -> int | None:
    """Which of the kinds of `kernels.reference.activate_rows` it is."""
    known: dict[object, int] = {
        _identity: IDENTITY, nn.Identity: IDENTITY, torch.sigmoid: SIGMOID, nn.Sigmoid: SIGMOID, _softmax: SOFTMAX
    }  # fmt: skip
    return known.get(type(activate) if isinstance(activate, nn.Module) else activate)
