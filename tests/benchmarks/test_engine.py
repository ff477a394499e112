"""The stopwatch around native kernels, and the rows of the tables."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from contestants import Turn
from engine import Line, Stopwatch, _row
from peaks import Peaks


def test_the_stopwatch_passes_calls_on_and_adds_up_their_time() -> None:
    def work(seconds: float) -> str:
        end = time.thread_time() + seconds
        while time.thread_time() < end:
            pass
        return "done"

    watch = Stopwatch(SimpleNamespace(work=work))
    assert watch.work(0.01) == watch.work(0.02) == "done"
    assert watch.seconds["work"] >= 0.03
    with pytest.raises(AttributeError, match="nothing"):
        watch.nothing()


def test_what_is_reached_is_held_against_all_cores_for_they_all_help_with_one_text() -> None:
    bounds = Peaks({"fma": 100.0}, {"fma": 180.0})
    turns = [Turn(2.0, 2.0, 0.0)]
    alone = Line("texts", "1", "float32", texts=1, tokens=64, flop=180_000_000_000, turns=turns)
    assert _row(alone, bounds) == ("1", "float32", "32", "2,000.0", "90", "50 %")
