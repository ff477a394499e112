"""JSON files of a model folder."""

from __future__ import annotations

import json
from pathlib import Path
from stat import S_ISREG
from typing import Any

from carpool.engine.errors import ConfigError

_MOST_BYTES = 64 << 20  # the index of a model in a thousand files has some millions


def parsed(path: Path, **options: Any) -> Any:
    """What `path` holds; `options` are those of `json.loads`. Raises OSError or ValueError.

    A folder may come from a client: what a pipe or a device stands for would be waited for, or read, without end.
    """
    found = path.stat()
    if not S_ISREG(found.st_mode):
        raise OSError("it is no file")
    if found.st_size > _MOST_BYTES:
        raise ValueError(f"it has {found.st_size} bytes")
    try:
        return json.loads(path.read_text(encoding="utf-8"), **options)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: Path, *, optional: bool = False, kind: type = dict) -> Any:
    """The value in `path`, of that kind; an empty one if the file may be missing and is."""
    try:
        value = parsed(path, object_hook=_endless)
    except FileNotFoundError:
        if optional:
            return kind()
        raise ConfigError(
            f"{path.parent} has no {path.name}, so it is not a model folder carpool can read."
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, kind):
        raise ConfigError(f"{path} should hold a JSON {'list' if kind is list else 'object'}.")
    return value


def _endless(value: dict[str, Any]) -> Any:
    """JSON has no infinity and no NaN: transformers writes them as an object of one key."""
    return float(value["__float__"]) if value.keys() == {"__float__"} else value
