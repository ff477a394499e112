"""Frames: what the engine's process and a front's say to each other over their socket, and how it looks in bytes.

    length of the head, length of the body | head: one of the structs below, as msgpack | body: raw bytes

Token ids, rows and pickles are bodies: one buffer a frame, which is neither parsed nor escaped.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from itertools import repeat
from math import prod
from struct import Struct as Layout
from traceback import format_exception
from typing import Any

import ml_dtypes
import numpy as np
from msgspec import Struct, msgpack
from numpy.typing import NDArray

from carpool.engine.cache.blocks import Prompt
from carpool.engine.errors import EngineError, Overloaded
from carpool.engine.outputs import PoolingResult, Timings
from carpool.engine.params import PoolingParams, Task
from carpool.engine.prepared import Prepared
from carpool.engine.request import Request
from carpool.engine.stats import State

Bytes = bytes | memoryview

_LENGTHS = Layout("<IQ")
_DTYPES: dict[str, Any] = {"bfloat16": ml_dtypes.bfloat16}  # those that numpy does not know by name


class Frame(Struct, frozen=True, array_like=True, tag=True):
    """Base of all heads. `number` is always of the side that asked: its own, and unique among those under way."""


class Ask(Frame, frozen=True, array_like=True, tag=True):
    """Front → engine: run this. The body is the ids of all prompts, as int32.

    `timeout` is in seconds from now; the salt is in the keys and hashes already.
    """

    number: int
    params: PoolingParams
    tasks: tuple[Task, ...]
    adapter: int
    client: str
    priority: int
    timeout: float | None
    wants_progress: bool
    lengths: list[int]
    type_starts: list[int | None] | None
    unseen: list[int | None] | None
    skip: int
    prompts: list[Prompt | None] | None
    keys: list[bytes]


class Cancel(Frame, frozen=True, array_like=True, tag=True):
    """Front → engine: nobody waits for it any more."""

    number: int


class Progress(Frame, frozen=True, array_like=True, tag=True):
    """Engine → front: so many more of its rows are done."""

    number: int
    rows: int


class Answer(Frame, frozen=True, array_like=True, tag=True):
    """Engine → front. The body is the numbers of all `count` rows; `forms` has each one's dtype and shape, or the one
    that all have."""

    number: int
    queue: float
    forward: float
    cached: list[int]
    count: int
    forms: list[tuple[str, tuple[int, ...]]]


class Failed(Frame, frozen=True, array_like=True, tag=True):
    """Either way, in place of an answer: an error by its class's name, or, of a class that is not the engine's family,
    as it would be printed. `cause` is what it came of, for the log."""

    number: int
    name: str | None
    args: list[Any]
    facts: dict[str, Any]
    cause: str | None


class Standing(Frame, frozen=True, array_like=True, tag=True):
    """Engine → front: how it is. `full` is what a request that came now would be refused with: text, retry_after."""

    state: State
    waiting_tokens: int
    waiting_sequences: int
    tokens_per_second: float
    full: tuple[str, float] | None

    def check(self) -> None:
        """Raise what the engine would."""
        if self.full:
            raise Overloaded(*self.full)


class Parcel(Frame, frozen=True, array_like=True, tag=True):
    """Engine → front: the body is what a front needs of the model, see `parcel`."""


class Adapters(Frame, frozen=True, array_like=True, tag=True):
    """Engine → front: which there are now. `slots` of all by name, `modules` the folders of the user's."""

    slots: dict[str, int]
    modules: dict[str, str]


class Question(Frame, frozen=True, array_like=True, tag=True):
    """Either way: something about the other process."""

    number: int
    name: str


class Reply(Frame, frozen=True, array_like=True, tag=True):
    """The answer to a question, in the body."""

    number: int


class Leave(Frame, frozen=True, array_like=True, tag=True):
    """Engine → front: send what is left to send, and end."""


AnyFrame = Ask | Cancel | Progress | Answer | Failed | Standing | Parcel | Adapters | Question | Reply | Leave
_encode = msgpack.Encoder().encode
_decode = msgpack.Decoder(AnyFrame).decode


def written(frame: Frame, body: Bytes = b"") -> list[Bytes]:
    """The bytes of a frame, piece by piece."""
    head = _encode(frame)
    pieces: list[Bytes] = [_LENGTHS.pack(len(head), memoryview(body).nbytes) + head]
    return [*pieces, body] if body else pieces


