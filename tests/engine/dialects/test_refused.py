"""Checkpoints that would load as something else are refused, with the reason, before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import tiny
from carpool.engine.checkpoint import Checkpoint
from carpool.engine.config import PoolerConfig
from carpool.engine.dialects import translate
from carpool.engine.errors import ConfigError

GRITLM: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"],
    "auto_map": {
        "AutoModel": "modeling_gritlm7b.MistralModel",
        "AutoModelForCausalLM": "modeling_gritlm7b.MistralForCausalLM",
    },
    "model_type": "mistral",
    "hidden_size": 32,
    "vocab_size": 100,
    "max_position_embeddings": 64,
}
NV_EMBED: dict[str, Any] = {
    "architectures": ["NVEmbedModel"],
    "auto_map": {"AutoModel": "modeling_nvembed.NVEmbedModel"},
    "model_type": "nvembed",
    "text_config": {"hidden_size": 32, "vocab_size": 100},
}
REFORMER: dict[str, Any] = {"model_type": "reformer", "hidden_size": 32, "vocab_size": 100}


@pytest.mark.parametrize(
    ("config", "sentence"),
    [(GRITLM, "GritLM looks both ways"), (NV_EMBED, "latent attention"), (REFORMER, "random hashes")],
)
def test_it_is_said_why(config: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    tiny.write_json(tmp_path / "config.json", config)
    with pytest.raises(ConfigError, match=f"{sentence}.* carpool cannot serve it"):
        Checkpoint.read(tmp_path, {}, PoolerConfig())


def test_the_models_they_are_made_of_are_not_refused() -> None:
    plain = {key: value for key, value in GRITLM.items() if key != "auto_map"}
    assert translate(plain) == (plain, None)


def test_reformer_without_hashes_is_like_any_other() -> None:
    local = {**REFORMER, "attn_layers": ["local", "local"]}
    assert translate(local) == (local, None)


@pytest.mark.parametrize("named", [{}, {"attention_type": "block_sparse"}])
def test_big_bird_is_served_only_with_attention_that_does_not_change(named: dict[str, Any]) -> None:
    config = {"model_type": "big_bird", "hidden_size": 32, "vocab_size": 100, **named}
    with pytest.raises(ConfigError, match=r"what was asked before.*original_full"):
        translate(config)
    whole = {**config, "attention_type": "original_full"}
    assert translate(whole) == (whole, None)
