"""jinaai/jina-embeddings-v5-text-small and -nano: Qwen3 and EuroBERT, and an adapter a task beside them.

Only the base is put into other words here; `task_names` stays, and `adapters/<task>/` are read from the folder.
"""

from __future__ import annotations

from typing import Any

from carpool.engine.dialects.dialect import Config, Dialect

# Keys that EuroBERT's configuration writes and Qwen3's does not. Taking Qwen3 for EuroBERT would only leave weights
# unused; the other way round they would be missing, which is fatal. So what is not surely EuroBERT is Qwen3.
_EUROBERT = ("mask_token_id", "mask_token", "clf_pooling", "classifier_pooling")
_QWEN3 = ("max_window_layers", "use_sliding_window")


def _speaks(config: Config) -> bool:
    return config.get("model_type") == "jina_embeddings_v5" or "JinaEmbeddingsV5Model" in (
        config.get("architectures") or ()
    )


def _translate(config: Config) -> dict[str, Any]:
    eurobert = any(key in config for key in _EUROBERT) and not any(key in config for key in _QWEN3)
    translated = {key: value for key, value in config.items() if key != "auto_map"}
    return {
        **translated,
        "model_type": "eurobert" if eurobert else "qwen3",
        "architectures": ["EuroBertModel" if eurobert else "Qwen3Model"],
        "pooling": "last",
    }


JINA_V5 = Dialect("jina-v5", _speaks, _translate)
