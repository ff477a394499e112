"""The keeper of fronts: whatever goes wrong with one, it is said, and another one is started."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from structlog.testing import capture_logs

from carpool.engine import parcel
from carpool.engine.errors import EngineDead
from carpool.server import fronts, lifespan
from carpool.server.config import ServerConfig
from carpool.server.counts import Counts
from fakes import FakeEngine


class FakeGate:
    """What opens at once, and answers as `answer` says."""

    answer: BaseException | None = None
    opening: BaseException | None = None

    def __init__(self, *_: Any) -> None:
        self.given = b""
        self.told = 0

    async def open(self, connection: Any) -> None:
        connection.close()
        if self.opening:
            raise self.opening

    def hand_over(self, parcel: bytes) -> None:
        self.given = parcel

    def leave(self) -> None: ...

    def tell(self) -> None:
        self.told += 1

    def close(self) -> None: ...

    async def ask(self, question: str) -> bytes:
        if self.answer:
            raise self.answer
        if question == "counts":
            return Counts(inside=3 if self.told else 0).encode()
        assert question == "ready"
        return b""


class FakeProcess:
    """It lives until it is killed."""

    def __init__(self) -> None:
        self.returncode: int | None = None
        self.stdin = SimpleNamespace(write=lambda data: None, close=lambda: None)
        self._over = asyncio.Event()

    async def wait(self) -> int:
        await self._over.wait()
        assert self.returncode is not None
        return self.returncode

    def kill(self) -> None:
        self.returncode = -9
        self._over.set()


@pytest.fixture(autouse=True)
def _fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    async def start(*_: Any, **__: Any) -> FakeProcess:
        return FakeProcess()

    monkeypatch.setattr(fronts, "Gate", FakeGate)
    monkeypatch.setattr(asyncio, "create_subprocess_exec", start)
    monkeypatch.setattr(fronts, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(parcel, "pack", lambda parts: b"parcel")
    monkeypatch.setattr(FakeGate, "answer", None)
    monkeypatch.setattr(FakeGate, "opening", None)


@pytest.fixture
async def two() -> AsyncIterator[fronts.Fronts]:
    engine: Any = FakeEngine()
    engine.core = SimpleNamespace(parts="parts")
    listening: Any = SimpleNamespace(fileno=lambda: 0, getsockname=lambda: ("", 1))
    several = fronts.Fronts(ServerConfig(api_workers=2), engine, [listening])
    yield several
    for keeper in several._keepers:
        keeper.cancel()
    await asyncio.gather(*several._keepers, return_exceptions=True)


async def passes_in(seconds: float, wait: Any) -> bool:
    try:
        async with asyncio.timeout(seconds):
            await wait
    except TimeoutError:
        return False
    return True


@pytest.mark.parametrize("where", ["process", "gate"])
async def test_what_cannot_be_started_is_tried_again_and_said(
    two: fronts.Fronts, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Too many processes, no memory, no descriptors: all pass."""
    good, trials = asyncio.create_subprocess_exec, 0

    async def scarce(*arguments: Any, **options: Any) -> Any:
        nonlocal trials
        trials += 1
        if where == "process" and trials <= 4:
            raise OSError(11, "Resource temporarily unavailable")
        monkeypatch.setattr(FakeGate, "opening", OSError(24, "Too many open files") if trials <= 4 else None)
        return await good(*arguments, **options)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", scarce)
    with capture_logs() as lines:
        two.start()
        await asyncio.sleep(0)
        assert await passes_in(5, two.ready())
        async with asyncio.timeout(5):
            while len(two._gates) < 2:
                await asyncio.sleep(0.01)
    told = [line for line in lines if line["event"] == "front died and is started again"]
    assert len(told) == 4
    assert all(isinstance(line["exc_info"], OSError) for line in told)
    assert sorted(line["pause"] for line in told) == [0.01, 0.01, 0.02, 0.02]


async def test_it_is_not_ready_before_one_of_them_serves(
    two: fronts.Fronts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeGate, "answer", EngineDead("It is gone."))
    two.start()
    await asyncio.sleep(0.02)
    with capture_logs() as lines:
        ready = asyncio.ensure_future(two.ready())
        assert not await passes_in(0.1, asyncio.shield(ready))
    assert [line["event"] for line in lines] == ["front was lost before it served"] * 2
    monkeypatch.setattr(FakeGate, "answer", None)
    await two._greet(FakeGate(), b"parcel")  # type: ignore[arg-type]
    assert await passes_in(5, ready)


async def test_who_is_inside_is_what_they_count_once_they_know_how_the_engine_is(
    two: fronts.Fronts,
) -> None:
    two.start()
    assert await passes_in(5, two.ready())
    assert await two.inside() == 6


async def test_a_signal_is_heard_while_no_front_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    stop: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    monkeypatch.setattr(lifespan, "_stop_signal", lambda: stop)

    async def never(self: Any) -> None:
        stop.set_result(SimpleNamespace(name="SIGTERM"))
        await asyncio.Event().wait()

    monkeypatch.setattr(lifespan._Single, "ready", never)
    with capture_logs() as lines:
        async with asyncio.timeout(5):
            assert await lifespan.serve(ServerConfig(host="127.0.0.1", port=0), FakeEngine())  # type: ignore[arg-type]
    assert "ready" not in [line["event"] for line in lines]
    assert "draining" in [line["event"] for line in lines]
