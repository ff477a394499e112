"""The FakeEngine of these tests has the face of the real one."""

from __future__ import annotations

import inspect

import pytest

from carpool.engine.async_engine import AsyncEngine
from carpool.engine.config import EngineConfig
from fakes import FakeEngine

METHODS = [
    name
    for name, member in vars(FakeEngine).items()
    if inspect.isfunction(member) and not name.startswith("_")
]


@pytest.mark.parametrize("name", METHODS)
def test_each_method_is_called_as_the_real_one(name: str) -> None:
    fake, real = (inspect.signature(getattr(cls, name)).parameters for cls in (FakeEngine, AsyncEngine))
    assert set(fake) <= set(real)
    assert list(fake) == [parameter for parameter in real if parameter in fake]
    assert inspect.iscoroutinefunction(getattr(FakeEngine, name)) == inspect.iscoroutinefunction(
        getattr(AsyncEngine, name)
    )


def test_what_the_server_reads_is_there() -> None:
    engine = AsyncEngine(EngineConfig())
    for name in ("state", "waiting_tokens", "waiting_sequences", "observer", "cache_stats", "result_stats"):
        assert type(getattr(engine, name)) is type(getattr(FakeEngine(state="starting"), name))
