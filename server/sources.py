"""Where options come from: the command line, the environment, a YAML file. Each becomes one `Settings`."""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from carpool.engine.errors import ConfigError
from carpool.engine.reference_options import (
    ASKS_NOTHING,
    ONE_ONLY,
    REFUSED,
    WITHOUT_MEANING,
    Follows,
    refuse,
    require_one,
)
from carpool.server.options import OPTIONS, Option, flag_of, nearest, read_object
from carpool.server.reference_flags import (
    MODEL_KEYS,
    OLD_NAMES,
    OPPOSITES,
    OTHER_NAMES,
    refuse_generation,
    runner_and_convert,
)

ENVIRONMENT_PREFIX = "CARPOOL_"
MODEL_ELSEWHERE = ("MODEL_ID", "INFINITY_MODEL_ID")  # where TEI and Infinity look
REFERENCE_KEYS = ("VLLM_API_KEY", "INFINITY_API_KEY")  # who has set one believes the server guarded
REFERENCE_SWITCHES = {  # what an operator has to say there, and here
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "allow_runtime_lora_updating",
    "VLLM_SERVER_DEV_MODE": "allow_cache_reset",
}
# What Kubernetes puts into every pod for a Service named carpool, or carpool-something: names, and what they hold.
_PORT, _HOST, _URL = "[0-9]+", "[0-9a-fA-F.:]+", r"(tcp|udp|sctp)://\S+"
KUBERNETES = re.compile(
    "CARPOOL_([A-Z0-9_]+_)?("
    f"SERVICE_HOST={_HOST}|SERVICE_PORT(_[A-Z0-9_]+)?={_PORT}|PORT={_URL}|"
    f"PORT_[0-9]+_(TCP|UDP|SCTP)(={_URL}|_PROTO=(tcp|udp|sctp)|_PORT={_PORT}|_ADDR={_HOST}))"
)
CONFIG_FILE = Option("config", str, None, "YAML file of options, each named as its flag, with - or _.")
KNOWN = {**OPTIONS, "config": CONFIG_FILE}
NOTHING = ("", "None")  # what scripts write for an option that they leave to its default


@dataclass(slots=True)
class Settings:
    """Raw values by option name, as one source gives them, and what is to be said about them."""

    kind: str  # "flag", "environment variable", "key in FILE": for messages
    spell: Callable[[str], str]  # how this source writes an option's name
    values: dict[str, Any] = field(default_factory=dict)
    deprecated: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    # A flag that took several words, and the last of them, which may be MODEL.
    swallowed: tuple[str, str] | None = None

    def put(self, written: str, raw: Any) -> None:
        """Take in one value under the name it was written with."""
        name, _, path = normal(written).partition(".")
        name = OTHER_NAMES.get(name, name)
        if name in OLD_NAMES:
            self.deprecated.append(f"{flag_of(name)} is deprecated; use {flag_of(OLD_NAMES[name])}.")
            name = OLD_NAMES[name]
        if name in MODEL_KEYS:
            if raw in NOTHING:
                return
            self.deprecated.append(f"{flag_of(name)} is deprecated; use --hf-overrides.{name}.")
            name, path = "hf_overrides", f"{name}.{path}" if path else name
        option = KNOWN.get(name)
        if path and option and option.is_object:
            self._put_at(name, path.split("."), raw)
        elif option and not path:
            self._put_option(option, raw)
        elif not self._put_foreign(name, raw):
            raise ConfigError(f"Unknown {self.kind} {self.spell(written)}; did you mean {self._guess(name)}?")

    def _put_option(self, option: Option, raw: Any) -> None:
        if raw in NOTHING and (option.default is None or option.is_object):
            raw = {} if option.is_object else None
        elif option.is_object:
            raw = _joined(self.values.get(option.name, {}), read_object(option.flag, raw))
        elif option.is_list:
            raw = self.values.get(option.name, []) + _read_list(option, raw)
        elif option.name in ("runner", "convert"):
            refuse_generation(option.name, raw)
        elif option.name == "model" and self.values.get("model", raw) != raw:
            raise ConfigError("One server serves one model, and two are named: start a server for each.")
        self.values[option.name] = raw

    def _put_at(self, name: str, path: list[str], raw: Any) -> None:
        """One key of an object: `--hf-overrides.is_matryoshka true`; `KEY+ 1,2` adds to a list."""
        place = self.values.setdefault(name, {})
        for key in path[:-1]:
            place = place.setdefault(key, {})
            if not isinstance(place, dict):
                raise ConfigError(f"{self.spell(name)} has a value at {key} and cannot have keys below it.")
        key = path[-1].removesuffix("+")
        if key == path[-1]:
            place[key] = _json_or_word(raw)
        elif isinstance(place.setdefault(key, []), list):
            place[key] += map(_json_or_word, raw if isinstance(raw, list) else str(raw).split(","))
        else:
            raise ConfigError(f"{self.spell(name)} has a value at {key} that is no list to add to.")

    def _put_foreign(self, name: str, raw: Any) -> bool:
        """A name that is not an option of ours but means something; False if it does not."""
        positive = name.removeprefix("no_")
        if name == "task":
            self.deprecated.append("--task is deprecated; use --runner and --convert.")
            self.values |= runner_and_convert(raw)
        elif name in ONE_ONLY:
            require_one(name, raw)
            self.ignored.append(flag_of(ONE_ONLY[name]))
        elif name in WITHOUT_MEANING or WITHOUT_MEANING.get(positive) == "nothing":
            self.ignored.append(flag_of(name))
        elif positive in REFUSED:
            if positive == name:
                refuse(name, raw)
            self.ignored.append(flag_of(name))
        elif positive in OPPOSITES:
            ours = OPPOSITES[positive]
            self.values[ours] = OPTIONS[ours].read(raw) == (positive != name)
        elif positive != name and positive in OPTIONS and OPTIONS[positive].is_switch:
            self.values[positive] = not OPTIONS[positive].read(raw)
        else:
            return False
        return True

    def _guess(self, name: str) -> str:
        switches = (f"no_{option.name}" for option in OPTIONS.values() if option.is_switch)
        return self.spell(nearest(name, [*KNOWN, *switches, *("help",) * (self.kind == "flag")]))


