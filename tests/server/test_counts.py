"""What several processes counted is shown as if one had."""

from __future__ import annotations

from math import inf
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from carpool.server.counts import Counts
from carpool.server.metrics import SECONDS, Metrics
from fakes import FakeEngine


def test_what_processes_counted_is_summed_and_what_they_are_is_not() -> None:
    engine: Any = FakeEngine()
    own, one, other = (Metrics("m", engine) for _ in range(3))
    own.batch_done(16, 1, 0.1)
    for metrics, seconds in ((one, 0.002), (other, 0.002), (other, 7.0)):
        metrics.request_done("/embed", 200, seconds)
    other.request_done("/score", 503, 0.1)
    engine.waiting_tokens = 5
    own.running, one.running, other.running = 0, 2, 1
    counts = [Counts.decode(metrics.counts().encode()) for metrics in (one, other)]
    families = text_string_to_metric_families(own.text(counts).decode())
    samples = {(s.name, *sorted(s.labels.values())): s.value for family in families for s in family.samples}
    assert samples["carpool_requests_total", "/embed", "200", "m"] == 3
    assert samples["carpool_requests_total", "/score", "503", "m"] == 1
    assert samples["carpool_request_seconds_count", "/embed", "m"] == 3
    assert samples["carpool_request_seconds_sum", "/embed", "m"] == pytest.approx(7.004)
    assert samples["carpool_request_seconds_bucket", "/embed", "0.0025", "m"] == 2
    assert samples["carpool_request_seconds_bucket", "+Inf", "/embed", "m"] == 3
    assert samples["carpool_batch_tokens_count", "m"] == 1
    assert samples["carpool_queue_tokens", "m"] == 5
    assert samples["carpool_running_requests", "m"] == 3
    gone = counts[0].ended()
    assert gone.running == 0
    assert gone.samples == [s for s in counts[0].samples if s.family != "carpool_running_requests"]
    assert len(gone.samples) == len(counts[0].samples) - 1


def test_counts_that_are_added_up_stay_in_the_order_that_histograms_need() -> None:
    engine: Any = FakeEngine()
    one, other = Metrics("m", engine), Metrics("m", engine)
    one.request_done("/embed", 200, 0.1)
    other.request_done("/score", 200, 0.1)
    whole = one.text([other.counts()]).decode()
    for endpoint in ("/embed", "/score"):
        edges = [
            float(sample.labels["le"])
            for family in text_string_to_metric_families(whole)
            for sample in family.samples
            if sample.name == "carpool_request_seconds_bucket" and sample.labels["endpoint"] == endpoint
        ]
        assert edges == [*SECONDS, inf]


async def test_a_front_asks_the_engines_process() -> None:
    async def ask(question: str) -> bytes:
        return {"metrics": b"all of them", "load": b"7"}[question]

    engine: Any = FakeEngine()
    metrics = Metrics("m", engine, ask)
    assert await metrics.render() == b"all of them"
    assert await metrics.load() == 7
