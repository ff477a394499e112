"""InternLM2's config.json and weights in Llama's words."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

import tiny
from carpool.engine.build import build
from carpool.engine.config import EngineConfig
from carpool.engine.dialects import translate
from carpool.engine.errors import ConfigError
from zoo import decoders_translated as zoo
from zoo.measure import TOLERANCE, measure
from zoo.member import Member


def test_its_one_key_has_a_counterpart() -> None:
    translated, dialect = translate(zoo.internlm2_config(vocab_size=92544, bias=True))
    assert dialect == "internlm2"
    assert translated.items() >= {
        "model_type": "llama",
        "architectures": ["LlamaForRewardModel"],
        "attention_bias": True,
        "vocab_size": 92544,
        "rope_scaling": {"factor": 2.0, "type": "dynamic"},
    }.items()  # fmt: skip
    assert not {"auto_map", "bias"} & translated.keys()


def test_biases_are_those_of_attention(tmp_path: Path) -> None:
    member = Member("biased", "", partial(zoo.internlm2_reward, bias=True), zoo.REWARD)
    line = measure(member, tmp_path)
    assert max(line.alone, line.company) <= TOLERANCE


def test_a_reward_is_a_token_s_whatever_the_others_are(tmp_path: Path) -> None:
    zoo.internlm2_reward(tmp_path)
    info = build(EngineConfig(model=str(tmp_path), cpu_workers=1)).model
    assert (sorted(info.tasks), info.max_model_len, len(info.labels)) == (["token_classify"], 64, 1)


def test_a_weight_that_is_missing_is_named(tmp_path: Path) -> None:
    zoo.internlm2_reward(tmp_path, pickled=True)
    weights = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    del weights["model.layers.1.attention.wqkv.weight"]
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"lacks 3 of the weights .*layers\.1\.self_attn\.k_proj"):
        build(EngineConfig(model=str(tmp_path)))


def test_code_that_lies_beside_it_is_not_run(tmp_path: Path) -> None:
    zoo.internlm2_reward(tmp_path)
    for name in ("configuration_internlm2", "modeling_internlm2", "tokenization_internlm2_fast"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('remote code ran')")
    build(EngineConfig(model=str(tmp_path), cpu_workers=1))


def test_a_language_model_embeds(tmp_path: Path) -> None:
    """InternLM2ForCausalLM: the head is left alone, and the last token pooled."""
    zoo.internlm2_reward(tmp_path)
    tiny.edit_json(tmp_path / "config.json", architectures=["InternLM2ForCausalLM"])
    assert build(EngineConfig(model=str(tmp_path), cpu_workers=1)).model.pooling == "last"
