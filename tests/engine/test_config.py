"""EngineConfig and PoolerConfig: what cannot be meant is refused when the value is made."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import numpy as np
import pytest

from carpool.engine.config import EngineConfig, LoraModule, PoolerConfig
from carpool.engine.errors import ConfigError


@pytest.mark.parametrize(
    "name",
    [
        "max_model_len",
        "max_num_seqs",
        "max_num_batched_tokens",
        "data_parallel_size",
        "cpu_workers",
        "long_prefill_token_threshold",
        "block_size",
        "kv_cache_memory_bytes",
        "max_queued_tokens",
    ],
)
@pytest.mark.parametrize("value", [0, -2])
def test_a_count_below_one_is_refused_by_its_flags_name(name: str, value: int) -> None:
    options: dict[str, Any] = {name: value}
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} .*{value}"):
        EngineConfig(**options)


def test_the_references_automatic_length_is_the_models_own() -> None:
    assert EngineConfig(max_model_len=-1) == EngineConfig()


def test_a_cache_of_results_has_no_negative_size() -> None:
    assert EngineConfig().cache_size == 0
    with pytest.raises(ConfigError, match="--cache-size must be at least 0, got -1"):
        EngineConfig(cache_size=-1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dtype", "int8"),
        ("device", "tpu"),
        ("device", "cuda:"),
        ("device", "cuda:-1"),
        ("device", "cuda:1,2"),
        ("device", "cuda:٣"),
        ("runner", "generate"),
        ("convert", "x"),
    ],
)
def test_a_choice_that_does_not_exist_is_refused_and_the_others_are_listed(name: str, value: str) -> None:
    options: dict[str, Any] = {name: value}
    with pytest.raises(ConfigError, match=f"--{name} must be one of auto, .*{value}"):
        EngineConfig(**options)


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:0", "cuda:11"])
def test_a_gpu_may_be_named_by_its_number(device: str) -> None:
    assert EngineConfig(device=device).device == device


@pytest.mark.parametrize("part", [0.0, -0.1, 1.01, float("nan")])
def test_a_part_of_the_memory_is_more_than_none_and_at_most_all(part: float) -> None:
    with pytest.raises(ConfigError, match="--gpu-memory-utilization must be more than 0 and at most 1"):
        EngineConfig(gpu_memory_utilization=part)
    assert EngineConfig(gpu_memory_utilization=1).gpu_memory_utilization == 1


@pytest.mark.parametrize("key", ["pooling_type", "seq_pooling_type"])
def test_an_unknown_pooling_is_refused(key: str) -> None:
    options: dict[str, Any] = {key: "MAX"}
    with pytest.raises(ConfigError, match=r"CLS, LAST, MEAN.*MAX"):
        PoolerConfig(**options)


@pytest.mark.parametrize("pair", [("logit_bias", "logit_mean"), ("logit_scale", "logit_sigma")])
def test_two_names_of_one_number_are_refused(pair: tuple[str, str]) -> None:
    with pytest.raises(ConfigError, match=f"Cannot set both {pair[0]} and {pair[1]}"):
        PoolerConfig(**dict.fromkeys(pair, 2.0))  # type: ignore[arg-type]


def test_the_older_scale_of_logits_is_what_they_are_multiplied_by() -> None:
    pooler = PoolerConfig(logit_scale=4.0)
    assert pooler.logit_sigma == 0.25
    assert replace(pooler, logit_sigma=2.0).logit_sigma == 2.0  # it is not taken for both names
    with pytest.raises(ConfigError, match=r"logit_scale cannot be 0"):
        PoolerConfig(logit_scale=0.0)


def test_two_names_of_one_setting_are_refused() -> None:
    with pytest.raises(ConfigError, match="Cannot set both"):
        PoolerConfig(pooling_type="CLS", seq_pooling_type="MEAN")


def test_the_newer_name_of_the_activation_wins() -> None:
    assert PoolerConfig(use_activation=False, normalize=True).activates is False
    assert PoolerConfig(normalize=True).activates is True
    assert PoolerConfig().activates is None


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("use_activation", "no", "must be true or false, got 'no'"),
        ("enable_chunked_processing", 1, "must be true or false, got 1"),
        ("logit_sigma", "2", "must be a number, got '2'"),
        ("logit_mean", float("inf"), "must be finite, got inf"),
        ("logit_mean", float("nan"), "must be finite, got nan"),
        ("max_embed_len", "5", "must be an integer, got '5'"),
        ("step_tag_id", True, "must be an integer, got True"),
        ("returned_token_ids", "12", "must be a list of integers, got '12'"),
        ("returned_token_ids", 5, "must be a list of integers, got 5"),
    ],
)
def test_what_is_not_of_an_overrides_kind_is_refused_by_name(name: str, value: object, sentence: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name} {sentence}"):
        PoolerConfig(**{name: value})  # type: ignore[arg-type]


def test_numpys_numbers_are_numbers() -> None:
    pooler = PoolerConfig(logit_mean=np.float32(2.0), max_embed_len=np.int64(5))  # type: ignore[arg-type]
    assert (pooler.logit_mean, pooler.max_embed_len) == (2.0, 5)


def test_configurations_do_not_change_and_share_nothing() -> None:
    one, two = EngineConfig(), EngineConfig()
    with pytest.raises(FrozenInstanceError):
        one.model = "x"  # type: ignore[misc]
    assert one.hf_overrides is not two.hf_overrides


@pytest.mark.parametrize("config", [EngineConfig, PoolerConfig])
def test_every_option_has_its_help(config: type) -> None:
    for option in fields(config):
        assert option.metadata["help"].endswith("."), option.name


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (("a",), "takes name=path"),
        (("=x",), "takes name=path"),
        (("a=",), "takes name=path"),
        (("{broken",), "takes name=path"),
        ((7,), "takes name=path"),
        (({"name": "a"},), "takes name=path"),
        (({"name": "a", "path": "x", "rank": 8},), "has no key rank"),
        (("a=x", "a=y"), "names 'a' twice"),
    ],
)
def test_an_adapter_that_is_named_badly_is_refused(raw: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=rf"^--lora-modules {words}.*\.$"):
        EngineConfig(lora_modules=raw)


def test_an_empty_word_is_no_adapter() -> None:
    assert EngineConfig(lora_modules=["", "a=x"]).lora_modules == (LoraModule("a", "x"),)  # type: ignore[arg-type]


def test_adapters_may_be_given_as_a_dict() -> None:
    given: Any = {"a": "x", "b": "y"}
    assert EngineConfig(lora_modules=given).lora_modules == (LoraModule("a", "x"), LoraModule("b", "y"))
