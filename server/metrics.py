"""The Prometheus series, in a registry of their own; and the ear that the engine talks to while it runs."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    Info,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from carpool import __version__
from carpool.engine.outputs import Timings

if TYPE_CHECKING:
    from prometheus_client import Metric

    from carpool.engine.async_engine import AsyncEngine

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series beside every counter, which nothing reads

STAGES = ("tokenize", "queue", "forward", "encode")
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
TOKENS = tuple(float(1 << power) for power in range(4, 19))
SEQUENCES = tuple(float(1 << power) for power in range(11))


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

    def __init__(self, model_name: str, engine: AsyncEngine) -> None:
        self.running = 0  # requests to the model that are under way; /load tells
        self._model = model_name
        self._registry = registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=registry)

        def counter(name: str, help: str, *labels: str) -> Counter:
            return Counter(name, help, ("model_name", *labels), registry=registry)

        def histogram(name: str, help: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(name, help, ("model_name", *labels), registry=registry, buckets=buckets)

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
        self._stages = {stage: stages.labels(model_name, stage) for stage in STAGES}
        self._prompt_tokens = counter("carpool_prompt_tokens_total", "Prompt tokens answered.").labels(
            model_name
        )
        self._cancelled = counter(
            "carpool_cancelled_total", "Prompts dropped: their client left or their deadline passed."
        ).labels(model_name)
        self._batch_tokens = histogram("carpool_batch_tokens", "Tokens a batch.", TOKENS).labels(model_name)
        self._batch_sequences = histogram("carpool_batch_sequences", "Prompts a batch.", SEQUENCES).labels(
            model_name
        )
        gauge("carpool_queue_tokens", "Tokens that wait to be run.", lambda: engine.waiting_tokens)
        gauge("carpool_queue_sequences", "Prompts that wait to be run.", lambda: engine.waiting_sequences)
        registry.register(CacheCollector(model_name, engine))
        registry.register(ResultCollector(model_name, engine))
        Info("carpool_build", "What runs here.", ("model_name",), registry=registry).labels(model_name).info(
            {"version": __version__, "python": platform.python_version()}
        )

    @contextmanager
    def one_more_running(self) -> Iterator[None]:
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1

    def request_done(self, endpoint: str, status: int, seconds: float) -> None:
        counter, histogram = self._done(endpoint, status)
        counter.inc()
        histogram.observe(seconds)

    def answered(self, prompt_tokens: int, timings: Timings, encode: float) -> None:
        """The engine served a request, and its answer is written."""
        self._prompt_tokens.inc(prompt_tokens)
        for stage, seconds in zip(
            STAGES, (timings.tokenize, timings.queue, timings.forward, encode), strict=True
        ):
            self._stages[stage].observe(seconds)

    def batch_done(self, tokens: int, sequences: int, forward_seconds: float) -> None:
        """A batch's seconds reach the series through the requests that rode in it."""
        self._batch_tokens.observe(tokens)
        self._batch_sequences.observe(sequences)

    def sequences_cancelled(self, count: int) -> None:
        self._cancelled.inc(count)

    def render(self) -> bytes:
        return generate_latest(self._registry)
