"""Changes: what may be changed of a model while it serves, and how its process tells others. Pure."""

from __future__ import annotations

from msgspec import Struct, json


class LoadAdapter(Struct, frozen=True, tag=True):
    """Put the PEFT folder at `path` beside the model as `name`; `replace`s one of that name. With `once` there is
    nothing to do where it is there, from that path.
    """

    name: str
    path: str
    replace: bool = False
    once: bool = False


class UnloadAdapter(Struct, frozen=True, tag=True):
    """Nobody may ask for `name` any more; those who have are still answered."""

    name: str


class ResetCaches(Struct, frozen=True, tag=True):
    """Nothing that was computed before is used again: keys and values of beginnings, and results."""


Change = LoadAdapter | UnloadAdapter | ResetCaches
_decoder: json.Decoder[Change] = json.Decoder(Change)


def written(change: Change) -> str:
    return json.encode(change).decode()


def read(text: str) -> Change:
    """Raises ValueError for what is none."""
    return _decoder.decode(text)
