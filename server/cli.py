"""The `carpool` command: the only reader of argv and of the environment."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from threading import Timer
from typing import Any, Literal, NoReturn, get_args, get_origin

import structlog
import uvloop

from carpool import __version__
from carpool.engine.errors import ConfigError
from carpool.server import logs
from carpool.server.config import ServerConfig
from carpool.server.options import ENGINE_OPTIONS, SERVER_OPTIONS, Option, build_config, nearest
from carpool.server.sources import (
    CONFIG_FILE,
    Settings,
    from_arguments,
    from_environment,
    from_yaml,
    merged,
    refuse_ambiguous,
    unread,
)

log = structlog.get_logger()

USAGE_ERROR = 2
FAILURE = 1
INTERRUPTED = 130  # what a shell says of one whom Ctrl-C ended
LEAVE_SECONDS = 5.0  # for threads to end once all is answered or given up
SUMMARY = """\
usage: carpool serve [MODEL] [options]
       carpool serve --help
       carpool --version
"""


def main() -> NoReturn:
    _open_what_was_closed()
    try:
        sys.exit(run(sys.argv[1:], os.environ))
    except KeyboardInterrupt:  # before the server listens for signals, or a second one
        sys.exit(INTERRUPTED)


def _open_what_was_closed() -> None:
    """Started without standard streams, as by `2>&-`: else the first socket would be taken for one of them."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))


def run(arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """The exit status of one call of the command."""
    match list(arguments):
        case ["--version" | "-V" | "-v"]:
            print(f"carpool {__version__}")
        case [] | ["--help" | "-h"]:
            print(SUMMARY, end="")
        case ["serve", *rest] if any(word.partition("=")[0] in ("--help", "-h") for word in rest):
            print(help_text(), end="")
        case ["serve", *rest]:
            return _serve(rest, environment)
        case [unknown, *_]:
            guess = nearest(unknown, ("serve", "--version", "--help"))
            return _complain(f"Unknown command {unknown}; did you mean {guess}?", USAGE_ERROR)
    return 0


def _serve(arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    try:
        config, sources = read_config(arguments, environment)
    except ConfigError as error:
        return _complain(str(error), USAGE_ERROR)
    logs.set_up(config.log_level, config.log_format)
    _say_what_was_passed_over(sources)
    try:
        asked_to_stop = _run(config)
    except ConfigError as error:
        return _complain(str(error), FAILURE)
    return 0 if asked_to_stop else FAILURE


def read_config(
    arguments: Sequence[str], environment: Mapping[str, str]
) -> tuple[ServerConfig, list[Settings]]:
    """The configuration, and its sources in rising order of precedence."""
    from_outside = from_environment(environment)
    sources = [from_outside, from_arguments(arguments)]
    paths = [settings.values.pop(CONFIG_FILE.name, None) for settings in sources]
    if path := paths[1] or paths[0]:
        sources.insert(0, from_yaml(path))
    refuse_ambiguous(sources)
    values = merged(sources)
    from_outside.deprecated += unread(environment, values)
    return build_config(values), sources


def _run(config: ServerConfig) -> bool:
    # Here and not above, so that --help and mistakes do not wait for torch.
    from carpool.engine.async_engine import AsyncEngine
    from carpool.server.lifespan import serve

    async def served() -> bool:
        asked_to_stop = await serve(config, AsyncEngine(config.engine))
        _end_in_any_case(0 if asked_to_stop else FAILURE)
        return asked_to_stop

    return uvloop.run(served())


def _end_in_any_case(status: int) -> None:
    """A thread may be busy yet with what nobody waits for any more, such as a text of many megabytes or a template that
    never ends, and Python would wait for it.
    """
    end = Timer(LEAVE_SECONDS, os._exit, [status])
    end.daemon = True
    end.start()


def _say_what_was_passed_over(sources: Sequence[Settings]) -> None:
    for settings in sources:
        for sentence in settings.deprecated:
            log.warning(sentence)
    if ignored := sorted({flag for settings in sources for flag in settings.ignored}):
        log.warning("options without meaning here were ignored", options=", ".join(ignored))


def _complain(sentence: str, status: int) -> int:
    print(f"carpool: {sentence}", file=sys.stderr)
    return status


def help_text() -> str:
    """Made from the configuration's fields, as the flags themselves are."""
    blocks = [
        SUMMARY,
        "Serve a pooling model over HTTP. Every option may also stand in the environment as CARPOOL_<NAME>\n"
        "or in the --config file; the command line wins over the environment, and that over the file.\n",
        "Server:",
        *(_help_entry(option) for option in (CONFIG_FILE, *SERVER_OPTIONS.values())),
        "\nModel and engine:",
        *(_help_entry(option) for option in ENGINE_OPTIONS.values()),
    ]
    return "\n".join(blocks) + "\n"


def _help_entry(option: Option) -> str:
    name = option.flag
    if option.is_switch:
        name = f"{option.flag}, --no-{option.flag.removeprefix('--')}"
    elif get_origin(option.type) is Literal:
        name = f"{option.flag} {{{','.join(get_args(option.type))}}}"
    elif option.is_object:
        name = f"{option.flag} JSON, {option.flag}.KEY VALUE"
    else:
        name = f"{option.flag} {option.name.rpartition('_')[2].upper()}{' …' if option.several else ''}"
    default = option.shown or _default_text(option.default)
    return f"  {name}\n      {option.help}{f' (default: {default})' if default else ''}"


def _default_text(default: Any) -> str:
    match default:
        case bool():
            return "yes" if default else "no"
        case int() | float() | str():
            return str(default)
        case tuple():
            return ", ".join(map(str, default))
    return ""
