"""Dialects: config.json files written for code that a checkpoint brings along, put into transformers' own words.

No remote code is run. A dialect is a row: which config.json speaks it, and what that means in the keys of a class that
transformers (or `engine/models/native/`) has. Where the weights have other names as well, `engine/models/renames.py`
has a row of the same name.
"""

from __future__ import annotations

from carpool.engine.dialects.dialect import Config, Dialect

DIALECTS: tuple[Dialect, ...] = ()  # the first that fits


def translate(config: Config) -> tuple[Config, str | None]:
    """`config` in transformers' words, and the name of the dialect it was in; unchanged and None if in none.

    Raises ConfigError for a variant of a known dialect that has no counterpart.
    """
    for dialect in DIALECTS:
        if dialect.speaks(config):
            return dialect.translate(config), dialect.name
    return config, None
