"""nomic's mixture of experts in the words of our class, and what of it has none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import tiny
from carpool.engine.checkpoint import Checkpoint
from carpool.engine.config import PoolerConfig
from carpool.engine.dialects import translate
from carpool.engine.errors import ConfigError
from zoo import native as zoo


def config(**changes: Any) -> dict[str, Any]:
    return zoo.nomic_moe_config(250002, **changes)


def test_its_keys_have_counterparts() -> None:
    translated, dialect = translate(config())
    assert dialect == "nomic-moe"
    assert translated.items() >= {
        "model_type": "nomic_bert_moe",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 2048,
        "vocab_size": 250048,  # filled up to a multiple of 64
    }.items()  # fmt: skip
    assert not {"auto_map", "n_embd", "moe_top_k"} & translated.keys()


def test_a_model_without_experts_is_another_dialect() -> None:
    plain = config(moe_every_n_layers=0, activation_function="swiglu", qkv_proj_bias=False, mlp_fc1_bias=False,
                   mlp_fc2_bias=False)  # fmt: skip
    assert translate(plain)[1] != "nomic-moe"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("activation_function", "swiglu"),
        ("expert_choice_router", True),
        ("ffn_div", 2),
        ("mlp_fc1_bias", False),
        ("moe_normalize_expert_weights", True),
        ("num_shared_experts", 1),
        ("parallel_block", True),
        ("prenorm", True),
        ("qkv_proj_bias", False),
        ("rotary_emb_fraction", 0.5),
        ("rotary_emb_interleaved", True),
        ("rotary_emb_scale_base", 512),
        ("use_rms_norm", True),
    ],
)
def test_what_it_does_not_compute_is_refused(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{key} {value!r}"):
        translate(config(**{key: value}))


@pytest.mark.parametrize(("trained", "longest"), [(2048, 2048), (1024, 1024), (None, 2048)])
def test_texts_are_no_longer_than_it_was_trained_for(
    trained: int | None, longest: int, tmp_path: Path
) -> None:
    tiny.write_json(tmp_path / "config.json", config(n_positions=8192, max_trained_positions=trained))
    assert Checkpoint.read(tmp_path, {}, PoolerConfig()).longest == longest
