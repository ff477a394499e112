"""Probes, version and metrics."""

from __future__ import annotations

import pytest

import carpool
from serving import Served, assert_error


@pytest.mark.parametrize(
    ("state", "health", "live", "ready"),
    [
        ("starting", 503, 200, 503),
        ("ready", 200, 200, 200),
        ("draining", 200, 200, 503),
        ("dead", 503, 503, 503),
        ("stopped", 503, 200, 503),
    ],
)
async def test_probes_tell_the_engines_state(
    served: Served, state: str, health: int, live: int, ready: int
) -> None:
    served.engine.state = state
    for path, status in (
        ("/health", health),
        ("/ping", health),
        ("/health/live", live),
        ("/health/ready", ready),
    ):
        answer = await served.get(path)
        if status == 200:
            assert (answer.status, answer.body) == (200, b"")
        else:
            assert_error(answer, 503, "ServiceUnavailableError")


async def test_ping_can_be_posted(served: Served) -> None:
    assert (await served.ask("POST", "/ping")).status == 200


async def test_the_version_is_told(served: Served) -> None:
    assert (await served.get("/version")).json == {"version": carpool.__version__}


async def test_metrics_are_prometheus_text(served: Served) -> None:
    answer = await served.get("/metrics")
    assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    assert b"process_resident_memory_bytes" in answer.body
    assert b"python_info" in answer.body
