"""Alibaba-NLP's NewModel: gte-*-en-v1.5, gte-multilingual-base and -reranker-base, snowflake-arctic-embed-m-v2.0."""

from __future__ import annotations

from typing import Any

from carpool.engine.dialects.dialect import Config, Dialect, expect, renamed_classes
from carpool.engine.errors import ConfigError

_USUAL: dict[str, tuple[object, ...]] = {
    "position_embedding_type": ("rope", None),
    "layer_norm_type": ("layer_norm", None),
    "logn_attention_scale": (False, None),
}
_SPENT = ("auto_map", "position_embedding_type", "layer_norm_type", "rope_theta", "rope_scaling", "pack_qkv")


def _speaks(config: Config) -> bool:
    """Under the name "gte" it is transformers' own class as well, which always writes rope_parameters."""
    kind = config.get("model_type")
    return kind == "new" or (kind == "gte" and "rope_parameters" not in config)


def _translate(config: Config) -> dict[str, Any]:
    expect(config, "GTE", _USUAL)
    return {
        **{key: value for key, value in config.items() if key not in _SPENT},
        "model_type": "gte",
        "architectures": renamed_classes(config, "New", "Gte"),
        "rope_parameters": _rope(config),
    }


def _rope(config: Config) -> dict[str, Any]:
    """Its "ntk" multiplies the base by f and divides each frequency by f^(2/D): linear scaling does that.

    Since version 5 transformers writes base and scaling into one, as `rope_parameters`.
    """
    both = config.get("rope_parameters") or {}
    theta = float(both.get("rope_theta") or config.get("rope_theta", 10_000))
    scaling = config.get("rope_scaling") or both
    kind = scaling.get("type") or scaling.get("rope_type") or "default"
    if kind == "default":
        return {"rope_type": "default", "rope_theta": theta}
    factor = float(scaling.get("factor") or 0)
    if kind != "ntk" or scaling.get("mixed_b") is not None or factor < 1:
        raise ConfigError(
            f"config.json has rope_scaling {dict(scaling)}, and carpool's GTE knows only type 'ntk' without mixed_b "
            "and with a factor of 1 or more: this checkpoint cannot be served without the code it was published with."
        )
    head_size = int(config["hidden_size"]) // int(config["num_attention_heads"])
    return {
        "rope_type": "linear",
        "rope_theta": theta * factor,
        "factor": factor ** (2 / head_size),
        "original_max_position_embeddings": config[
            "max_position_embeddings"
        ],  # it is not made longer by this
    }


GTE = Dialect("gte", _speaks, _translate)
