"""What goes into a frame comes out of it, however the stream was cut."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from carpool.engine.cache.blocks import Prompt
from carpool.engine.errors import EngineError, InferenceFailed, InvalidInput, Overloaded, Unavailable
from carpool.engine.frames import (
    Ask,
    Cancel,
    Frame,
    Leave,
    Parcel,
    Progress,
    Question,
    Reader,
    Reply,
    Standing,
    answered,
    answering,
    asked,
    asking,
    failed,
    failing,
    written,
)
from carpool.engine.outputs import PoolingResult, Timings
from carpool.engine.params import PoolingParams, Task
from carpool.engine.prepared import Prepared
from carpool.engine.request import Request
from fakes import engine_errors

IDS = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=20)
TASKS: st.SearchStrategy[list[Task]] = st.lists(
    st.sampled_from(["embed", "token_embed", "classify"]), min_size=1, max_size=2, unique=True
)
SHAPES = st.one_of(st.tuples(st.integers(0, 5)), st.tuples(st.integers(0, 4), st.integers(0, 5)))
DTYPES = st.sampled_from([np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)])


def stream(*frames: tuple[Frame, bytes]) -> bytes:
    return b"".join(bytes(piece) for frame, body in frames for piece in written(frame, body))


def through(frame: Frame, body: bytes = b"") -> tuple[Any, bytes]:
    """As the other process reads it."""
    [(came, content)] = Reader().read(stream((frame, body)))
    return came, content


@st.composite
def requests(draw: st.DrawFn) -> tuple[Request, Prepared]:
    ids = draw(st.lists(IDS, min_size=1, max_size=6))
    n = len(ids)
    places = st.one_of(st.none(), st.lists(st.none() | st.integers(0, 20), min_size=n, max_size=n))
    tasks = tuple(draw(TASKS))
    known = [Prompt(len(one), [b"h" * 16] * draw(st.integers(0, 2)), draw(st.booleans())) for one in ids]
    prompts = [one if draw(st.booleans()) else None for one in known]
    keys = draw(st.lists(st.binary(max_size=40), min_size=n * len(tasks), max_size=n * len(tasks)))
    params = PoolingParams(
        dimensions=draw(st.none() | st.integers(1, 9)),
        use_activation=draw(st.none() | st.booleans()),
        normalize=draw(st.none() | st.booleans()),
        embed_dtype=draw(st.sampled_from(["float32", "float16", "bfloat16"])),
    )
    request = Request(
        params, tasks, draw(st.integers(0, 5)), None, draw(st.text(max_size=9)), draw(st.integers())
    )
    told = draw(st.sampled_from([None, prompts]))
    return request, Prepared(ids, draw(places), draw(places), draw(st.integers(0, 9)), told, keys)


@given(
    asked_for=requests(),
    number=st.integers(0, 2**40),
    timeout=st.none() | st.floats(0, 1e6),
    progress=st.booleans(),
)
def test_a_request_arrives_as_it_was_sent(
    asked_for: tuple[Request, Prepared], number: int, timeout: float | None, progress: bool
) -> None:
    request, ready = asked_for
    request = replace(request, priority=max(-(2**63), min(request.priority, 2**63 - 1)))
    frame, body = through(*asking(number, request, ready, timeout, progress=progress))
    assert isinstance(frame, Ask)
    assert (frame.number, frame.timeout, frame.wants_progress) == (number, timeout, progress)
    assert asked(frame, body) == (request, ready)


@given(
    forms=st.lists(st.tuples(SHAPES, DTYPES), min_size=1, max_size=6),
    alike=st.booleans(),
    seed=st.integers(0, 99),
)
def test_rows_arrive_to_the_last_bit(
    forms: list[tuple[tuple[int, ...], np.dtype[Any]]], alike: bool, seed: int
) -> None:
    random = np.random.default_rng(seed)
    forms = [forms[0]] * len(forms) if alike else forms
    rows = [random.standard_normal(shape).astype(dtype) for shape, dtype in forms]
    sent = PoolingResult(rows, [[1]] * len(rows), Timings(9.0, 0.25, 0.5), [3] * len(rows))
    frame, body = through(*answering(7, sent))
    came = answered(frame, body, sent.prompt_token_ids)
    assert frame.number == 7
    assert (came.cached, came.timings) == (sent.cached, Timings(0.0, 0.25, 0.5))
    for one, other in zip(came.rows, rows, strict=True):
        assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
        assert not one.flags.writeable


def test_rows_that_are_views_of_others_arrive_too() -> None:
    whole = np.arange(24, dtype=np.float32).reshape(4, 6)
    rows: list[Any] = [whole[:, 1], whole[::2], whole.T, whole[1]]
    frame, body = through(*answering(0, PoolingResult(rows, [[1]] * 4)))
    for one, other in zip(answered(frame, body, [[1]] * 4).rows, rows, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("cls", engine_errors(), ids=lambda cls: cls.__name__)
def test_each_error_of_the_family_arrives_as_itself(cls: type[EngineError]) -> None:
    error = cls("It is so.")
    if isinstance(error, InvalidInput):
        error.param = "input[3]"
    if isinstance(error, Unavailable):
        error.retry_after = 7.5
    frame, _ = through(failing(5, error))
    came = failed(frame)
    assert frame.number == 5
    assert type(came) is cls
    assert (came.args, vars(came)) == (error.args, vars(error))


def test_the_log_is_told_what_an_error_came_of() -> None:
    error = InferenceFailed("it broke")
    error.__cause__ = ZeroDivisionError("by nothing")
    came = failed(through(failing(1, error))[0])
    assert "ZeroDivisionError: by nothing" in str(came.__cause__)


def test_a_fault_of_ours_is_no_error_of_the_family() -> None:
    came = failed(through(failing(1, KeyError("gone")))[0])
    assert not isinstance(came, EngineError)
    assert "KeyError: 'gone'" in str(came)


@given(cuts=st.lists(st.integers(0, 400), max_size=12))
def test_frames_are_found_however_the_stream_is_cut(cuts: list[int]) -> None:
    sent: list[tuple[Frame, bytes]] = [
        (Cancel(3), b""),
        (Parcel(), b"x" * 150),
        (Question(1, "metrics"), b""),
        (Reply(1), b"\0" * 9),
        (Progress(2, 5), b""),
        (Standing("ready", 1, 2, 3.5, ("full", 2.0)), b""),
        (Leave(), b""),
    ]
    data = stream(*sent)
    edges = sorted({0, *(min(cut, len(data)) for cut in cuts), len(data)})
    reader = Reader()
    came = [pair for a, b in pairwise(edges) for pair in reader.read(data[a:b])]
    assert came == sent


def test_a_full_queue_refuses_in_the_engines_words() -> None:
    Standing("ready", 9, 9, 1.0, None).check()
    with pytest.raises(Overloaded, match="so many wait") as caught:
        Standing("ready", 9, 9, 1.0, ("so many wait", 4.0)).check()
    assert caught.value.retry_after == 4.0
