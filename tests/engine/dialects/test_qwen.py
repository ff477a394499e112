"""Qwen3 both ways: which checkpoints are meant, and the layer behind voyage's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import tiny
from carpool.engine.build import build
from carpool.engine.config import EngineConfig, PoolerConfig
from carpool.engine.dialects import translate
from carpool.engine.errors import ConfigError
from carpool.engine.fast_tokenizer import load_fast
from zoo import decoders_translated as zoo
from zoo.measure import TOLERANCE, measure
from zoo.member import Member


def model(folder: Path, **options: Any) -> Any:
    return build(EngineConfig(model=str(folder), cpu_workers=1, **options)).model


def test_embeddings_are_as_wide_as_the_layer_behind(tmp_path: Path) -> None:
    zoo.voyage(tmp_path)
    info = model(tmp_path)
    assert (info.embedding_size, info.pooling, info.labels) == (64, "mean", ())


def test_the_mean_is_its_pooling_without_side_files_too(tmp_path: Path) -> None:
    def make(folder: Path) -> Any:
        return zoo.voyage(folder, files=False)

    line = measure(Member("", "", make, zoo.EMBED), tmp_path)
    assert max(line.alone, line.company) <= TOLERANCE


def test_the_reference_s_overrides_make_the_same_model(tmp_path: Path) -> None:
    """As people serve it elsewhere."""
    overrides = {"architectures": ["VoyageQwen3BidirectionalEmbedModel"], "num_labels": 64}

    def make(folder: Path) -> Any:
        reference = zoo.voyage(folder)
        tiny.edit_json(folder / "config.json", architectures=["Qwen3Model"], auto_map=..., num_labels=...,
                       use_bidirectional_attention=...)  # fmt: skip
        return reference

    member = Member("", "", make, ("embed",), options={"hf_overrides": overrides})
    assert measure(member, tmp_path).company <= TOLERANCE


def test_a_width_that_nobody_names_is_asked_for(tmp_path: Path) -> None:
    zoo.voyage(tmp_path)
    tiny.edit_json(tmp_path / "config.json", num_labels=...)
    with pytest.raises(ConfigError, match=r"how wide.*num_labels"):
        model(tmp_path)


def test_a_layer_that_is_not_there_is_missed(tmp_path: Path) -> None:
    zoo.voyage(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["linear.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"no weight of shape \(64, 32\)"):
        model(tmp_path)


def test_a_pooling_that_the_layer_does_not_commute_with_is_refused(tmp_path: Path) -> None:
    zoo.voyage(tmp_path)
    tiny.sentence_transformers_files(tmp_path, ["max"])
    with pytest.raises(ConfigError, match="max pooling"):
        model(tmp_path)


def test_plain_qwen3_is_left_alone() -> None:
    config = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "num_labels": 2}
    assert translate(config) == (config, None)


def test_a_classifier_both_ways_keeps_its_labels() -> None:
    config = {"model_type": "qwen3", "architectures": ["Qwen3ForSequenceClassification"], "num_labels": 3,
              "use_bidirectional_attention": True}  # fmt: skip
    translated, dialect = translate(config)
    assert dialect == "qwen3-bidirectional"
    assert translated.items() >= {"is_causal": False, "num_labels": 3}.items()
    assert "output_projection" not in translated


def test_whole_numbers_are_of_the_text_s_vector_only(tmp_path: Path) -> None:
    """pplx-embed: not normalised unless somebody asks."""
    zoo.pplx(tmp_path)
    info = model(tmp_path)
    assert (info.normalize, info.pooling) == (False, "mean")
    asked = model(tmp_path, pooler_config=PoolerConfig(pooling_type="LAST"))
    assert asked.pooling == "last"


def test_texts_end_as_the_python_tokenizer_would_end_them(tmp_path: Path) -> None:
    """gte-Qwen2: tokenizer.json appends nothing, tokenizer_config.json says that its code does."""
    zoo.gte_qwen2(tmp_path)
    assert load_fast(tmp_path, trust_remote_code=False)("a").input_ids[-1] == 0
    tiny.edit_json(tmp_path / "tokenizer_config.json", add_eos_token=False)
    assert load_fast(tmp_path, trust_remote_code=False)("a").input_ids[-1] != 0


@pytest.mark.parametrize("code", ["modeling_qwen2_rm.Qwen2ForRewardModel", "modeling_qwen.Qwen2Model"])
def test_code_that_computes_what_transformers_does_is_passed_over_in_silence(code: str) -> None:
    config = {"model_type": "qwen2", "architectures": ["Qwen2ForRewardModel"], "is_causal": False}
    assert translate({**config, "auto_map": {"AutoModel": code}}) == (config, "qwen2")


def test_the_embedding_models_code_looks_both_ways_unless_it_is_told_otherwise() -> None:
    config = {"model_type": "qwen2", "auto_map": {"AutoModel": "modeling_qwen.Qwen2Model"}}
    assert translate(config)[0] == {"model_type": "qwen2", "is_causal": False}
    assert translate({**config, "is_causal": True})[0]["is_causal"] is True


def test_other_code_over_qwen2_is_not() -> None:
    config = {"model_type": "qwen2", "auto_map": {"AutoModel": "modeling_other.Qwen2Model"}}
    assert translate(config) == (config, None)
