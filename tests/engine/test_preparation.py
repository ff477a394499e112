"""Preparation: what is done on the event loop, and what in a thread."""

from __future__ import annotations

from carpool.engine.preparation import is_long


def test_many_prompts_are_a_thread_s_work_however_short() -> None:
    assert is_long([""] * 1000)
    assert is_long([[1]] * 1000)
    assert not is_long([""] * 100)
    assert not is_long(["a few words"])
