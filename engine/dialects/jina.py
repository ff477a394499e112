"""Jina's XLM-RoBERTa: jina-embeddings-v3 and jina-colbert-v2 (rotary), jina-reranker-v2 (learned positions)."""

from __future__ import annotations

from typing import Any

from carpool.engine.dialects.dialect import Config, Dialect, expect, renamed_classes

_CONFIG_CLASS = (
    "XLMRobertaFlashConfig"  # its auto_map tells it: model_type is XLM-RoBERTa's, or is not there at all
)
_SPENT = ("auto_map", "position_embedding_type", "rotary_emb_base")


def _speaks(config: Config) -> bool:
    code = dict(config.get("auto_map") or {}).values()
    return any(str(name).endswith(_CONFIG_CLASS) for name in code)


def _speaks_rotary(config: Config) -> bool:
    return _speaks(config) and config.get("position_embedding_type") == "rotary"


def _translate_rotary(config: Config) -> dict[str, Any]:
    head_size = int(config["hidden_size"]) // int(config["num_attention_heads"])
    expect(
        config,
        "rotary XLM-RoBERTa",
        {
            "rotary_emb_dim": (head_size, None),
            "rotary_emb_interleaved": (False, None),
            "rotary_emb_scale_base": (None,),
        },
    )
    theta = float(config.get("rotary_emb_base", 10_000))
    return {
        **{key: value for key, value in config.items() if key not in _SPENT},
        "model_type": "jina_embeddings_v3",
        "architectures": renamed_classes(config, "XLMRoberta", "JinaEmbeddingsV3"),
        "rope_parameters": config.get("rope_parameters") or {"rope_type": "default", "rope_theta": theta},
    }


def _translate_learned(config: Config) -> dict[str, Any]:
    expect(config, "XLM-RoBERTa", {"position_embedding_type": ("absolute", None)})
    return {**{key: value for key, value in config.items() if key not in _SPENT}, "model_type": "xlm-roberta"}


JINA_ROTARY = Dialect("jina-rotary", _speaks_rotary, _translate_rotary)
JINA_LEARNED = Dialect("jina-learned", _speaks, _translate_learned)
