"""jinaai/jina-reranker-v3 and -v3.5: Qwen3 with a projector beside it, which reads all documents in one prompt.

Their code computes what transformers' Qwen3 does, windows included, and puts the projector behind it. What they differ
in is how much of a text it reads: no key of config.json says so, and only v3.5 has windows.
"""

from __future__ import annotations

from typing import Any

from carpool.engine.dialects.dialect import Config, Dialect, expect

_CLASS = "JinaForRanking"


def _speaks(config: Config) -> bool:
    return _CLASS in (config.get("architectures") or ())


def _translate(config: Config) -> dict[str, Any]:
    expect(config, _CLASS, {"model_type": ("qwen3",)})
    query, document = (1024, 8192) if config.get("use_sliding_window") else (512, 2048)
    return {
        "max_query_length": query,
        "max_doc_length": document,
        **{key: value for key, value in config.items() if key != "auto_map"},
    }


JINA_RANKING = Dialect("jina-ranking", _speaks, _translate)
