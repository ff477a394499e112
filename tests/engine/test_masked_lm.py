"""Masked language models whose files say nothing: a SPLADE by its name, by what the user says, or loudly none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny
from carpool.engine.build import Parts, build
from carpool.engine.config import EngineConfig, PoolerConfig
from head_oracle import answer, close
from tiny import TEXTS, edit_json
from zoo import heads

AS_SPLADE = {"architectures": ["BertSpladeSparseEmbeddingModel"]}


def bare(folder: Path) -> Callable[..., Any]:
    """The files of a SPLADE less those of sentence-transformers; returns what its vectors have to be."""
    folder.mkdir(exist_ok=True)
    truth = heads.splade_v3(folder)
    for file in ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"):
        (folder / file).unlink(missing_ok=True)
    return truth


def built(folder: Path, **options: Any) -> Parts:
    return build(EngineConfig(model=str(folder), dtype="float32", cpu_workers=1, **options))


def is_splade(parts: Parts, truth: Callable[..., Any]) -> bool:
    ids = parts.tokenizer.encode([text for text in TEXTS if text])
    vectors = answer(parts, ids, "embed")
    return parts.model.tasks == {"embed", "sparse_embed"} and all(
        close(ours, truth("embed", own)) for own, ours in zip(ids, vectors, strict=True)
    )


@pytest.mark.parametrize("name", ["splade-cocondenser-ensembledistil", "Splade_PP_en_v1", "encoder"])
def test_a_splade_is_known_by_its_name_or_by_what_it_was_saved_as(name: str, tmp_path: Path) -> None:
    truth = bare(tmp_path / name)
    if name == "encoder":
        edit_json(tmp_path / name / "config.json", _name_or_path="naver/efficient-splade-V-large-doc")
    parts = built(tmp_path / name)
    assert is_splade(parts, truth)
    assert any(sentence.startswith("Taken for a SPLADE") for sentence in parts.model.notices)


def test_any_other_is_embedded_with_and_the_other_way_is_named_and_works(tmp_path: Path) -> None:
    truth = bare(tmp_path / "encoder")
    parts = built(tmp_path / "encoder")
    assert parts.model.tasks == {"embed", "token_embed"}
    (notice,) = (sentence for sentence in parts.model.notices if "SPLADE" in sentence)
    assert '--hf-overrides \'{"architectures": ["BertSpladeSparseEmbeddingModel"]}\'' in notice
    told = built(tmp_path / "encoder", hf_overrides=AS_SPLADE)
    assert is_splade(told, truth)
    assert not any("SPLADE" in sentence for sentence in told.model.notices)


@pytest.mark.parametrize(
    "options", [{"convert": "embed"}, {"pooler_config": PoolerConfig(pooling_type="MEAN")}]
)
@pytest.mark.parametrize("name", ["splade", "encoder"])
def test_whoever_says_that_it_embeds_is_believed_without_a_word(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    bare(tmp_path / name)
    parts = built(tmp_path / name, **options)
    assert parts.model.tasks == {"embed", "token_embed"}
    assert not any("SPLADE" in sentence for sentence in parts.model.notices)


def test_files_that_pool_are_believed_whatever_the_name(tmp_path: Path) -> None:
    bare(tmp_path / "splade")
    tiny.sentence_transformers_files(tmp_path / "splade", ["mean"], max_seq_length=64)
    parts = built(tmp_path / "splade")
    assert parts.model.pooling == "mean"
    assert parts.model.tasks == {"embed", "token_embed"}
    assert not any("SPLADE" in sentence for sentence in parts.model.notices)
