"""nomic's BERT in its published keys: nomic-embed-text-v1 and v1.5, CodeRankEmbed, snowflake-arctic-embed-m-long."""

from __future__ import annotations

from typing import Any

from carpool.engine.dialects.dialect import Config, Dialect, expect

_GATES = {"swiglu": "silu", "geglu": "gelu", "glu": "sigmoid"}
_USUAL: dict[str, tuple[object, ...]] = {
    "activation_function": tuple(_GATES),
    "causal": (False, None),
    "mlp_fc1_bias": (False,),
    "mlp_fc2_bias": (False,),
    "norm_mlp": (False, None),
    "parallel_block": (False, None),
    "prenorm": (False, None),
    "qkv_proj_bias": (False,),
    "rotary_emb_fraction": (1,),
    "rotary_emb_interleaved": (False, None),
    "rotary_emb_scale_base": (None,),
    "rotary_head_dim": (False, None),
    "use_rms_norm": (False, None),
}
# Each of their names, and ours.
_KEYS = {
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
    "layer_norm_epsilon": "layer_norm_eps",
}
_SPENT = {"auto_map", "n_inner", "n_positions", "rotary_emb_base", "rotary_scaling_factor", *_USUAL, *_KEYS}
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
    # Beyond the trained length the published code stretches its rotary embedding by the longest text of a batch, or
    # runs on positions it never saw: nothing is served there, whatever the sentence-transformers files allow.
    trained = int(config.get("max_trained_positions") or _TRAINED)
    positions = int(config.get("n_positions") or 0)
    rope = {"rope_type": "default", "rope_theta": float(config.get("rotary_emb_base", 10_000))}
    return {
        **{key: value for key, value in config.items() if key not in _SPENT},
        **{ours: config[theirs] for theirs, ours in _KEYS.items()},
        "hidden_act": _GATES[config["activation_function"]],
        "intermediate_size": _rounded_up(int(config["n_inner"]), 256),
        "vocab_size": _rounded_up(int(config["vocab_size"]), int(config.get("pad_vocab_size_multiple") or 1)),
        "max_position_embeddings": min(positions, trained) if positions > 0 else trained,
        "max_trained_positions": trained,
        "pad_token_id": config.get("pad_token_id") or 0,
        "rope_parameters": config.get("rope_parameters") or rope,
    }


def _rounded_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


NOMIC = Dialect("nomic", _speaks, _translate)
