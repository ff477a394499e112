"""Python's collector: put off, and what becomes of things meanwhile."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from carpool.engine import garbage


class Thing:
    def __init__(self) -> None:
        self.me: Any = self  # a cycle: only a collection frees it


@pytest.fixture(autouse=True)
def collecting() -> Iterator[None]:
    gc.unfreeze()  # a server that another test ran may have frozen what there was
    gc.collect()
    yield
    gc.unfreeze()
    gc.enable()


def old() -> set[int]:
    return {id(thing) for thing in gc.get_objects(generation=2)}


def test_nothing_is_collected_meanwhile_and_all_is_afterwards() -> None:
    with garbage.put_off():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_it_goes_on_after_a_failure() -> None:
    with pytest.raises(ImportError), garbage.put_off():
        raise ImportError
    assert gc.isenabled()


def test_what_was_made_is_old_at_once() -> None:
    with garbage.put_off():
        thing = Thing()
        assert id(thing) not in old()
    assert id(thing) in old()


def test_what_was_made_can_still_be_freed() -> None:
    with garbage.put_off():
        thing = weakref.ref(Thing())
        assert thing() is not None
    assert gc.get_freeze_count() == 0
    gc.collect()
    assert thing() is None


def test_who_collects_by_hand_is_left_alone() -> None:
    gc.disable()
    with garbage.put_off():
        pass
    assert not gc.isenabled()


def test_what_somebody_has_frozen_stays_frozen() -> None:
    gc.freeze()
    frozen = gc.get_freeze_count()
    with garbage.put_off():
        assert not gc.isenabled()
    assert gc.get_freeze_count() > 0.9 * frozen > 0  # some of it may be freed by its last holder
    assert gc.isenabled()
