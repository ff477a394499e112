"""Llama that looks both ways: NVIDIA's retrievers.

nvidia/llama-nemotron-embed-1b-v2, llama-nemotron-rerank-1b-v2, llama-3.2-nv-embedqa-1b-v2, llama-3.2-nv-rerankqa-1b-v2.
"""

from __future__ import annotations

from typing import Any

from carpool.engine.dialects.dialect import Config, Dialect
from carpool.engine.errors import ConfigError

_POOLINGS = {"avg": "mean", "cls": "cls", "last": "last"}


def _speaks(config: Config) -> bool:
    return config.get("model_type") == "llama_bidirec"


def _translate(config: Config) -> dict[str, Any]:
    pooling = _POOLINGS.get(str(config.get("pooling")))
    if pooling is None:
        raise ConfigError(
            f"This bidirectional Llama pools by {config.get('pooling')!r}, which its config.json must say as avg, cls "
            """or last: name it with --hf-overrides '{"pooling": "avg"}'."""
        )
    architectures = [
        name.replace("LlamaBidirectional", "Llama", 1) for name in config.get("architectures") or ()
    ]
    # A classifier's head was trained on this pooling and no other, whatever other files or flags say.
    classifier = any(name.endswith("ForSequenceClassification") for name in architectures)
    kept = {key: value for key, value in config.items() if key not in ("auto_map", "pooling", "temperature")}
    return {
        **kept,
        "model_type": "llama",
        "architectures": architectures,
        "is_causal": False,
        "score_temperature": config.get(
            "temperature"
        ),  # transformers would take its own name for one of sampling
        "classifier_pooling" if classifier else "pooling": pooling,
    }


BIDIRECTIONAL_LLAMA = Dialect("llama-bidirectional", _speaks, _translate)
