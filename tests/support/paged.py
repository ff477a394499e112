"""Prompts through a scheduler with a cache and runners that share one storage, without an engine around them."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import chain, count

import torch

from carpool.engine.batch import Batch
from carpool.engine.cache.blocks import BlockPool, Prompt
from carpool.engine.cache.hashing import block_hashes
from carpool.engine.cache.paging import Paging
from carpool.engine.cache.storage import Storage
from carpool.engine.errors import InferenceFailed, Undone
from carpool.engine.models.backbone import Backbone
from carpool.engine.models.paged import number_layers
from carpool.engine.params import PoolingParams, Task
from carpool.engine.runner import ModelRunner, Row
from carpool.engine.scheduler import Scheduler
from carpool.engine.sequence import Sequence

SIZE, CHUNK = 4, 16  # tokens of a block, and at most of a part
_requests = count()


def asked(
    ids: list[int],
    task: Task = "embed",
    params: PoolingParams | None = None,
    *,
    last_only: bool,
    skip: int = 0,
) -> Sequence:
    """One prompt, that may be run in parts; `last_only` as the pool of its task has it."""
    prompt = Prompt(len(ids), block_hashes(ids, SIZE) if last_only else (), last_only)
    return Sequence(next(_requests), 0, ids, params or PoolingParams(), task, prompt=prompt, skip=skip)


def storage_of(backbone: Backbone, num_blocks: int) -> Storage:
    """Full of numbers that are none: whoever reads what nobody wrote shows it."""
    storage = Storage.of(number_layers(backbone), num_blocks, SIZE, torch.device("cpu"))
    for pages in chain.from_iterable(storage.layers):
        pages.fill_(torch.nan)
    return storage


@dataclass
class Cabin:
    """`rows` are what each sequence was answered; `batches`, what was dealt; `undone`, how many of them were."""

    runners: Seq[ModelRunner]
    pool: BlockPool
    tokens: int = 64
    rows: dict[Sequence, Row] = field(default_factory=dict)
    batches: list[Batch] = field(default_factory=list)
    undone: int = 0

    @classmethod
    def of(cls, plain: ModelRunner, num_blocks: int, replicas: int = 1, tokens: int = 64) -> Cabin:
        """Runners of what `plain` runs, over a new storage that they share."""
        storage = storage_of(plain._backbone, num_blocks)
        first = ModelRunner(plain._backbone, plain._pooler, plain._device, storage)
        runners = [first, *(first.replica() for _ in range(replicas - 1))]
        return cls(runners, BlockPool(num_blocks, SIZE), tokens)

    def run(self, sequences: Seq[Sequence]) -> list[Row]:
        """What each is answered; an idle runner gets the next batch at once."""
        scheduler = Scheduler(self.tokens, 8, paging=Paging(self.pool, CHUNK), min_share_tokens=8)
        for seq in sequences:
            scheduler.add(seq)
        flying: dict[Future[list[Row]], tuple[Batch, ModelRunner]] = {}
        idle = list(self.runners)
        with ThreadPoolExecutor(len(self.runners)) as threads:
            while True:
                while idle and (batch := scheduler.schedule(0.0, len(idle))):
                    self.batches.append(batch)
                    runner = idle.pop()
                    flying[threads.submit(runner.run, batch)] = batch, runner
                if not flying:
                    assert not scheduler.waiting_sequences
                    assert self.pool.num_used == 0
                    return [self.rows[seq] for seq in sequences]
                for landed in wait(flying, return_when=FIRST_COMPLETED).done:
                    batch, runner = flying.pop(landed)
                    idle.append(runner)
                    self._land(scheduler, batch, landed.result())

    def _land(self, scheduler: Scheduler, batch: Batch, rows: list[Row]) -> None:
        if any(isinstance(row, Undone) for row in rows):
            assert all(isinstance(row, Undone) for row in rows)
            self.undone += 1
            scheduler.undone(batch)
            return
        for seq, tokens, row in zip(batch.sequences, batch.counts, rows, strict=True):
            failed = isinstance(row, InferenceFailed)
            assert failed or (row is None) == (tokens < seq.remaining)
            if row is not None:
                self.rows[seq] = row
        scheduler.landed(
            batch,
            {seq for seq, row in zip(batch.sequences, rows, strict=True) if isinstance(row, InferenceFailed)},
        )
