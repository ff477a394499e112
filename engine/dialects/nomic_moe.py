"""nomic-ai/nomic-embed-text-v2-moe: nomic's BERT with a mixture of experts in every other layer.

The class is `engine/models/native/nomic_moe.py`, whose weights have the published names.
"""

from __future__ import annotations

from typing import Any

from carpool.engine.dialects.dialect import Config, Dialect, expect
from carpool.engine.dialects.nomic import KEYS, USUAL, in_our_words

_USUAL: dict[str, tuple[object, ...]] = {
    **USUAL,
    "activation_function": ("gelu",),
    "expert_choice_router": (False, None),
    "ffn_div": (1, None),
    "mlp_fc1_bias": (True,),
    "mlp_fc2_bias": (True,),
    "moe_normalize_expert_weights": (False, None),
    "num_shared_experts": (0, None),
    "qkv_proj_bias": (True,),
}


def _speaks(config: Config) -> bool:
    return config.get("model_type") == "nomic_bert" and bool(config.get("moe_every_n_layers"))


def _translate(config: Config) -> dict[str, Any]:
    expect(config, "nomic mixture of experts", _USUAL)
    return {
        **in_our_words(config, _USUAL, {**KEYS, "moe_top_k": "num_experts_per_tok"}),
        "model_type": "nomic_bert_moe",
        "architectures": ["NomicMoeModel"],
        "intermediate_size": int(config.get("n_inner") or 4 * config["n_embd"]),
    }


NOMIC_MOE = Dialect("nomic-moe", _speaks, _translate)
