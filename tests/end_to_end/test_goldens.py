"""Every recorded request of the reference, asked again: the same answers, but for what the contract decides."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

import goldens
from carpool.engine.async_engine import AsyncEngine
from carpool.server.cli import read_config
from golden_differences import decided
from serving import Answer, Served, serving

NAMES: list[Any] = goldens.names() or [
    pytest.param("none", marks=pytest.mark.skip(f"no recordings in {goldens.GOLDENS}"))
]


@pytest.mark.parametrize("name", NAMES)
async def test_the_answers_are_those_recorded(name: str) -> None:
    recording = goldens.recording(name)
    try:
        goldens.checkpoint(recording["checkpoint"])
    except FileNotFoundError as error:
        pytest.skip(str(error))
    if differing := goldens.differing_files(recording["checkpoint"]):
        pytest.skip(
            f"the recording does not apply: {', '.join(differing)} came out different on this machine"
        )
    config, _ = read_config(goldens.arguments(name), {})
    engine = AsyncEngine(config.engine)
    await engine.start()
    try:
        async with serving(config, engine) as server:  # type: ignore[arg-type]  # the engine itself, not its fake
            found = [
                f"{case['name']}: {difference}"
                for case in recording["cases"]
                for difference in await _differences(server, name, case)
            ]
    finally:
        await engine.stop(5.0)
    assert not found


def test_a_wrong_answer_would_be_seen() -> None:
    request = {"path": "/v1/embeddings", "json": {}}
    vector = [0.1, -0.2, 0.3, 0.4] * 8
    recorded = {
        "json": {"id": "embd-1", "data": [{"index": 0, "embedding": vector}], "usage": {"prompt_tokens": 3}}
    }

    def seen(**changes: Any) -> list[str]:
        ours = {
            "id": "embd-2",
            "data": [{"index": 0, "embedding": vector}],
            "usage": {"prompt_tokens": 3},
            **changes,
        }
        return list(goldens.differences(request, recorded, json.dumps(ours).encode(), {}))

    assert not seen()
    assert seen(id="pool-2")
    assert seen(data=[])
    assert seen(data=[{"index": 1, "embedding": vector}])
    assert seen(data=[{"index": 0, "embedding": [*vector[:-1], 0.39]}])
    assert seen(data=[{"index": 0, "embedding": [2 * number for number in vector]}])
    assert seen(usage={"prompt_tokens": 4})
    assert seen(usage={})


async def _differences(server: Served, name: str, case: dict[str, Any]) -> list[str]:
    request, recorded = case["request"], case["response"]
    try:
        body = goldens.body_of(request)
    except LookupError:
        return []
    answer = await server.ask(
        request["method"],
        request["path"],
        data=body,
        headers=goldens.headers_of(request),
        skip_auto_headers=["Content-Type"],
        allow_redirects=False,
    )
    found = list(_complaints(request["method"], answer))
    if (answer.status < 400) != (recorded["status"] < 400):
        found.append(f"{answer.status}, not {recorded['status']}: {answer.body[:200]!r}")
    elif recorded["status"] == 200:
        found += goldens.differences(request, recorded, answer.body, answer.headers)
    if known := decided(name, case["name"]):
        if not found:
            return [f"listed as decided ({known.reason}), but the answers agree"]
        return (
            [] if answer.status == known.ours else [f"{answer.status}, not {known.ours} as decided", *found]
        )
    return found


def _complaints(method: str, answer: Answer) -> Iterator[str]:
    """What no answer may be, whatever was recorded."""
    if answer.status >= 500:
        yield f"status {answer.status}"
    if answer.status >= 400 and method != "HEAD":
        error = json.loads(answer.body)
        if set(error) != {"object", "message", "type", "param", "code"} or error["code"] != answer.status:
            yield f"an error in another shape: {error}"
