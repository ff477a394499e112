"""Measure: how far a member's answers are from its reference's, alone and in company."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import tiny
from carpool.engine.batch import Batch
from carpool.engine.build import Parts, build
from carpool.engine.config import EngineConfig
from carpool.engine.models import attention
from carpool.engine.params import PoolingParams, Task, TokenizationParams
from carpool.engine.sequence import Sequence
from zoo.member import Member

TOLERANCE = 2e-5  # of numbers around 1: what orders of summation in float32 differ by


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the parity table. Differences are the largest of any component, over max(1, largest component)."""

    name: str
    family: str
    tasks: tuple[Task, ...]
    packing: str
    attention: str
    pooling: str
    alone: float
    company: float
    note: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """What one sequence asks."""

    task: Task
    ids: list[int]
    type_start: int | None = None
    adapter: str | None = None
    params: PoolingParams = field(default_factory=PoolingParams)

    @property
    def types(self) -> list[int] | None:
        if self.type_start is None:
            return None
        return [int(i >= self.type_start) for i in range(len(self.ids))]


def _assert_telling(truths: Seq[Tensor]) -> None:
    """Answers that are the same for all, or zero nearly everywhere, would hide what is wrong."""
    numbers = torch.cat([truth.flatten().float() for truth in truths])
    assert float(numbers.std()) > 1e-4, "a reference gives all prompts one number"
    assert float((numbers != 0).float().mean()) > 0.05, "a reference says next to nothing"


def measure(member: Member, folder: Path, **options: Any) -> Line:
    """Write the member's checkpoint into `folder`, serve it in float32 and compare. `options` are EngineConfig's."""
    reference = member.make(folder)
    config = {"model": str(folder), "dtype": "float32", "cpu_workers": 1, **member.options, **options}
    parts = build(EngineConfig(**config))
    assert set(member.tasks) <= parts.model.tasks, f"{member.name} offers {sorted(parts.model.tasks)} only"
    prompts = list(_prompts(member, parts))
    truths = [reference(p.task, p.ids, p.types, p.adapter) for p in prompts]
    for task in member.tasks:
        _assert_telling([truth for truth, prompt in zip(truths, prompts, strict=True) if prompt.task == task])
    with _layers() as seen:
        together = run(parts, prompts)
    alone = [row for prompt in prompts for row in run(parts, [prompt])]
    return Line(
        name=member.name,
        family=member.family,
        tasks=tuple(sorted(parts.model.tasks)),
        packing=parts.model.packing,
        attention=", ".join(sorted(seen)) or "its own",
        pooling=parts.model.pooling,
        alone=_largest(alone, truths),
        company=_largest(together, truths),
        note=member.note,
    )


def run(parts: Parts, prompts: Seq[Prompt]) -> list[Tensor]:
    """One batch of all; results in the order given."""
    sequences = [
        Sequence(
            request_id=i,
            index=i,
            token_ids=p.ids,
            params=p.params,
            task=p.task,
            type_start=p.type_start,
            adapter=parts.model.adapters[p.adapter] if p.adapter else 0,
        )
        for i, p in enumerate(prompts)
    ]
    batch = Batch.of(sequences)
    rows: dict[int, Tensor] = {}
    for sequence, row in zip(batch.sequences, parts.runners[0].run(batch), strict=True):
        if isinstance(row, Exception):
            raise row
        rows[sequence.index] = torch.from_numpy(row)
    return [rows[i] for i in range(len(prompts))]


def difference(ours: Tensor, truth: Tensor) -> float:
    """The largest of any component, relative to the largest component or 1; infinite if shapes differ."""
    if ours.shape != truth.shape:
        return float("inf")
    if not truth.numel():
        return 0.0
    return float((ours - truth).abs().max() / truth.abs().max().clamp_min(1.0))


def _largest(ours: Iterable[Tensor], truths: Iterable[Tensor]) -> float:
    return max(difference(own, truth) for own, truth in zip(ours, truths, strict=True))


def _prompts(member: Member, parts: Parts) -> Iterator[Prompt]:
    """Every text for every task; with adapters, each text of a task with another one, and all of one text."""
    texts = list(member.texts or (text for text in tiny.TEXTS if text))
    batch = parts.tokenizer.prepare(texts, TokenizationParams(truncate_prompt_tokens=-1)).token_ids
    chosen = [None, *member.adapters]
    for task in member.tasks:
        for i, ids in enumerate(batch):
            start = len(ids) // 2 if member.pairs else None
            for adapter in chosen if i == 0 else [chosen[i % len(chosen)]]:
                yield Prompt(task, ids, start, adapter)


@contextmanager
def _layers() -> Iterator[set[str]]:
    """The kinds of attention that layers ask for within this block."""
    seen: set[str] = set()
    compute = attention.varlen_attention  # type: ignore[attr-defined]

    def spy(*args: Any, **options: Any) -> Tensor:
        words = ["causal" if options.get("causal") else "both ways"]
        words += [f"window {options['window']}"] if options.get("window") else []
        words += [name for name in ("softcap", "bias", "sinks") if options.get(name) is not None]
        seen.add(" ".join(words))
        return compute(*args, **options)

    with mock.patch.object(attention, "varlen_attention", spy):
        yield seen
