"""nomic's published config.json in the words of transformers' class, and what of it has none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import NomicBertConfig

import tiny
from carpool.engine.build import build
from carpool.engine.checkpoint import Checkpoint
from carpool.engine.config import EngineConfig, PoolerConfig
from carpool.engine.dialects import translate
from carpool.engine.errors import ConfigError
from zoo import translated as zoo


def config(**changes: Any) -> dict[str, Any]:
    return zoo.nomic_config(**{"vocab_size": 30528, "n_inner": 3072, **changes})


def read(folder: Path, overrides: dict[str, Any], **changes: Any) -> Checkpoint:
    tiny.write_json(folder / "config.json", config(**changes))
    tiny.sentence_transformers_files(folder, max_seq_length=8192)
    return Checkpoint.read(folder, overrides, PoolerConfig())


def test_its_keys_have_counterparts() -> None:
    translated, dialect = translate(config(n_embd=768, n_head=12, n_layer=12))
    assert dialect == "nomic"
    assert translated.items() >= {
        "model_type": "nomic_bert",
        "architectures": ["NomicBertModel"],
        "hidden_size": 768,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "intermediate_size": 3072,
        "hidden_act": "silu",
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 2048,
        "type_vocab_size": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
    }.items()  # fmt: skip
    assert not {"auto_map", "n_embd", "n_positions", "rotary_emb_base"} & translated.keys()


@pytest.mark.parametrize(("gate", "activation"), [("swiglu", "silu"), ("geglu", "gelu"), ("glu", "sigmoid")])
def test_gates(gate: str, activation: str) -> None:
    assert translate(config(activation_function=gate))[0]["hidden_act"] == activation


def test_widths_are_rounded_as_the_published_code_rounds_them() -> None:
    translated, _ = translate(config(n_inner=2049, vocab_size=30522))
    assert (translated["intermediate_size"], translated["vocab_size"]) == (2304, 30528)


def test_texts_are_no_longer_than_it_was_trained_for(tmp_path: Path) -> None:
    checkpoint = read(tmp_path, {})
    assert (checkpoint.max_model_len, checkpoint.longest) == (2048, 2048)


def test_shorter_side_files_are_obeyed(tmp_path: Path) -> None:
    read(tmp_path, {})
    tiny.edit_json(tmp_path / "sentence_bert_config.json", max_seq_length=512)
    checkpoint = Checkpoint.read(tmp_path, {}, PoolerConfig())
    assert (checkpoint.max_model_len, checkpoint.longest) == (512, 2048)


def test_the_trained_length_can_be_overridden(tmp_path: Path) -> None:
    checkpoint = read(tmp_path, {"max_trained_positions": 8192})
    assert (checkpoint.max_model_len, checkpoint.longest) == (8192, 8192)


def test_a_longer_one_is_refused(tmp_path: Path) -> None:
    member = next(member for member in zoo.MEMBERS if member.name.endswith("arctic-embed-m-long"))
    member.make(tmp_path)
    with pytest.raises(ConfigError, match="2048"):
        build(EngineConfig(model=str(tmp_path), max_model_len=2049))


def test_transformers_own_is_left_alone() -> None:
    own = NomicBertConfig().to_dict()
    assert translate(own) == (own, None)


def test_a_mixture_of_experts_is_another_dialect() -> None:
    experts = config(moe_every_n_layers=2, num_experts=8, moe_top_k=2, activation_function="gelu",
                     qkv_proj_bias=True, mlp_fc1_bias=True, mlp_fc2_bias=True)  # fmt: skip
    assert translate(experts)[1] != "nomic"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("activation_function", "gelu"),
        ("causal", True),
        ("mlp_fc1_bias", True),
        ("mlp_fc2_bias", True),
        ("norm_mlp", True),
        ("num_heads_kv", 2),
        ("parallel_block", True),
        ("prenorm", True),
        ("qkv_proj_bias", True),
        ("rotary_emb_fraction", 0.5),
        ("rotary_emb_fraction", 0.0),
        ("rotary_emb_interleaved", True),
        ("rotary_emb_scale_base", 512),
        ("rotary_head_dim", True),
        ("use_rms_norm", True),
    ],
)
def test_what_the_class_does_not_compute_is_refused(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=key):
        translate(config(**{key: value}))
