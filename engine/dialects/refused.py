"""Checkpoints whose own code computes what no class here does: refused with the reason, before anything is loaded.

Without a row they would load as the model that their config.json names, and give vectors that are not theirs.
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


GRITLM = Dialect("gritlm", _speaks_gritlm, _refuse_gritlm)
NV_EMBED = Dialect("nv-embed", _speaks_nv_embed, _refuse_nv_embed)
