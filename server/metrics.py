"""The Prometheus series, in a registry of their own; and the ear that the engine talks to while it runs."""

from __future__ import annotations

import platform
from bisect import bisect_left
from collections.abc import Awaitable, Callable, Iterable
from functools import cache
from itertools import accumulate
from math import inf
from typing import TYPE_CHECKING

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Info,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from carpool import __version__
from carpool.engine.outputs import Timings
from carpool.server.counts import RUNNING, Counts, Whole

if TYPE_CHECKING:
    from prometheus_client import Metric

    from carpool.engine.async_engine import AsyncEngine

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series beside every counter, which nothing reads

STAGES = ("tokenize", "queue", "forward", "encode")
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
TOKENS = tuple(float(1 << power) for power in range(4, 19))
SEQUENCES = tuple(float(1 << power) for power in range(11))


class Tally:
    """One series of a histogram: how many observations fell in each bucket, and their sum.

    Only the event loop writes it, so it needs no lock, and costs a tenth of what the library's own does.
    """

    __slots__ = ("_bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self._bounds, value)] += 1
        self.sum += value


class Tallies(Collector):
    """A histogram with its series by label values, each made when it is first asked for."""

    def __init__(self, name: str, help: str, bounds: tuple[float, ...], labels: tuple[str, ...]) -> None:
        self._name = name
        self._help = help
        self._bounds = bounds
        self._labels = labels
        self._series: dict[tuple[str, ...], Tally] = {}

    def labels(self, *values: str) -> Tally:
        return self._series.setdefault(values, Tally(self._bounds))

    def collect(self) -> Iterable[Metric]:
        family = HistogramMetricFamily(self._name, self._help, labels=self._labels)
        edges = [floatToGoString(bound) for bound in (*self._bounds, inf)]  # type: ignore[no-untyped-call]
        for values, tally in self._series.items():
            below = accumulate(map(float, tally.counts))
            family.add_metric(values, list(zip(edges, below, strict=True)), tally.sum)
        yield family


class CacheCollector(Collector):
    """What the engine counts of its cache; no series where it has none, or before it is loaded."""

    def __init__(self, model_name: str, engine: AsyncEngine) -> None:
        self._model = model_name
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        stats = self._engine.cache_stats
        if stats is None:
            return
        counts = (
            ("queried", "Tokens of prompts that were looked up in the prefix cache.", stats.queried_tokens),
            ("hit", "Tokens of prompts that were found in the prefix cache.", stats.hit_tokens),
        )
        for name, help, tokens in counts:
            counter = CounterMetricFamily(f"carpool_prefix_cache_{name}_tokens", help, labels=("model_name",))
            counter.add_metric((self._model,), tokens)
            yield counter
        used = GaugeMetricFamily(
            "carpool_kv_cache_used_ratio",
            "Part of the cache that holds keys and values of prompts under way.",
            labels=("model_name",),
        )
        used.add_metric((self._model,), stats.used_blocks / stats.num_blocks)
        yield used


class ResultCollector(Collector):
    """What the engine counts of the results that it keeps; no series where it keeps none."""

    def __init__(self, model_name: str, engine: AsyncEngine) -> None:
        self._model = model_name
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        stats = self._engine.result_stats
        if stats is None:
            return
        counts = (
            ("hits", "Results that were looked up in the result cache and found.", stats.hits),
            (
                "misses",
                "Results that were looked up in the result cache and had to be computed.",
                stats.misses,
            ),
        )
        for name, help, count in counts:
            counter = CounterMetricFamily(f"carpool_result_cache_{name}", help, labels=("model_name",))
            counter.add_metric((self._model,), count)
            yield counter
        size = GaugeMetricFamily(
            "carpool_result_cache_bytes", "Memory that kept results take.", labels=("model_name",)
        )
        size.add_metric((self._model,), stats.num_bytes)
        yield size


class Metrics:
    """Implements `engine.stats.Observer`. `endpoint` is always a route's path, never what a client typed."""

    content_type = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(
        self, model_name: str, engine: AsyncEngine, ask: Callable[[str], Awaitable[bytes]] | None = None
    ) -> None:
        """`ask` the engine's process, if this is another: it has the counts of all."""
        self.running = 0  # requests to the model that are under way; /load tells
        self.inside = 0  # requests of every kind that are under way
        self._ask = ask
        self._model = model_name
        self._registry = registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=registry)

        def counter(name: str, help: str, *labels: str) -> Counter:
            return Counter(name, help, ("model_name", *labels), registry=registry)

        def histogram(name: str, help: str, bounds: tuple[float, ...], *labels: str) -> Tallies:
            tallies = Tallies(name, help, bounds, ("model_name", *labels))
            registry.register(tallies)
            return tallies

        def gauge(name: str, help: str, read: Callable[[], float]) -> None:
            Gauge(name, help, ("model_name",), registry=registry).labels(model_name).set_function(read)

        self._requests = counter("carpool_requests_total", "Requests.", "endpoint", "status")
        self._request_seconds = histogram(
            "carpool_request_seconds", "From a request's headers to its answer.", SECONDS, "endpoint"
        )
        # Routes and statuses are few, and to find the series of one anew takes longer than to count.
        self._done = cache(
            lambda endpoint, status: (
                self._requests.labels(model_name, endpoint, str(status)),
                self._request_seconds.labels(model_name, endpoint),
            )
        )
        stages = histogram("carpool_stage_seconds", "Seconds of a request in each stage.", SECONDS, "stage")
        self._tokenize, self._queue, self._forward, self._encode = (
            stages.labels(model_name, stage) for stage in STAGES
        )
        self._prompt_tokens = counter("carpool_prompt_tokens_total", "Prompt tokens answered.").labels(
            model_name
        )
        self._cancelled = counter(
            "carpool_cancelled_total", "Prompts dropped: their client left or their deadline passed."
        ).labels(model_name)
        self._stalled = counter(
            "carpool_stalled_clients_total", "Connections dropped: nothing was taken of an answer."
        ).labels(model_name)
        self._batch_tokens = histogram("carpool_batch_tokens", "Tokens a batch.", TOKENS).labels(model_name)
        self._batch_sequences = histogram("carpool_batch_sequences", "Prompts a batch.", SEQUENCES).labels(
            model_name
        )
        gauge(RUNNING, "Requests to the model that are under way.", lambda: self.running)
        gauge("carpool_queue_tokens", "Tokens that wait to be run.", lambda: engine.waiting_tokens)
        gauge("carpool_queue_sequences", "Prompts that wait to be run.", lambda: engine.waiting_sequences)
        registry.register(CacheCollector(model_name, engine))
        registry.register(ResultCollector(model_name, engine))
        Info("carpool_build", "What runs here.", ("model_name",), registry=registry).labels(model_name).info(
            {"version": __version__, "python": platform.python_version()}
        )

    def request_done(self, endpoint: str, status: int, seconds: float) -> None:
        counter, histogram = self._done(endpoint, status)
        counter.inc()
        histogram.observe(seconds)

    def answered(self, prompt_tokens: int, timings: Timings, encode: float) -> None:
        """The engine served a request, and its answer is written."""
        self._prompt_tokens.inc(prompt_tokens)
        self._tokenize.observe(timings.tokenize)
        self._queue.observe(timings.queue)
        self._forward.observe(timings.forward)
        self._encode.observe(encode)

    def batch_done(self, tokens: int, sequences: int, forward_seconds: float) -> None:
        """A batch's seconds reach the series through the requests that rode in it."""
        self._batch_tokens.observe(tokens)
        self._batch_sequences.observe(sequences)

    def sequences_cancelled(self, count: int) -> None:
        self._cancelled.inc(count)

    def client_stalled(self) -> None:
        self._stalled.inc()

    async def render(self) -> bytes:
        """What /metrics answers: all processes' counts in one."""
        return await self._ask("metrics") if self._ask else self.text(())

    async def load(self) -> int:
        """What /load answers: the requests to the model that are under way, in all processes."""
        return int(await self._ask("load")) if self._ask else self.running

    def text(self, others: Iterable[Counts]) -> bytes:
        """All series as Prometheus reads them, with what other processes counted added to them."""
        return generate_latest(Whole(self._registry, others))

    def counts(self) -> Counts:
        """What this process has counted."""
        return Counts.of(self.running, self.inside, self._registry.collect())
