"""jina-reranker-v3's config.json in the words of Qwen3, and what of it has none."""

from __future__ import annotations

from typing import Any

import pytest

from carpool.engine.dialects import translate
from carpool.engine.errors import ConfigError


def published(**changes: Any) -> dict[str, Any]:
    config = {
        "architectures": ["JinaForRanking"],
        "auto_map": {"AutoModel": "modeling.JinaForRanking"},
        "model_type": "qwen3",
        "hidden_size": 1024,
        "max_position_embeddings": 131072,
        "use_sliding_window": False,
    }
    return {**config, **changes}


def test_it_is_qwen3_that_reads_so_much_of_a_text() -> None:
    translated, dialect = translate(published())
    assert dialect == "jina-ranking"
    expected = {key: value for key, value in published().items() if key != "auto_map"}
    assert translated == {**expected, "max_query_length": 512, "max_doc_length": 2048}


def test_with_windows_it_reads_more() -> None:
    windows = {"use_sliding_window": True, "sliding_window": 1024, "layer_types": ["sliding_attention"]}
    translated, _ = translate(published(**windows))
    assert {**windows, "max_query_length": 1024, "max_doc_length": 8192}.items() <= translated.items()


def test_what_the_user_says_stays() -> None:
    assert translate(published(max_doc_length=99))[0]["max_doc_length"] == 99


def test_another_backbone_is_refused() -> None:
    with pytest.raises(ConfigError, match="model_type 'qwen2'"):
        translate(published(model_type="qwen2"))


def test_the_one_that_sees_is_none() -> None:
    assert translate(published(architectures=["JinaVLForRanking"], model_type="qwen2_vl"))[1] is None
