"""Options come from the fields, and each kind of field reads its values."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from carpool.engine.config import EngineConfig, LoraModule, PoolerConfig
from carpool.engine.errors import ConfigError
from carpool.server.config import ServerConfig
from carpool.server.options import OPTIONS, build_config, nearest, options_of


def test_every_field_is_an_option_with_a_help_sentence() -> None:
    fields = {field.name for config in (ServerConfig, EngineConfig) for field in dataclasses.fields(config)}
    assert set(OPTIONS) == fields - {"engine"}
    for option in [*OPTIONS.values(), *options_of(PoolerConfig).values()]:
        assert option.help.endswith("."), option.name


def test_defaults_are_the_configurations_own() -> None:
    assert build_config({}) == ServerConfig()


@pytest.mark.parametrize(
    ("name", "raw", "value"),
    [
        ("port", "9000", 9000),
        ("port", 9000, 9000),
        ("max_model_len", "8k", 8000),
        ("max_model_len", "8K", 8192),
        ("max_model_len", "25.6k", 25_600),
        ("max_model_len", "1.5K", 1536),
        ("max_model_len", "auto", None),
        ("max_model_len", "-1", None),
        ("max_num_batched_tokens", "1m", 1_000_000),
        ("max_num_batched_tokens", "1t", 10**12),
        ("max_body_size", "1.5 MiB", 3 << 19),
        ("max_body_size", "64MiB", 64 << 20),
        ("max_body_size", "10MB", 10_000_000),
        ("max_body_size", "1k", 1024),
        ("max_body_size", "2 gib", 2 << 30),
        ("max_body_size", "123", 123),
        ("shutdown_timeout", "2.5", 2.5),
        ("shutdown_timeout", 3, 3.0),
        ("trust_remote_code", "true", True),
        ("trust_remote_code", True, True),
        ("trust_remote_code", "off", False),
        ("enable_prefix_caching", None, None),
        ("enable_prefix_caching", "false", False),
        ("enable_chunked_prefill", True, True),
        ("kv_cache_memory_bytes", 1_000_000, 1_000_000),
        ("kv_cache_memory_bytes", "512M", 512 << 20),
        ("kv_cache_memory_bytes", "1g", 10**9),
        ("cache_size", 0, 0),
        ("cache_size", "512M", 512 << 20),
        ("cache_size", "1G", 1 << 30),
        ("cache_size", "64MiB", 64 << 20),
        ("error_format", "openai", "openai"),
        ("revision", 12, "12"),
        ("revision", None, None),
        ("served_model_name", ["a", "b"], ("a", "b")),
        ("served_model_name", "a", ("a",)),
        ("api_key", [123], ("123",)),
        ("lora_modules", "a=/x", (LoraModule("a", "/x"),)),
        (
            "lora_modules",
            ["a=x=y", {"name": "b", "path": "z"}],
            (LoraModule("a", "x=y"), LoraModule("b", "z")),
        ),
        ("lora_modules", '{"name": "a", "path": "x", "base_model_name": "m"}', (LoraModule("a", "x"),)),
        ("hf_overrides", {"is_matryoshka": True}, {"is_matryoshka": True}),
        (
            "pooler_config",
            {"pooling-type": "CLS", "dimensions": "32"},
            PoolerConfig(pooling_type="CLS", dimensions=32),
        ),
        (
            "pooler_config",
            {"returned_token_ids": [1, "2"], "task": "token_classify", "logit_sigma": "0.5"},
            PoolerConfig(returned_token_ids=(1, 2), task="token_classify", logit_sigma=0.5),
        ),
        (
            "pooler_config",
            {"enable_flash_late_interaction": True, "logit_scale": 2},
            PoolerConfig(enable_flash_late_interaction=True, logit_sigma=0.5),
        ),
        ("default_chat_template_kwargs", {"a": 1}, {"a": 1}),
        (
            "lora_modules",
            '{"name": "a", "path": "x", "is_3d_lora_weight": false}',
            (LoraModule("a", "x"),),
        ),
        ("convert", "reward", "reward"),
        ("chat_template", "{{ messages }}", "{{ messages }}"),
    ],
)
def test_each_kind_reads_its_values(name: str, raw: Any, value: Any) -> None:
    config = build_config({name: raw})
    owner = config if hasattr(config, name) else config.engine
    assert getattr(owner, name) == value


@pytest.mark.parametrize(
    ("name", "raw", "sentence"),
    [
        ("port", "many", "--port must be an integer, got many."),
        ("port", True, "--port must be an integer, got True."),
        ("port", "", "--port must be an integer, got ''."),
        (
            "max_num_batched_tokens",
            "9223372036854775808",
            "--max-num-batched-tokens must be a number of 64 bits, got 9223372036854775808.",
        ),
        ("shutdown_timeout", " ", "--shutdown-timeout must be a number, got ' '."),
        ("dtype", "", "--dtype must be one of auto, float32, float, bfloat16, float16, half, got ''."),
        ("port", 1.5, "--port must be an integer, got 1.5."),
        ("max_body_size", "64 stones", "--max-body-size must be a size such as 64MiB, got 64 stones."),
        ("shutdown_timeout", True, "--shutdown-timeout must be a number, got True."),
        ("shutdown_timeout", "soon", "--shutdown-timeout must be a number, got soon."),
        ("max_model_len", "25.6", "--max-model-len must be an integer, got 25.6."),
        ("max_model_len", "25.6K", "--max-model-len must be an integer, got 25.6K."),
        ("max_num_seqs", "auto", "--max-num-seqs must be an integer, got auto."),
        ("trust_remote_code", "maybe", "--trust-remote-code must be true or false, got maybe."),
        ("error_format", "xml", "--error-format must be one of flat, openai, got xml."),
        ("host", ["a"], "--host must be a text, got ['a']."),
        ("max_num_seqs", 0, "--max-num-seqs must be at least 1, got 0."),
        ("block_size", 0, "--block-size must be at least 1, got 0."),
        ("enable_prefix_caching", "auto", "--enable-prefix-caching must be true or false, got auto."),
        (
            "pooler_config",
            {"poling_type": 1},
            "Unknown --pooler-config key poling_type; did you mean pooling_type?",
        ),
        (
            "pooler_config",
            {"pooling_type": "MAX"},
            "--pooler-config.pooling_type must be one of CLS, LAST, MEAN, ALL, STEP, got MAX.",
        ),
    ],
)
def test_what_cannot_be_read_is_one_sentence(name: str, raw: Any, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_config({name: raw})
    assert str(caught.value) == sentence


def test_the_nearest_name_is_found_however_far() -> None:
    assert nearest("max_modl_len", OPTIONS) == "max_model_len"
    assert nearest("zzz", OPTIONS) in OPTIONS
