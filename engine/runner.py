"""ModelRunner: one replica of the model. Built once, then `run(batch)` in the thread that owns it."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import torch
from numpy.typing import NDArray

from carpool.engine.batch import Batch
from carpool.engine.errors import InferenceFailed
from carpool.engine.models.backbone import Backbone
from carpool.engine.packing import pack
from carpool.engine.poolers.pooler import Pooler

Row = NDArray[np.float32] | InferenceFailed


class ModelRunner:
    """Packs, runs the backbone, pools. Not thread-safe: each worker has a replica of its own."""

    def __init__(self, backbone: Backbone, pooler: Pooler, device: torch.device) -> None:
        self._backbone = backbone
        self._pooler = pooler
        self._device = device

    def replica(self) -> ModelRunner:
        """For another thread: shares the weights and nothing else that changes."""
        return ModelRunner(self._backbone.replica(), self._pooler, self._device)

    def bind(self) -> None:
        """To be called once, first, in the thread that will call `run`.

        One thread a worker: on a CPU, workers side by side beat threads inside one operation.
        """
        if self._device.type == "cpu":
            torch.set_num_threads(1)

    def run(self, batch: Batch) -> list[Row]:
        """One result a sequence, in the batch's order; a failure takes down as few sequences as can be.

        If a batch raises, its halves are tried apart: what one input breaks (or memory that only the whole
        lacks) costs its neighbours time, not their answers.
        """
        try:
            return self._forward(batch)
        except Exception as error:
            if len(batch.sequences) == 1:
                failure = InferenceFailed(f"{type(error).__name__}: {error}")
                failure.__cause__ = error
                return [failure]
            return [row for half in batch.halves() for row in self.run(half)]

    @torch.inference_mode()
    def _forward(self, batch: Batch) -> list[Row]:
        distinct, places = batch.distinct()
        packed = pack(distinct, self._device)
        hidden = self._backbone.forward(packed)
        rows = self._pooler(hidden, packed.cu_seqlens, batch.sequences, places)
        return _finite(rows)


def _finite(rows: Seq[NDArray[np.float32]]) -> list[Row]:
    """A number that is not finite never leaves: that row fails, its neighbours do not."""
    return [
        row if np.isfinite(row).all() else InferenceFailed("the model produced a number that is not finite")
        for row in rows
    ]
