"""jina-embeddings-v2 and jina-reranker-v1, which call themselves `bert` and are not: ALiBi and gated layers.

jina-embeddings-v2-{small,base}-en, -base-{de,es,zh}, jina-reranker-v1-{tiny,turbo}-en; and the base-code of the former,
which also normalises its queries and keys. The class is `engine/models/native/jina_bert.py`.
"""

from __future__ import annotations

from typing import Any

from carpool.engine.dialects.dialect import Config, Dialect, expect

_GATES = {"geglu": "gelu", "reglu": "relu"}


def _speaks(config: Config) -> bool:
    return config.get("model_type") == "bert" and config.get("position_embedding_type") == "alibi"


def _speaks_code(config: Config) -> bool:
    """The two differ in the code that they name, and in nothing else of config.json."""
    named = [config.get("_name_or_path"), *dict(config.get("auto_map") or {}).values()]
    return _speaks(config) and any("qk-post-norm" in str(name) for name in named)


def _translate(config: Config) -> dict[str, Any]:
    expect(config, "Jina BERT", {"feed_forward_type": tuple(_GATES), "is_decoder": (False, None)})
    translated = {key: value for key, value in config.items() if key != "auto_map"}
    classifies = any("Classification" in name for name in config.get("architectures") or ())
    if config.get("emb_pooler") == "mean" and not classifies:
        translated["pooling"] = "mean"
    return {
        **translated,
        "model_type": "jina_bert_v2",
        "hidden_act": _GATES[config["feed_forward_type"]],
        "qk_norm": _speaks_code(config),
    }


JINA_BERT_CODE = Dialect("jina-bert-code", _speaks_code, _translate)
JINA_BERT = Dialect("jina-bert", _speaks, _translate)
