"""The engine's closed family of errors. No HTTP inside: `server/errors.py` maps each leaf to a status.

EngineError
├── InvalidInput            the caller's fault; the message is shown verbatim
│   ├── EmptyInput          no prompt, or a prompt of no tokens
│   ├── InputTooLong        more tokens than the model takes
│   ├── TokenOutOfVocabulary
│   ├── InvalidParameter    a value the model cannot honour (dimensions, truncation)
│   ├── UnknownAdapter      none of that name is loaded, or it no longer is
│   └── UnsupportedTask     the model has no such head
├── Unavailable             nobody's fault now; try again later
│   ├── NotReady            still loading
│   ├── Draining            shutting down
│   ├── Overloaded          the queue is as long as it may be
│   └── EngineDead          a worker is lost; only a restart helps
├── DeadlineExceeded        the request's own time ran out
└── InferenceFailed         the model broke on this input
    └── Undone              … or on another of its batch; it is run again, and nobody is told

ConfigError stands apart: it is raised before the engine lives, to whoever started it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

_PROMPT = re.compile(r"input(?:\[(\d+)\])?")


class ConfigError(ValueError):
    """The engine cannot be built as asked: one sentence that says what to change."""


class EngineError(Exception):
    """Base of all that can go wrong once the engine is up."""


class InvalidInput(EngineError, ValueError):
    """The request cannot be served as it is. `param` names the field to blame, if one is.

    A ValueError, too: scripts written for the reference expect one.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param

    def blaming(self, names: Seq[str]) -> InvalidInput:
        """The same error; where it names a prompt, `input` or `input[i]`, by what its caller calls that prompt."""
        if place := _PROMPT.fullmatch(self.param or ""):
            self.param = names[int(place[1] or 0)]
        return self


class EmptyInput(InvalidInput):
    """Nothing to run the model on."""


class InputTooLong(InvalidInput):
    """More tokens than the model, or the caller's own limit, allows. `REMEDY` is what a message says to set."""

    REMEDY = "truncate_prompt_tokens to -1"


class TokenOutOfVocabulary(InvalidInput):
    """A token id the model has no embedding for."""


class InvalidParameter(InvalidInput):
    """A well-formed value that this model cannot honour."""


class UnknownAdapter(InvalidInput):
    """No adapter of this name is loaded, or it no longer is."""


class UnsupportedTask(InvalidInput):
    """The model has no head for this task."""


class Unavailable(EngineError):
    """Not now. `retry_after` is in seconds."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class NotReady(Unavailable):
    """The model is still loading."""


class Draining(Unavailable):
    """The engine finishes what it has accepted and takes no more."""


class Overloaded(Unavailable):
    """Admission refused: too many tokens wait already."""


class EngineDead(Unavailable):
    """A worker died or hangs; the process is about to exit for its supervisor to restart."""


class DeadlineExceeded(EngineError):
    """The request's own deadline passed before its answer was ready."""


class InferenceFailed(EngineError):
    """The model raised, or produced a number that is not finite. The log has the details."""

    def anew(self) -> InferenceFailed:
        """The same for another request: raising an error writes to it, so that each needs its own."""
        failure = InferenceFailed(*self.args)
        failure.__cause__ = self.__cause__
        return failure


class Undone(InferenceFailed):
    """It was run in a batch that failed, beside others whose keys it may have read: to be run again, alone."""


def first_line(error: Exception) -> str:
    """What an error says, without what libraries append; its class's name if it says nothing.

    A first line that ends in a colon has the next one to say what it announces. Of a pickle that holds more than
    tensors torch says how to run it all the same: that is not handed on.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if "weights_only" in lines[0] or "Weights only" in lines[0]:
        return "it is a pickle that holds more than tensors, and could run code: have it saved as safetensors"
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
