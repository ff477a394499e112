"""Checkpoints that would load and answer wrongly: refused with the reason, before anything is loaded.

Some have code of their own that computes what no class here does; of some, transformers' class does not answer a text
by itself alone.
"""

from __future__ import annotations

from typing import Any

from carpool.engine.dialects.dialect import Config, Dialect
from carpool.engine.errors import ConfigError


def _speaks_gritlm(config: Config) -> bool:
    code = (config.get("auto_map") or {}).values()
    return any("gritlm" in str(name).lower() for name in code)


def _refuse_gritlm(config: Config) -> dict[str, Any]:
    raise ConfigError(
        "GritLM looks both ways when it embeds and leaves its instruction out of the mean, by code that the checkpoint "
        "brings along and that is not run: carpool cannot serve it."
    )


def _speaks_nv_embed(config: Config) -> bool:
    return config.get("model_type") == "nvembed"


def _refuse_nv_embed(config: Config) -> dict[str, Any]:
    raise ConfigError(
        "NV-Embed pools by a latent attention layer that only the code which the checkpoint brings along computes, and "
        "that is not run: carpool cannot serve it."
    )


def _refuse_big_bird(config: Config) -> dict[str, Any]:
    raise ConfigError(
        "BigBird attends to some blocks only until transformers' class meets a short text, and to everything from then "
        "on: what it answers would hang on what was asked before. Serve it with all attention, which is the same for "
        """short texts: --hf-overrides '{"attention_type": "original_full"}'."""
    )


def _refuse_reformer(config: Config) -> dict[str, Any]:
    raise ConfigError(
        "Reformer chooses what a token looks at by random hashes: it answers the same text otherwise each time, and "
        "carpool cannot serve it."
    )


BIG_BIRD = Dialect(
    "big-bird",
    lambda config: config.get("model_type") == "big_bird" and config.get("attention_type") != "original_full",
    _refuse_big_bird,
)
REFORMER = Dialect(
    "reformer",
    lambda config: config.get("model_type") == "reformer" and "lsh" in (config.get("attn_layers") or ["lsh"]),
    _refuse_reformer,
)
GRITLM = Dialect("gritlm", _speaks_gritlm, _refuse_gritlm)
NV_EMBED = Dialect("nv-embed", _speaks_nv_embed, _refuse_nv_embed)