def refuse_ambiguous(sources: Iterable[Settings]) -> None:
    """`--served-model-name A B` and no MODEL anywhere: B was meant for it, more likely than for a name."""
    sources = list(sources)
    if any("model" in settings.values for settings in sources):
        return
    for settings in sources:
        if settings.swallowed is not None:
            flag, word = settings.swallowed
            raise ConfigError(
                f"{flag} took {word} for one of its values, and no MODEL is given. Write MODEL before {flag}, "
                f"or {flag} before each value."
            )


def normal(written: str) -> str:
    """`max-model-len` → `max_model_len`; keys behind a dot stay as they are."""
    name, dot, path = written.partition(".")
    return name.replace("-", "_").lower() + dot + path


def _json_or_word(raw: Any) -> Any:
    """What JSON text says; a word without quotes, and YAML's own value, as it is."""
    try:
        return json.loads(raw)
    except (TypeError, ValueError):
        return raw


def _read_list(option: Option, raw: Any) -> list[Any]:
    """One value, several as a JSON list, or what YAML made of it."""
    if isinstance(raw, str) and raw.startswith("["):
        try:
            raw = json.loads(raw)
        except ValueError:
            raise ConfigError(f"{option.flag} starts like a JSON list and is none.") from None
    return raw if isinstance(raw, list) else [raw]


def from_arguments(arguments: Iterable[str]) -> Settings:
    settings = Settings("flag", flag_of)
    words = deque(arguments)
    last = ""  # the flag before
    while words:
        word = re.sub(r"^-O(?=\d)", "-O=", words.popleft())  # as compilers take it
        if word.startswith("-"):
            name, given, value = word.lstrip("-").partition("=")
            following = value if given else _following(normal(name), word, words)
            settings.put(name, following)
            last = normal(name)
            if isinstance(following, list) and len(following) > 1 and "model" not in settings.values:
                settings.swallowed = (word, following[-1])
        elif "model" not in settings.values:
            if last in OPTIONS and OPTIONS[last].is_list and not _is_plainly_a_model(word):
                # Not shown: it may be a key, and a model's name is told to the hub.
                raise ConfigError(
                    f"Is the second word after {flag_of(last)} one of its values, or MODEL? Write MODEL before "
                    f"{flag_of(last)}, or {flag_of(last)} before each value."
                )
            settings.put("model", word)
            last = ""  # `--api-key A MODEL B`: is B a key, too?
        elif last in OPTIONS and OPTIONS[last].is_list:
            settings.put(last, word)  # `MODEL --api-key A B`, as the reference takes it
        else:
            raise ConfigError(f"Unexpected argument {word}: the model is given already.")
    return settings


