"""ModelRunner: one replica of the model. Built once, then driven in the thread that owns it."""

from __future__ import annotations

import copy
import logging
import traceback
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace

import numpy as np
import torch

from carpool.engine.batch import Batch
from carpool.engine.budget import is_shortage
from carpool.engine.cache.storage import Storage
from carpool.engine.chunks import finished, last_only
from carpool.engine.errors import InferenceFailed, Undone
from carpool.engine.models.backbone import Backbone
from carpool.engine.models.graphs import graphed
from carpool.engine.models.lora import Fitted, adapted_layers
from carpool.engine.models.moving import moving_to
from carpool.engine.packing import PackedBatch, pack
from carpool.engine.params import Task
from carpool.engine.poolers.pooler import Pool, Pooler
from carpool.engine.poolers.pooler import Row as Result
from carpool.engine.staging import carrier, upload
from carpool.kernels import crew

Row = Result | InferenceFailed | None  # None: the rest of its prompt is still to be run
Landing = Callable[[], list[Row]]  # waits for a batch that was launched

_log = logging.getLogger(__name__)


class ModelRunner:
    """Packs, runs the backbone, pools. Not thread-safe: each worker has a replica of its own."""

    def __init__(
        self, backbone: Backbone, pooler: Pooler, device: torch.device, storage: Storage | None = None
    ) -> None:
        """`storage` is for keys and values of prompts that are run in parts or share what they begin with."""
        self._backbone = backbone
        self._pooler = pooler
        self._device = device
        self._storage = storage
        self._carrier = carrier(device)

    def replica(self, device: torch.device | None = None) -> ModelRunner:
        """For another thread: shares the weights and the storage, and nothing else that changes. For another device:
        shares nothing, and has no storage.
        """
        if device is None or device == self._device:
            return ModelRunner(self._backbone.replica(), self._pooler, self._device, self._storage)
        with moving_to(device):
            backbone, pooler = copy.deepcopy((self._backbone, self._pooler))
        return ModelRunner(backbone, pooler, device)

    def record(self, vocab_size: int, max_model_len: int) -> str | None:
        """Have small batches played back as CUDA graphs from now on; a notice if this model cannot be recorded."""
        self._backbone, notice = graphed(self._backbone, vocab_size=vocab_size, max_model_len=max_model_len)
        return notice

    @property
    def depth(self) -> int:
        """Batches that may be under way at once."""
        return self._carrier.depth

    @property
    def device(self) -> torch.device:
        return self._device

    def hang(self, slot: int, layers: Mapping[str, Fitted], pools: Mapping[Task, Pool]) -> None:
        """Have batches ride on an adapter from now on: what it adds by layer, and the pools of a head of its own. May
        be called while a batch is under way.
        """
        if pools and self._device.type != "cpu":
            with moving_to(self._device):
                pools = copy.deepcopy(pools)
        self._pooler.add(slot, pools)
        places = adapted_layers(self._backbone.module)
        for name, fitted in layers.items():
            places[name].add(slot, fitted)

    def drop(self, slot: int) -> None:
        """Nothing may ride on it any more."""
        for place in adapted_layers(self._backbone.module).values():
            place.drop(slot)
        self._pooler.drop(slot)

    def bind(self) -> None:
        """To be called once, first, in the thread that will launch batches."""
        self._carrier.bind()

    def run(self, batch: Batch) -> list[Row]:
        """One result a sequence, in the batch's order, None for those of which more is to be run.

        A failure takes down as few sequences as can be.
        """
        return self.launch(batch)()

    def launch(self, batch: Batch) -> Landing:
        """Begin a batch; calling what comes back, once and after those launched before, waits for its results.

        If a batch raises, its halves are tried apart: what one input breaks (or memory that only the whole
        lacks) costs its neighbours time, not their answers. That is left to the landing, when the batches before
        have let go of their memory. Halves of a batch that is kept may need each other: then all are Undone.
        """
        try:
            with crew.leading():
                land = self._begin(batch)
        except Exception as error:
            failed = _without_frames(error)
            return lambda: self._apart(batch, failed)

        def landing() -> list[Row]:
            try:
                return land()
            except Exception as error:
                return self._apart(batch, _without_frames(error))

        return landing

    def attempt(self, batch: Batch) -> None:
        """Run a batch as it is served, as many at once as may be under way, and raise what it raises."""
        for land in [self._begin(batch) for _ in range(self.depth)]:
            land()

    @torch.inference_mode()
    def _begin(self, batch: Batch) -> Landing:
        distinct, places = batch.distinct()
        packed = self._narrowed(batch, pack(distinct, self._device, self._storage), places)
        hidden = self._backbone.forward(packed)
        done = finished(batch, distinct, packed, hidden, places)
        pooled = self._pooler(done.hidden, done.packed, done.sequences, done.places)
        arrival = self._carrier.send_for(pooled.tensors)

        def landing() -> list[Row]:
            rows: list[Row] = [None] * len(batch.sequences)
            for number, row in zip(done.numbers, _finite(pooled.unpack(arrival())), strict=True):
                rows[number] = row
            return rows

        return landing

    def _narrowed(self, batch: Batch, packed: PackedBatch, places: Seq[int]) -> PackedBatch:
        """The row, told which of its tokens the pooler will read, where those are not all.

        Not of prompts whose parts are put together before they are pooled, nor beside adapters, which go by whole rows.
        """
        if packed.adapters or any(seq.table is not None and not last_only(seq) for seq in batch.sequences):
            return packed
        found = self._pooler.wanted(packed.bounds, batch.sequences, places)
        if found is None:
            return packed
        (wanted,) = upload(self._device, found)
        return replace(packed, wanted=wanted)

    def _apart(self, batch: Batch, error: Exception) -> list[Row]:
        """After a failure: each half alone, or all undone. Raises if the device is lost: no next try can succeed."""
        self._carrier.recover()
        alone = len(batch.sequences) == 1
        if is_shortage(error):
            _log.warning(
                "A batch of %d tokens does not fit in memory%s. To keep such batches out, lower %s.",
                batch.num_tokens,
                ""
                if alone
                else " and is run " + ("again, prompt by prompt" if batch.is_paged else "in halves"),
                "--max-model-len" if alone else "--max-num-batched-tokens",
            )
        if alone:
            failure = InferenceFailed(_reason(error, batch.num_tokens))
            failure.__cause__ = error
            return [failure]
        if batch.is_paged:
            return [Undone(_reason(error, batch.num_tokens)) for _ in batch.sequences]
        return [row for half in batch.halves() for row in self.run(half)]


def _reason(error: Exception, tokens: int) -> str:
    if is_shortage(error):
        return f"{tokens} tokens do not fit in memory, even alone: start the server with a lower --max-model-len."
    return f"{type(error).__name__}: {error}"


def _without_frames(error: Exception) -> Exception:
    """The error with the local variables of its traceback let go: tensors that the next try needs the room of."""
    link: BaseException | None = error
    while link is not None:
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__
    return error


def _finite(rows: Seq[Result]) -> list[Row]:
    """A number that is not finite never leaves: that row fails, its neighbours do not."""
    return [
        row if np.isfinite(row).all() else InferenceFailed("the model produced a number that is not finite")
        for row in rows
    ]
