"""Write the generated parts of the docs anew: `./dev docs`. What lies between the markers is made from the code.

<!-- generated: NAME -->
…
<!-- end -->
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

from carpool.engine.config import PoolerConfig
from carpool.engine.reference_options import ONE_ONLY, REFUSED, WITHOUT_MEANING
from carpool.server.options import ENGINE_OPTIONS, SERVER_OPTIONS, Option, options_of

DOCS = Path(__file__).resolve().parent
_BLOCK = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def options_table(options: Iterable[Option]) -> str:
    rows = [
        f"| `{option.flag}` | {_values(option)} | {_default(option)} | {option.help} |" for option in options
    ]
    return "\n".join(["| flag | value | default | meaning |", "|---|---|---|---|", *rows])


def pooler_table() -> str:
    rows = [f"| `{o.name}` | {_values(o)} | {o.help} |" for o in options_of(PoolerConfig).values()]
    return "\n".join(["| key | value | meaning |", "|---|---|---|", *rows])


def ignored_list() -> str:
    names = sorted({*WITHOUT_MEANING, *ONE_ONLY.values()})
    return ", ".join(f"`--{name.replace('_', '-')}`" for name in names) + "."


def refused_table() -> str:
    flags: dict[str, list[str]] = {}  # by what is said of them
    for name in sorted(REFUSED):
        flags.setdefault(REFUSED[name], []).append(f"`--{name.replace('_', '-')}`")
    rows = [f"| {', '.join(names)} | {instead} |" for instead, names in flags.items()]
    return "\n".join(["| flag | instead |", "|---|---|", *rows])


def _values(option: Option) -> str:
    if option.is_switch:
        return f"switch, or `--no-{option.flag[2:]}`"
    if get_args(option.type) and get_origin(option.type) is not tuple and not option.is_object:
        return ", ".join(f"`{value}`" for value in get_args(option.type))
    if option.is_object:
        return "JSON, or dotted"
    if option.is_list:
        return "one or more"
    if option.unit == "bytes":
        return "size"
    return {int: "integer", float: "number"}.get(option.type, "text")


def _default(option: Option) -> str:
    if option.shown:
        return option.shown
    default: Any = option.default
    if default is None or default == () or default == "" or option.is_object:
        return ""
    shown = default if isinstance(default, tuple) else [default]
    return ", ".join(f"`{str(item).lower() if isinstance(item, bool) else item}`" for item in shown)


BLOCKS: Mapping[str, Callable[[], str]] = {
    "server_options": lambda: options_table(SERVER_OPTIONS.values()),
    "engine_options": lambda: options_table(ENGINE_OPTIONS.values()),
    "pooler_options": pooler_table,
    "ignored_options": ignored_list,
    "refused_options": refused_table,
}


def generate(text: str) -> str:
    """`text` with every generated block made anew."""
    return _BLOCK.sub(lambda block: f"{block[1]}{BLOCKS[block[2]]()}\n{block[3]}", text)


def main() -> None:
    for path in sorted(DOCS.glob("*.md")):
        old = path.read_text(encoding="utf-8")
        new = generate(old)
        if new != old:
            path.write_text(new, encoding="utf-8")
            print(f"docs: wrote {path.name}", file=sys.stderr)


if __name__ == "__main__":
    main()
