"""Jina's XLM-RoBERTa in the words of transformers' classes, and what of it has none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import tiny
from carpool.engine.checkpoint import Checkpoint
from carpool.engine.config import PoolerConfig
from carpool.engine.dialects import translate
from carpool.engine.errors import ConfigError
from zoo.translated import flash_config


def test_rotary_ones_are_jina_embeddings_v3() -> None:
    translated, dialect = translate(flash_config(model_type="xlm-roberta"))
    assert dialect == "jina-rotary"
    assert translated["model_type"] == "jina_embeddings_v3"
    assert translated["architectures"] == ["JinaEmbeddingsV3Model"]
    assert translated["rope_parameters"] == {"rope_type": "default", "rope_theta": 20000.0}
    assert not {"auto_map", "position_embedding_type", "rotary_emb_base"} & translated.keys()


def test_adapters_tasks_and_widths_stay() -> None:
    kept = {
        "lora_adaptations": ["retrieval.query"],
        "lora_alpha": 1,
        "lora_rank": 4,
        "matryoshka_dimensions": [32],
        "task_instructions": {"retrieval.query": "Find: "},
    }
    assert kept.items() <= translate(flash_config(**kept))[0].items()


def test_a_colbert_keeps_its_name_and_has_the_same_backbone() -> None:
    translated, _ = translate(flash_config(architectures=["HF_ColBERT"]))
    assert (translated["model_type"], translated["architectures"]) == ("jina_embeddings_v3", ["HF_ColBERT"])


@pytest.mark.parametrize(
    "changes", [{"position_embedding_type": "absolute"}, {"position_embedding_type": None}]
)
def test_those_with_learned_positions_are_xlm_roberta(changes: dict[str, Any]) -> None:
    """Without a model_type, as jina-reranker-v2 has it."""
    name = "XLMRobertaForSequenceClassification"
    translated, dialect = translate(flash_config(architectures=[name], **changes))
    assert dialect == "jina-learned"
    assert (translated["model_type"], translated["architectures"]) == ("xlm-roberta", [name])


def test_a_table_of_positions_serves_as_many_as_stand_behind_its_pad_id(tmp_path: Path) -> None:
    positions = {"position_embedding_type": "absolute", "max_position_embeddings": 1026}
    tiny.write_json(tmp_path / "config.json", flash_config(vocab_size=9, **positions))
    assert Checkpoint.read(tmp_path, {}, PoolerConfig()).longest == 1024


def test_plain_xlm_roberta_is_left_alone() -> None:
    plain = {key: value for key, value in flash_config(model_type="xlm-roberta").items() if key != "auto_map"}
    assert translate(plain) == (plain, None)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("position_embedding_type", "alibi"),
        ("rotary_emb_dim", 4),
        ("rotary_emb_interleaved", True),
        ("rotary_emb_scale_base", 512),
    ],
)
def test_what_the_classes_do_not_compute_is_refused(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=key):
        translate(flash_config(**{key: value}))
