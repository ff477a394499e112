"""Arrivals: when the requests of an open loop are due."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random


def poisson(rate: float, seconds: float, seed: int = 0) -> list[float]:
    """Times within `seconds` of requests that come independently of each other, `rate` a second on average."""
    return list(_until(seconds, rate, Random(seed)))


def _until(seconds: float, rate: float, random: Random) -> Iterator[float]:
    now = random.expovariate(rate)
    while now < seconds:
        yield now
        now += random.expovariate(rate)
