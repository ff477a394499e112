"""Counts: what a process has counted, to be added to what others have. For `/metrics` and `/load` of several fronts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from msgspec import Struct, msgpack
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample as LibrarySample

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Metric


RUNNING = "carpool_running_requests"  # the one gauge of which each process has a part


class Sample(Struct, frozen=True, array_like=True):
    """One number of a series, as `/metrics` has it."""

    family: str
    name: str
    labels: dict[str, str]
    value: float

    @property
    def series(self) -> tuple[object, ...]:
        """What samples of several processes have in common that are of one series."""
        return self.family, self.name, *sorted(self.labels.items())


class Counts(Struct, frozen=True):
    """Of one process, or the sum over several."""

    running: int = 0  # requests to the model under way
    inside: int = 0  # requests of every kind
    samples: list[Sample] = []

    @classmethod
    def of(cls, running: int, inside: int, families: Iterable[Metric]) -> Counts:
        """Those of `families` whose sum over processes says something: one gauge, and nothing of the process itself."""
        return cls(
            running,
            inside,
            [
                Sample(family.name, sample.name, sample.labels, sample.value)
                for family in families
                if family.name == RUNNING
                or (family.name.startswith("carpool_") and family.type in ("counter", "histogram"))
                for sample in family.samples
            ],
        )

    def ended(self) -> Counts:
        """What is left of those of a process that has gone: nothing is under way there."""
        return Counts(samples=[sample for sample in self.samples if sample.family != RUNNING])

    def encode(self) -> bytes:
        return msgpack.encode(self)

    @classmethod
    def decode(cls, data: bytes) -> Counts:
        return msgpack.decode(data, type=cls)

    def plus(self, others: Iterable[Counts]) -> Counts:
        """What has been counted by all of them; series that only others have come last."""
        everyone = (self, *others)
        sums: dict[tuple[object, ...], Sample] = {}
        for counts in everyone:
            for sample in counts.samples:
                before = sums[sample.series].value if sample.series in sums else 0.0
                sums[sample.series] = Sample(sample.family, sample.name, sample.labels, before + sample.value)
        running, inside = (
            sum(counts.running for counts in everyone),
            sum(counts.inside for counts in everyone),
        )
        return Counts(running, inside, list(sums.values()))


class Whole(Collector):
    """A registry's series, with what `others` have counted added to them."""

    def __init__(self, registry: CollectorRegistry, others: Iterable[Counts]) -> None:
        self._registry = registry
        self._others = list(others)

    def collect(self) -> Iterable[Metric]:
        families = list(self._registry.collect())
        summed: dict[str, list[LibrarySample]] = {}
        for sample in Counts.of(0, 0, families).plus(self._others).samples:
            samples = summed.setdefault(sample.family, [])
            samples.append(LibrarySample(sample.name, sample.labels, sample.value))
        for family in families:
            family.samples = summed.get(family.name, family.samples)
            yield family