class Reader:
    """Frames out of a stream, however it was cut."""

    def __init__(self) -> None:
        self._held = bytearray()

    def read(self, data: Bytes) -> Iterator[tuple[AnyFrame, bytes]]:
        """All that are whole now, with their bodies."""
        held = self._held
        held += data
        place = 0
        while len(held) - place >= _LENGTHS.size:
            head, body = _LENGTHS.unpack_from(held, place)
            start = place + _LENGTHS.size
            end = start + head + body
            if len(held) < end:
                break
            with memoryview(held) as view:
                frame = _decode(view[start : start + head])
                content = bytes(view[start + head : end])
            place = end
            yield frame, content
        del held[:place]


# ── requests ─────────────────────────────────────────────────────────────────────────────────────────────────


def asking(
    number: int, request: Request, ready: Prepared, timeout: float | None, *, progress: bool
) -> tuple[Ask, bytes]:
    """A request and its prompts as a frame and its body."""
    ids = array("i")
    for prompt in ready.token_ids:
        ids.extend(prompt)
    ask = Ask(
        number=number,
        params=request.params,
        tasks=request.tasks,
        adapter=request.adapter,
        client=request.client,
        priority=request.priority,
        timeout=timeout,
        wants_progress=progress,
        lengths=list(map(len, ready.token_ids)),
        type_starts=ready.type_starts,
        unseen=ready.unseen,
        skip=ready.skip,
        prompts=None if ready.prompts is None else list(ready.prompts),
        keys=list(ready.keys),
    )
    return ask, ids.tobytes()


def asked(ask: Ask, body: bytes) -> tuple[Request, Prepared]:
    """What `asking` was told, but for the salt."""
    ids = memoryview(body).cast("i").tolist()
    prompts, start = [], 0
    for length in ask.lengths:
        prompts.append(ids[start : start + length])
        start += length
    request = Request(ask.params, ask.tasks, ask.adapter, None, ask.client, ask.priority)
    return request, Prepared(prompts, ask.type_starts, ask.unseen, ask.skip, ask.prompts, ask.keys)


# ── answers ──────────────────────────────────────────────────────────────────────────────────────────────────


def answering(number: int, result: PoolingResult) -> tuple[Answer, bytes]:
    """A result as a frame and its body."""
    forms = [(row.dtype.name, row.shape) for row in result.rows]
    if forms.count(forms[0]) == len(forms):
        del forms[1:]
    timings = result.timings
    head = Answer(number, timings.queue, timings.forward, result.cached, len(result.rows), forms)
    return head, b"".join([row.tobytes() for row in result.rows])


def answered(answer: Answer, body: bytes, token_ids: list[list[int]]) -> PoolingResult:
    """The result for the prompts of `token_ids`. Its rows are views of `body`, and can be read only."""
    rows: list[NDArray[Any]] = []
    offset = 0
    for name, shape in answer.forms if len(answer.forms) > 1 else repeat(answer.forms[0], answer.count):
        dtype = np.dtype(_DTYPES.get(name, name))
        rows.append(np.ndarray(shape, dtype, buffer=body, offset=offset))
        offset += prod(shape) * dtype.itemsize
    return PoolingResult(rows, token_ids, Timings(0.0, answer.queue, answer.forward), answer.cached)


# ── errors ───────────────────────────────────────────────────────────────────────────────────────────────────


def failing(number: int, error: Exception) -> Failed:
    """An error as a frame."""
    if not isinstance(error, EngineError):  # a fault of ours: its reader is the log
        return Failed(number, None, ["".join(format_exception(error))], {}, None)
    cause = error.__cause__
    told = None if cause is None else "".join(format_exception(cause))
    return Failed(number, type(error).__name__, list(error.args), vars(error), told)


def failed(frame: Failed) -> Exception:
    """The error, to be raised."""
    if frame.name is None:
        return RuntimeError(*frame.args)
    error = _family(EngineError)[frame.name](*frame.args)
    vars(error).update(frame.facts)
    if frame.cause is not None:
        error.__cause__ = RuntimeError(frame.cause)
    return error


def _family(cls: type[EngineError]) -> dict[str, type[EngineError]]:
    found = {cls.__name__: cls}
    for child in cls.__subclasses__():
        found |= _family(child)
    return found
