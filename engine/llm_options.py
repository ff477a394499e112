"""What is given to LLM() as keywords, as the engine's configuration."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import fields, replace
from difflib import get_close_matches
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from carpool.engine.config import CONVERT_OF_TASK, EngineConfig, PoolerConfig, check_kinds
from carpool.engine.errors import ConfigError, first_line
from carpool.engine.hub import locate
from carpool.engine.reference_options import ONE_ONLY, REFUSED, WITHOUT_MEANING, refuse, require_one


def config_of(model: str, task: str | None, options: Mapping[str, Any]) -> EngineConfig:
    """Raises ConfigError; for unknown options with the name of the nearest one."""
    for name, value in options.items():
        if name in ONE_ONLY:
            require_one(name, value)
        if name in REFUSED:
            refuse(name, value)
    elsewhere = {*WITHOUT_MEANING, *ONE_ONLY, *REFUSED, "served_model_name"}  # a server's clients go by it
    given = {name: value for name, value in options.items() if name not in elsewhere}
    if "override_pooler_config" in given:
        given["pooler_config"] = given.pop("override_pooler_config")
    if options.get("enable_lora"):
        given.setdefault("allow_runtime_lora_updating", True)
    if task is not None:
        if task not in CONVERT_OF_TASK:
            raise ConfigError(f"task={task!r} is not one of {', '.join(CONVERT_OF_TASK)}.")
        given.setdefault("convert", CONVERT_OF_TASK[task])
    _check_names("LLM()", given, EngineConfig)
    if isinstance(given.get("pooler_config"), Mapping):
        _check_names("pooler_config", given["pooler_config"], PoolerConfig)
        given["pooler_config"] = PoolerConfig(**given["pooler_config"])
    # As in the reference, None leaves an option to its default.
    given = {name: value for name, value in given.items() if value is not None}
    if not isinstance(given.get("pooler_config", PoolerConfig()), PoolerConfig):
        raise ConfigError(f"pooler_config is a dict or a PoolerConfig, not {given['pooler_config']!r}.")
    if isinstance(given.get("dtype"), torch.dtype):
        given["dtype"] = str(given["dtype"]).removeprefix("torch.")
    for field in fields(EngineConfig):
        if given.get(field.name) == "auto" and "auto" in field.metadata:
            given[field.name] = field.metadata["auto"]
    check_kinds(EngineConfig, given)
    given.setdefault("max_queued_tokens", sys.maxsize)  # a script has nowhere else to go with what is refused
    overrides = given.pop("hf_overrides", {})
    config = EngineConfig(model=model, **given)
    return replace(config, hf_overrides=_overrides(overrides, config)) if overrides else config


def _overrides(given: object, config: EngineConfig) -> Mapping[str, Any]:
    """Keys of config.json, or what a function changes in the configuration that transformers makes of it."""
    if isinstance(given, Mapping):
        return given
    if not callable(given):
        raise ConfigError(f"hf_overrides is a dict, or a function of the configuration, not {given!r}.")
    folder = locate(config.model, config.revision, config.download_dir)
    try:
        whole = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # transformers raises whatever went wrong inside
        raise ConfigError(
            "hf_overrides cannot be a function here, for transformers has no configuration of this model: "
            f"give a dict of what is to change ({first_line(error)})."
        ) from error
    before = _as_json(whole)
    changed = given(whole)
    if not isinstance(changed, PreTrainedConfig):
        raise ConfigError(f"The function in hf_overrides must return the configuration, not {changed!r}.")
    return {key: value for key, value in _as_json(changed).items() if before.get(key) != value}


def _as_json(config: PreTrainedConfig) -> dict[str, Any]:
    """As config.json would have it: classes, for one, are numbered by texts there."""
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return values


def _check_names(where: str, given: Mapping[str, Any], config: type) -> None:
    known = [field.name for field in fields(config)]
    for name in given:
        if name not in known:
            near = get_close_matches(name, known, 1)
            raise ConfigError(
                f"{where} has no option {name!r}" + (f"; did you mean {near[0]!r}?" if near else ".")
            )
