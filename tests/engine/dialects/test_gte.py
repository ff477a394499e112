"""NewModel's config.json in GTE's words, and what of it has none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GteConfig, GteModel

import tiny
from carpool.engine.checkpoint import Checkpoint
from carpool.engine.config import PoolerConfig
from carpool.engine.dialects import translate
from carpool.engine.errors import ConfigError
from zoo.translated import new_config, rotary_frequencies

MULTILINGUAL: dict[str, Any] = {
    "hidden_size": 768,
    "num_attention_heads": 12,
    "vocab_size": 250048,
}

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_attention_heads": 4,  # the width of a head is what published frequencies are made for below
    "num_hidden_layers": 1,
    "vocab_size": 9,
}


def config(**changes: Any) -> dict[str, Any]:
    return new_config("new", "Alibaba-NLP/new-impl--", **{**MULTILINGUAL, **changes})


@pytest.mark.parametrize(
    ("published", "native"),
    [
        ("NewModel", "GteModel"),
        ("NewForMaskedLM", "GteForMaskedLM"),
        ("NewForSequenceClassification", "GteForSequenceClassification"),
        ("NewForTokenClassification", "GteForTokenClassification"),
        ("GteModel", "GteModel"),
    ],
)
def test_classes_keep_what_they_are_for(published: str, native: str) -> None:
    translated, dialect = translate(config(architectures=[published]))
    assert (translated["architectures"], translated["model_type"], dialect) == ([native], "gte", "gte")


def test_nothing_is_left_that_asks_for_code_or_says_the_same_twice() -> None:
    translated, _ = translate(config())
    assert not {"auto_map", "rope_theta", "rope_scaling", "pack_qkv"} & translated.keys()


def test_what_is_read_elsewhere_stays() -> None:
    kept = {
        "matryoshka_dimensions": [256],
        "id2label": {"0": "no"},
        "torch_dtype": "float16",
        "type_vocab_size": 0,
    }
    translated, _ = translate(config(**kept))
    assert kept.items() <= translated.items()


@pytest.mark.parametrize(
    ("theta", "scaling"),
    [
        (20000, {"factor": 8.0, "type": "ntk"}),
        (500000, {"factor": 2.0, "rope_type": "ntk"}),
        (160000, {"factor": 1.0, "type": "ntk"}),
        (10000, None),
    ],
)
def test_the_class_turns_by_the_published_frequencies(theta: int, scaling: dict[str, Any] | None) -> None:
    translated, _ = translate(config(**SMALL, rope_theta=theta, rope_scaling=scaling))
    model = GteModel(GteConfig.from_dict(dict(translated)))
    published = rotary_frequencies(theta, scaling["factor"] if scaling else 1.0)
    torch.testing.assert_close(model.rotary_emb.inv_freq, published, rtol=1e-6, atol=0)


@pytest.mark.parametrize("scaling", [{"rope_type": "ntk", "factor": 8.0}, {"rope_type": "default"}])
def test_both_spellings_of_its_rotary_embedding_are_one(scaling: dict[str, Any]) -> None:
    """As transformers wrote it before version 5 and does since."""
    base = {key: value for key, value in config().items() if key not in ("rope_theta", "rope_scaling")}
    older = None if scaling["rope_type"] == "default" else scaling
    before, _ = translate({**base, "rope_theta": 20000, "rope_scaling": older})
    since, _ = translate({**base, "rope_parameters": {"rope_theta": 20000, **scaling}})
    assert since == before


def test_its_length_is_not_stretched_by_what_its_rotary_embedding_is(tmp_path: Path) -> None:
    tiny.write_json(tmp_path / "config.json", config())
    assert Checkpoint.read(tmp_path, {}, PoolerConfig()).longest == 8192


def test_transformers_own_gte_is_left_alone() -> None:
    own = GteConfig().to_dict()
    assert translate(own) == (own, None)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("position_embedding_type", "absolute"),
        ("layer_norm_type", "rms_norm"),
        ("logn_attention_scale", True),
        ("rope_scaling", {"type": "ntk", "factor": 8.0, "mixed_b": 0.75}),
        ("rope_scaling", {"type": "dynamic", "factor": 8.0}),
        ("rope_scaling", {"type": "ntk", "factor": 0.5}),
    ],
)
def test_what_the_class_does_not_compute_is_refused(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=key):
        translate(config(**{key: value}))
