"""Jina's BERTs call themselves `bert`: which of them are not, and how they are pooled."""

from __future__ import annotations

from typing import Any

import pytest

from carpool.engine.dialects import translate
from carpool.engine.errors import ConfigError
from zoo import native as zoo


def config(**changes: Any) -> dict[str, Any]:
    return zoo.jina_bert_config(30528, **changes)


@pytest.mark.parametrize(("code", "dialect"), [(False, "jina-bert"), (True, "jina-bert-code")])
def test_the_code_that_it_names_tells_which(code: bool, dialect: str) -> None:
    translated, found = translate(config(code=code))
    assert (found, translated["model_type"], translated["qk_norm"]) == (dialect, "jina_bert_v2", code)
    assert "auto_map" not in translated


def test_bert_is_left_alone() -> None:
    plain = {"model_type": "bert", "position_embedding_type": "absolute", "architectures": ["BertModel"]}
    assert translate(plain) == (plain, None)


def test_what_it_does_not_compute_is_refused() -> None:
    with pytest.raises(ConfigError, match="feed_forward_type 'original'"):
        translate(config(feed_forward_type="original"))


def test_an_embedder_is_pooled_by_the_mean_and_a_reranker_by_its_pooler() -> None:
    assert translate(config())[0]["pooling"] == "mean"
    reranker = config(architectures=["JinaBertForSequenceClassification"])
    assert "pooling" not in translate(reranker)[0]
