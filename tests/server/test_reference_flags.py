"""A command line written for the reference starts here, or says in one sentence why it does not."""

from __future__ import annotations

import re

import pytest

from carpool.engine.errors import ConfigError
from carpool.engine.reference_options import ONE_ONLY, REFUSED, WITHOUT_MEANING
from carpool.server.cli import read_config
from carpool.server.options import OPTIONS, build_config
from carpool.server.reference_flags import MODEL_KEYS, OPPOSITES, OTHER_NAMES
from carpool.server.sources import from_arguments, from_environment, merged


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
        "access_log": False,
        "port": "1",
    }
    assert len(settings.ignored) == 9


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


def test_a_name_is_in_one_table_only() -> None:
    tables = (WITHOUT_MEANING, ONE_ONLY, REFUSED, OTHER_NAMES, OPPOSITES, MODEL_KEYS, OPTIONS)
    names = [name for table in tables for name in table]
    assert len(names) == len(set(names))
    assert set(OTHER_NAMES.values()) <= {*WITHOUT_MEANING, *ONE_ONLY, *REFUSED, *OPTIONS}


def test_a_command_from_a_cluster_passes() -> None:
    command = (
        "m --download-dir /models --tokenizer-revision v1 --api-server-count 2 --max-model-len auto --revision None "
        "--kv-cache-dtype auto -O3 -cc.cudagraph_mode NONE --limit-mm-per-prompt.image 0 --nnodes 1 --node-rank 0 "
        "--cudagraph-capture-sizes 1 2 4 --max-num-queued-tokens 64k --no-enable-sleep-mode --enforce-eager true "
        "--allowed-methods GET POST --enable-expert-parallel -q int8 --disable-fastapi-docs --watermark 0.1"
    )
    settings = from_arguments(command.split())
    config = build_config(settings.values)
    assert not settings.deprecated
    assert len(settings.ignored) == 11
    assert (config.engine.download_dir, config.engine.tokenizer_revision) == ("/models", "v1")
    assert (config.engine.max_model_len, config.engine.revision) == (None, None)
    assert (config.engine.max_queued_tokens, config.engine.quantization) == (64000, "int8")
    assert (config.api_workers, config.docs, config.allowed_methods) == (2, False, ("GET", "POST"))


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_must_not_be_passed_over_is_refused_with_a_way_out(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_arguments(["m", "--" + name.replace("_", "-"), "x"])
    assert str(caught.value) == f"--{name.replace('_', '-')} is not served: {REFUSED[name]}"
    assert from_arguments(["m", "--no-" + name.replace("_", "-")]).ignored


@pytest.mark.parametrize("value", ["None", "false"])
def test_what_is_refused_may_be_said_not_to_be_wanted(value: str) -> None:
    settings = from_arguments(["--hf-token", value, "--middleware=" + value, "m"])
    assert settings.values == {"model": "m"}
    assert settings.ignored == ["--hf-token", "--middleware"]


@pytest.mark.parametrize(
    ("words", "docs"),
    [
        (["--disable-fastapi-docs"], False),
        (["--disable-fastapi-docs=false"], True),
        (["--no-disable-fastapi-docs"], True),
    ],
)
def test_the_contrary_of_a_switch_of_ours_is_understood(words: list[str], docs: bool) -> None:
    assert build_config(from_arguments(words).values).docs is docs


def test_keys_of_the_model_that_once_were_flags_are_overrides() -> None:
    settings = from_arguments(["--rope-theta", "5e5", "--rope-scaling", '{"rope_type": "yarn"}'])
    assert settings.values == {
        "hf_overrides": {"rope_theta": 5e5, "rope_scaling": {"rope_type": "yarn"}},
    }
    assert settings.deprecated[0] == "--rope-theta is deprecated; use --hf-overrides.rope_theta."
    dotted = from_arguments(["--rope-scaling.rope_type", "yarn", "--rope-scaling.factor", "2"])
    assert dotted.values == {"hf_overrides": {"rope_scaling": {"rope_type": "yarn", "factor": 2}}}
    assert not from_arguments(["--rope-scaling", "None", "--rope-theta="]).values


def test_the_references_key_guards_this_server_too() -> None:
    theirs = from_environment({"VLLM_API_KEY": "a,b"})
    assert build_config(theirs.values).api_key == ("a,b",)
    assert theirs.deprecated == ["VLLM_API_KEY is taken for CARPOOL_API_KEY; set that."]
    both = from_environment({"VLLM_API_KEY": "a", "CARPOOL_API_KEY": "b"})
    assert (both.values["api_key"], both.deprecated) == (["b"], [])
    line = from_arguments(["--api-key", "c"])
    assert merged([theirs, line])["api_key"] == ["c"]
    assert not from_environment({"VLLM_API_KEY": ""}).values


@pytest.mark.parametrize("line", ["--data-parallel-size 2", "-dp 2", "-dp=2", "--dp 2"])
def test_copies_of_the_model_are_counted_as_the_reference_counts_them(line: str) -> None:
    settings = from_arguments(line.split())
    assert (settings.values, settings.ignored, settings.deprecated) == ({"data_parallel_size": "2"}, [], [])
    assert build_config(settings.values).engine.data_parallel_size == 2


@pytest.mark.parametrize(
    "line", ["--data-parallel-rank 0", "-dpn 0", "--data-parallel-size-local=1", "-dpl 1", "-dpr 0"]
)
def test_a_place_among_copies_that_asks_for_nothing_is_no_place(line: str) -> None:
    settings = from_arguments(["--port", "1", *line.split(), "--host", "h"])
    assert settings.values == {"port": "1", "host": "h"}
    name, value = re.split("[ =]", line)
    with pytest.raises(ConfigError, match="is not served: carpool runs on one machine"):
        from_arguments([name, str(int(value) + 1)])


@pytest.mark.parametrize(
    ("variable", "value", "values"),
    [
        ("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "True", {"allow_runtime_lora_updating": True}),
        ("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "0", {}),
        ("VLLM_SERVER_DEV_MODE", "1", {"allow_cache_reset": True}),
        ("VLLM_SERVER_DEV_MODE", "", {}),
    ],
)
def test_what_the_references_operators_allow_in_the_environment_is_allowed(
    variable: str, value: str, values: dict[str, bool]
) -> None:
    settings = from_environment({variable: value})
    assert settings.values == values
    assert len(settings.deprecated) == len(values)
    for name in values:
        ours = f"CARPOOL_{name.upper()}"
        assert settings.deprecated == [f"{variable} is taken for {ours}; set that."]
        assert from_environment({variable: value, ours: "false"}).values == {name: "false"}
        config = build_config(settings.values)
        assert config.allow_cache_reset or config.engine.allow_runtime_lora_updating


def test_a_short_name_without_its_value_is_refused() -> None:
    with pytest.raises(ConfigError, match="-dp needs a value"):
        from_arguments(["-dp"])


@pytest.mark.parametrize("flag", ["--tensor-parallel-size", "-tp", "--pipeline-parallel-size", "-dcp", "-n"])
def test_more_than_one_device_is_refused(flag: str) -> None:
    with pytest.raises(ConfigError, match=r"(parallel-size|nnodes) must be 1, got 2"):
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


def test_a_command_of_teis_passes() -> None:
    command = (
        "--model-id m --revision main --hostname 0.0.0.0 -p 3000 --max-batch-tokens 16384 --max-batch-requests 64 "
        "--payload-limit 2000000 --cors-allow-origin http://a --served-model-name s --tokenization-workers 4 "
        "--max-client-batch-size 32 --json-output --huggingface-hub-cache /data --dtype float32 --auto-truncate=false"
    )
    settings = from_arguments(command.split())
    config = build_config(settings.values)
    assert (config.engine.model, config.host, config.port) == ("m", "0.0.0.0", 3000)
    assert (config.engine.max_num_batched_tokens, config.engine.max_num_seqs) == (16384, 64)
    assert (config.max_body_size, config.allowed_origins) == (2_000_000, ("http://a",))
    assert config.engine.download_dir == "/data"
    assert settings.ignored == [
        "--tokenization-workers",
        "--max-client-batch-size",
        "--json-output",
        "--auto-truncate",
    ]


def test_a_command_of_infinitys_passes() -> None:
    command = (
        "--model-id m --batch-size 16 --engine torch --device cpu --no-bettertransformer --no-model-warmup "
        "--url-prefix /v1 --lengths-via-tokenize --no-compile --port 7997 --log-level info"
    )
    settings = from_arguments(command.split())
    config = build_config(settings.values)
    assert (config.engine.model, config.engine.max_num_seqs, config.root_path) == ("m", 16, "/v1")
    assert len(settings.ignored) == 5


def test_several_models_are_refused() -> None:
    for line in ("--model-id a --model-id b", "--model a --model-id b"):
        with pytest.raises(ConfigError, match=r"^One server serves one model, and two are named"):
            from_arguments(line.split())
    assert from_arguments(["--model-id", "a", "--model", "a"]).values == {"model": "a"}


def test_infinitys_key_guards_this_server_too() -> None:
    assert from_environment({"INFINITY_API_KEY": "a"}).values == {"api_key": ["a"]}


def test_a_model_that_is_named_where_nobody_looks_is_told_of() -> None:
    for name in ("MODEL_ID", "INFINITY_MODEL_ID"):
        assert from_environment({name: "m"}).values == {}
        assert told({name: "m"}) == [f"{name} is not read here; give MODEL, or set CARPOOL_MODEL."]
        assert not told({name: "m", "CARPOOL_MODEL": "n"})
        assert not told({name: "m"}, "n")


def test_a_key_that_guards_nothing_is_told_of_where_it_must_be_teis() -> None:
    teis = {"MODEL_ID": "m", "API_KEY": "k"}
    assert told(teis, "m") == ["API_KEY is not read here, and anyone may ask; set CARPOOL_API_KEY."]
    assert not told({**teis, "CARPOOL_API_KEY": "k"}, "m")
    assert not told(teis, "m", "--api-key", "k")
    assert not told({"API_KEY": "k"}, "m")


def told(environment: dict[str, str], *arguments: str) -> list[str]:
    """What the log says of these at start."""
    return [
        sentence for settings in read_config(arguments, environment)[1] for sentence in settings.deprecated
    ]
