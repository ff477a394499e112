"""nomic's BERT in its published keys: nomic-embed-text-v1 and v1.5, CodeRankEmbed, snowflake-arctic-embed-m-long."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from carpool.engine.dialects.dialect import Config, Dialect, expect

_GATES = {"swiglu": "silu", "geglu": "gelu", "glu": "sigmoid"}
# What both of nomic's dialects have in common: values, and each of their names and ours.
USUAL: dict[str, tuple[object, ...]] = {
    "causal": (False, None),
    "norm_mlp": (False, None),
    "parallel_block": (False, None),
    "prenorm": (False, None),
    "rotary_emb_fraction": (1,),
    "rotary_emb_interleaved": (False, None),
    "rotary_emb_scale_base": (None,),
    "use_rms_norm": (False, None),
}
KEYS = {
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
    "layer_norm_epsilon": "layer_norm_eps",
}
_USUAL: dict[str, tuple[object, ...]] = {
    **USUAL,
    "activation_function": tuple(_GATES),
    "mlp_fc1_bias": (False,),
    "mlp_fc2_bias": (False,),
    "qkv_proj_bias": (False,),
    "rotary_head_dim": (False, None),
}
_SPENT = ("auto_map", "n_inner", "n_positions", "rotary_emb_base", "rotary_scaling_factor")
_TRAINED = 2048  # positions, where config.json does not say


def _speaks(config: Config) -> bool:
    """transformers' own class has the same model_type; mixtures of experts are another dialect."""
    return (
        config.get("model_type") == "nomic_bert"
        and "n_embd" in config
        and not config.get("moe_every_n_layers")
    )


def _translate(config: Config) -> dict[str, Any]:
    expect(config, "nomic BERT", {**_USUAL, "num_heads_kv": (None, config["n_head"])})
    shared = in_our_words(config, _USUAL, KEYS)
    return {
        **shared,
        "hidden_act": _GATES[config["activation_function"]],
        "intermediate_size": _rounded_up(int(config["n_inner"]), 256),
        "pad_token_id": config.get("pad_token_id") or 0,
        "rope_parameters": config.get("rope_parameters") or shared["rope_parameters"],
    }


def in_our_words(
    config: Config, usual: Mapping[str, tuple[object, ...]], keys: Mapping[str, str]
) -> dict[str, Any]:
    """`keys` under our names; the vocabulary, positions and rotary embedding; all else without `usual`, as it is.

    Beyond the trained length the published code stretches its rotary embedding by the longest text of a batch, or
    runs on positions it never saw: nothing is served there, whatever the sentence-transformers files allow.
    """
    spent = {*_SPENT, *usual, *keys}
    trained = int(config.get("max_trained_positions") or _TRAINED)
    positions = int(config.get("n_positions") or 0)
    return {
        **{key: value for key, value in config.items() if key not in spent},
        **{ours: config[theirs] for theirs, ours in keys.items()},
        "vocab_size": _rounded_up(int(config["vocab_size"]), int(config.get("pad_vocab_size_multiple") or 1)),
        "max_position_embeddings": min(positions, trained) if positions > 0 else trained,
        "max_trained_positions": trained,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": float(config.get("rotary_emb_base", 10_000)),
        },
    }


def _rounded_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


NOMIC = Dialect("nomic", _speaks, _translate)
