"""JSON files of a model folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from carpool.engine.errors import ConfigError


def read_json(path: Path, *, optional: bool = False, kind: type = dict) -> Any:
    """The value in `path`, of that kind; an empty one if the file may be missing and is."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_hook=_endless)
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
