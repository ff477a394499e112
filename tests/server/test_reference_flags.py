"""A command line written for the reference starts here, or says in one sentence why it does not."""

from __future__ import annotations

import pytest

from carpool.engine.errors import ConfigError
from carpool.engine.reference_options import ONE_ONLY, WITHOUT_MEANING
from carpool.server.options import OPTIONS, build_config
from carpool.server.sources import from_arguments


def test_a_typical_command_passes_with_its_flags_listed() -> None:
    command = (
        "m --runner pooling --enforce-eager --gpu-memory-utilization 0.9 --swap-space 4 --disable-log-requests "
        "--tensor-parallel-size 1 -pp 1 --no-enable-prefix-caching --enable-chunked-prefill --max-log-len=10 "
        "--seed 0 --load-format auto --uvicorn-log-level info --disable-uvicorn-access-log --port 1"
    )
    settings = from_arguments(command.split())
    assert settings.values == {
        "model": "m",
        "runner": "pooling",
        "gpu_memory_utilization": "0.9",
        "enable_prefix_caching": False,
        "enable_chunked_prefill": True,
        "port": "1",
    }
    assert len(settings.ignored) == 10


def test_a_command_with_a_cache_passes() -> None:
    command = (
        "m --enable-prefix-caching --enable-prompt-tokens-details --kv-cache-memory-bytes 2G --block-size 32 "
        "--long-prefill-token-threshold 1k --prefix-caching-hash-algo sha256"
    )
    settings = from_arguments(command.split())
    assert settings.ignored == ["--prefix-caching-hash-algo"]
    config = build_config(settings.values)
    assert config.enable_prompt_tokens_details
    assert config.engine.enable_prefix_caching is True
    assert config.engine.enable_chunked_prefill is None  # nobody said
    assert config.engine.kv_cache_memory_bytes == 2 << 30
    assert (config.engine.block_size, config.engine.long_prefill_token_threshold) == (32, 1000)


def test_a_command_with_adapters_passes() -> None:
    command = "m --enable-lora --max-loras 4 --max-lora-rank=64 --max-cpu-loras 8 --lora-dtype auto --lora-modules a=x"
    settings = from_arguments(command.split())
    assert settings.values == {"model": "m", "lora_modules": ["a=x"]}
    assert len(settings.ignored) == 5


def test_the_table_and_the_options_do_not_overlap() -> None:
    assert not (set(WITHOUT_MEANING) | set(ONE_ONLY)) & set(OPTIONS)


@pytest.mark.parametrize("line", ["--data-parallel-size 2", "-dp 2", "-dp=2", "--dp 2"])
def test_copies_of_the_model_are_counted_as_the_reference_counts_them(line: str) -> None:
    settings = from_arguments(line.split())
    assert (settings.values, settings.ignored, settings.deprecated) == ({"data_parallel_size": "2"}, [], [])
    assert build_config(settings.values).engine.data_parallel_size == 2


def test_a_short_name_without_its_value_is_refused() -> None:
    with pytest.raises(ConfigError, match="-dp needs a value"):
        from_arguments(["-dp"])


@pytest.mark.parametrize("flag", ["--tensor-parallel-size", "-tp", "--pipeline-parallel-size"])
def test_more_than_one_device_is_refused(flag: str) -> None:
    with pytest.raises(ConfigError, match=r"parallel-size must be 1, got 2"):
        from_arguments([flag, "2"])


@pytest.mark.parametrize(
    ("task", "convert"),
    [
        ("auto", "auto"),
        ("embed", "embed"),
        ("embedding", "embed"),
        ("classify", "classify"),
        ("score", "auto"),
        ("reward", "reward"),
    ],
)
def test_the_older_task_flag_is_translated(task: str, convert: str) -> None:
    settings = from_arguments(["--task", task])
    assert settings.values == {"runner": "pooling", "convert": convert}
    assert settings.deprecated == ["--task is deprecated; use --runner and --convert."]


def test_the_older_pooler_flag_is_translated() -> None:
    settings = from_arguments(["--override-pooler-config", '{"normalize": false}'])
    assert settings.values == {"pooler_config": {"normalize": False}}
    assert settings.deprecated == ["--override-pooler-config is deprecated; use --pooler-config."]
    assert from_arguments(["--override-pooler-config.normalize", "false"]).values == settings.values


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("--task generate", "--task generate: carpool serves pooling models only and generates no text."),
        ("--runner generate", "--runner generate: carpool serves pooling models only and generates no text."),
        (
            "--task dance",
            "--task must be one of auto, embed, embedding, classify, score, reward, got dance.",
        ),
        ("--task", "--task needs a value."),
    ],
)
def test_what_is_not_served_is_said(line: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_arguments(line.split())
    assert str(caught.value) == sentence
