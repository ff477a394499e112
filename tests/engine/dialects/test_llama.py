"""Bidirectional Llamas: what their config.json says of pooling holds, for embeddings and for a classifier's head."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from carpool.engine.build import build
from carpool.engine.config import EngineConfig, PoolerConfig
from carpool.engine.errors import ConfigError
from zoo import decoders_translated as zoo
from zoo.measure import TOLERANCE, measure
from zoo.member import Member

POOLINGS = ("avg", "cls", "last")


@pytest.mark.parametrize("pooling", POOLINGS)
def test_embeddings_are_pooled_as_it_says(pooling: str, tmp_path: Path) -> None:
    line = measure(Member("", "", partial(zoo.bidirectional_llama, pooling=pooling), zoo.EMBED), tmp_path)
    assert max(line.alone, line.company) <= TOLERANCE


@pytest.mark.parametrize("pooling", POOLINGS)
def test_so_is_what_a_reranker_s_head_gets(pooling: str, tmp_path: Path) -> None:
    """By temperature, too."""
    make = partial(zoo.bidirectional_llama, pooling=pooling, rerank=True, temperature=0.5)
    line = measure(Member("", "", make, ("classify",)), tmp_path)
    assert max(line.alone, line.company) <= TOLERANCE


def test_a_head_gets_what_it_was_trained_on_whatever_the_user_says(tmp_path: Path) -> None:
    zoo.bidirectional_llama(tmp_path, pooling="avg", rerank=True)
    config = EngineConfig(model=str(tmp_path), pooler_config=PoolerConfig(pooling_type="LAST"), cpu_workers=1)
    assert build(config).model.pooling == "mean"


def test_embeddings_are_pooled_as_the_user_says(tmp_path: Path) -> None:
    zoo.bidirectional_llama(tmp_path, pooling="avg")
    config = EngineConfig(model=str(tmp_path), pooler_config=PoolerConfig(pooling_type="CLS"), cpu_workers=1)
    assert build(config).model.pooling == "cls"


@pytest.mark.parametrize("pooling", [None, "colbert"])
def test_without_a_pooling_it_is_refused(pooling: str | None, tmp_path: Path) -> None:
    zoo.bidirectional_llama(tmp_path)
    with pytest.raises(ConfigError, match=f"pools by {pooling!r}.*--hf-overrides"):
        build(EngineConfig(model=str(tmp_path), hf_overrides={"pooling": pooling}))


def test_looking_one_way_would_show(tmp_path: Path) -> None:
    """Planted: the same weights as a plain Llama."""
    make = partial(zoo.bidirectional_llama, pooling="cls")
    options = {"hf_overrides": {"model_type": "llama", "pooling": "cls", "auto_map": None}}
    assert measure(Member("", "", make, ("embed",), options=options), tmp_path).alone > 0.01
