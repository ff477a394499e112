"""Terms: all that a request says beside its prompts and what is to be made of them. Pure."""

from __future__ import annotations

from collections.abc import Callable

from msgspec import Struct


class Terms(Struct, frozen=True, kw_only=True):
    """Made where a request enters, and handed on whole.

    `adapter`: the name of the one to ride on; None is the model's default.
    `client`: whose share of the engine it is charged to. Lower `priority` runs first.
    `deadline`: from when on it is DeadlineExceeded, in the event loop's time, which is that of `time.monotonic`.
    `cache_salt`: what was computed of prompts under one is not used for those under another.
    `on_progress(n)` is told of n more rows done.
    """

    adapter: str | None = None
    client: str = ""
    priority: int = 0
    deadline: float | None = None
    cache_salt: str | None = None
    on_progress: Callable[[int], object] | None = None
