"""The collector of a process that serves."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from carpool.server import garbage


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    before = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*before)


def test_what_is_here_is_skipped_and_new_garbage_is_still_found() -> None:
    class Node:
        me: object

    old = Node()
    garbage.settle()
    assert not any(thing is old for thing in gc.get_objects())
    assert gc.get_threshold()[0] == garbage.NEW_OBJECTS
    made = []
    for _ in range(2 * garbage.NEW_OBJECTS):
        node = Node()
        node.me = node
        made.append(id(node))
    left = {id(thing) for thing in gc.get_objects() if isinstance(thing, Node)}
    assert len(left) < len(made)
