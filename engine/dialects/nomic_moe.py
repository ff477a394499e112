"""nomic-ai/nomic-embed-text-v2-moe: nomic's BERT with a mixture of experts in every other layer.

The class is `engine/models/native/nomic_moe.py`, whose weights have the published names.
"""

from __future__ import annotations

from typing import Any

from carpool.engine.dialects.dialect import Config, Dialect, expect

_USUAL: dict[str, tuple[object, ...]] = {
    "activation_function": ("gelu",),
    "causal": (False, None),
    "expert_choice_router": (False, None),
    "ffn_div": (1, None),
    "mlp_fc1_bias": (True,),
    "mlp_fc2_bias": (True,),
    "moe_normalize_expert_weights": (False, None),
    "norm_mlp": (False, None),
    "num_shared_experts": (0, None),
    "parallel_block": (False, None),
    "prenorm": (False, None),
    "qkv_proj_bias": (True,),
    "rotary_emb_fraction": (1,),
    "rotary_emb_interleaved": (False, None),
    "rotary_emb_scale_base": (None,),
    "use_rms_norm": (False, None),
}
# Each of their names, and ours.
_KEYS = {
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
    "layer_norm_epsilon": "layer_norm_eps",
    "moe_top_k": "num_experts_per_tok",
}
_SPENT = {"auto_map", "n_inner", "n_positions", "rotary_emb_base", "rotary_scaling_factor", *_USUAL, *_KEYS}
_TRAINED = 2048  # positions, where config.json does not say


def _speaks(config: Config) -> bool:
    return config.get("model_type") == "nomic_bert" and bool(config.get("moe_every_n_layers"))


def _translate(config: Config) -> dict[str, Any]:
    expect(config, "nomic mixture of experts", _USUAL)
    multiple = int(config.get("pad_vocab_size_multiple") or 1)
    trained = int(config.get("max_trained_positions") or _TRAINED)
    rope = {"rope_type": "default", "rope_theta": float(config.get("rotary_emb_base", 10_000))}
    return {
        **{key: value for key, value in config.items() if key not in _SPENT},
        **{ours: config[theirs] for theirs, ours in _KEYS.items()},
        "model_type": "nomic_bert_moe",
        "architectures": ["NomicMoeModel"],
        "intermediate_size": int(config.get("n_inner") or 4 * config["n_embd"]),
        "vocab_size": -(-int(config["vocab_size"]) // multiple) * multiple,
        "max_position_embeddings": min(int(config.get("n_positions") or trained), trained),
        "max_trained_positions": trained,
        "rope_parameters": rope,
    }


NOMIC_MOE = Dialect("nomic-moe", _speaks, _translate)