def _is_plainly_a_model(word: str) -> bool:
    return "/" in word or Path(word).exists()


def _following(name: str, word: str, words: deque[str]) -> Any:
    """What belongs to the flag `word` of the words after it."""
    follows = _follows(name)
    if follows == "values":
        values = []
        while words and not words[0].startswith("-"):
            values.append(words.popleft())
        if values:
            return values
    elif follows == "nothing":
        return words.popleft() if words and words[0].lower() in ("true", "false", "none") else True
    elif words and not words[0].startswith("--"):
        return words.popleft()
    raise ConfigError(f"{word} needs a value.")


def _follows(name: str) -> Follows:
    """Also "nothing" for names nobody knows, which `Settings.put` is about to refuse."""
    head = name.partition(".")[0]
    head = OTHER_NAMES.get(head, head)
    option = KNOWN.get(OLD_NAMES.get(head, head))
    if option is None:
        known = head == "task" or head in ONE_ONLY or head in MODEL_KEYS or head in ASKS_NOTHING
        return "a value" if known else WITHOUT_MEANING.get(head, "nothing")
    if option.is_switch:
        return "nothing"
    return "values" if option.several else "a value"


def from_environment(environment: Mapping[str, str]) -> Settings:
    settings = Settings("environment variable", lambda name: ENVIRONMENT_PREFIX + name.upper())
    for variable, value in environment.items():
        if not variable.startswith(ENVIRONMENT_PREFIX) or _is_of_kubernetes(variable, value):
            continue
        name = normal(variable.removeprefix(ENVIRONMENT_PREFIX))
        option = OPTIONS.get(name)
        if option and option.is_list and not value.startswith(("[", "{")):
            settings.put(name, [item.strip() for item in value.split(",")])
        else:
            settings.put(name, value)
    theirs = next((key for key in REFERENCE_KEYS if environment.get(key)), None)
    if theirs and "api_key" not in settings.values:
        settings.deprecated.append(f"{theirs} is taken for CARPOOL_API_KEY; set that.")
        settings.values["api_key"] = [environment[theirs]]
    for switch, ours in REFERENCE_SWITCHES.items():
        if environment.get(switch, "").strip().lower() in ("1", "true") and ours not in settings.values:
            settings.deprecated.append(f"{switch} is taken for {ENVIRONMENT_PREFIX}{ours.upper()}; set that.")
            settings.values[ours] = True
    return settings


def unread(environment: Mapping[str, str], values: Mapping[str, Any]) -> list[str]:
    """What TEI or Infinity would have taken from there and nobody has said here; `values` are all that was said."""
    notices = []
    if not values.get("model"):
        notices += [
            f"{name} is not read here; give MODEL, or set CARPOOL_MODEL."
            for name in MODEL_ELSEWHERE
            if environment.get(name)
        ]
    # By itself API_KEY may be anyone's.
    if environment.get("MODEL_ID") and environment.get("API_KEY") and not values.get("api_key"):
        notices.append("API_KEY is not read here, and anyone may ask; set CARPOOL_API_KEY.")
    return notices


def _is_of_kubernetes(variable: str, value: str) -> bool:
    return KUBERNETES.fullmatch(f"{variable}={value}") is not None


def from_yaml(path: str) -> Settings:
    try:
        document = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"Cannot read --config {path}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeError) as error:
        raise ConfigError(f"--config {path} is not valid YAML.") from error
    if not isinstance(document, dict | None):
        raise ConfigError(f"--config {path} must hold keys and values.")
    settings = Settings(f"key in {path}:", str)
    for key, value in (document or {}).items():
        if value is not None:
            settings.put(str(key), value)
    return settings


def merged(sources: Iterable[Settings]) -> dict[str, Any]:
    """Later sources win; objects are merged key by key, and so are those in them."""
    values: dict[str, Any] = {}
    for settings in sources:
        for name, raw in settings.values.items():
            values[name] = _joined(values.get(name, {}), raw) if isinstance(raw, dict) else raw
    return values


def _joined(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    both = {
        key: _joined(old[key], new[key])
        for key in old.keys() & new.keys()
        if isinstance(old[key], dict) and isinstance(new[key], dict)
    }
    return {**old, **new, **both}
