"""Command line, environment and YAML: three spellings of one set of options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from carpool.engine.errors import ConfigError
from carpool.server.options import build_config
from carpool.server.sources import from_arguments, from_environment, from_yaml, merged


def arguments(line: str) -> dict[str, Any]:
    return from_arguments(line.split()).values


@pytest.mark.parametrize(
    ("line", "values"),
    [
        ("", {}),
        ("some/model", {"model": "some/model"}),
        ("--model some/model", {"model": "some/model"}),
        ("m --port 1", {"model": "m", "port": "1"}),
        ("--port=1 m", {"model": "m", "port": "1"}),
        ("--max-model-len 8k", {"max_model_len": "8k"}),
        ("--max_model_len 8k", {"max_model_len": "8k"}),
        ("--trust-remote-code m", {"trust_remote_code": True, "model": "m"}),
        ("--no-trust-remote-code", {"trust_remote_code": False}),
        ("--no-token-id-input", {"token_id_input": False}),
        ("--no_token_id_input", {"token_id_input": False}),
        ("--enable-prefix-caching m", {"enable_prefix_caching": True, "model": "m"}),
        ("--no-enable-prefix-caching", {"enable_prefix_caching": False}),
        ("--trust-remote-code=false", {"trust_remote_code": "false"}),
        ("--served-model-name a b --port 1", {"served_model_name": ["a", "b"], "port": "1"}),
        ("--served-model-name a --served-model-name b", {"served_model_name": ["a", "b"]}),
        ("--served-model-name=a", {"served_model_name": ["a"]}),
        ("--api-key a some/m --api-key b", {"api_key": ["a", "b"], "model": "some/m"}),
        (
            "--served-model-name x -dp 4 m",
            {"served_model_name": ["x"], "data_parallel_size": "4", "model": "m"},
        ),
        ("m --api-key a b --port 1", {"api_key": ["a", "b"], "model": "m", "port": "1"}),
        ('--api-key ["a","b"]', {"api_key": ["a", "b"]}),
        ('--hf-overrides {"a":1}', {"hf_overrides": {"a": 1}}),
        ('--hf-overrides {"a":1} --hf-overrides.b true', {"hf_overrides": {"a": 1, "b": True}}),
        (
            "--hf-overrides.a.b-c.d 1 --hf-overrides.a.e x",
            {"hf_overrides": {"a": {"b-c": {"d": 1}, "e": "x"}}},
        ),
        ("--hf_overrides.a=x", {"hf_overrides": {"a": "x"}}),
        ("--hf-overrides.a+ 1 --hf-overrides.a+=b,2", {"hf_overrides": {"a": [1, "b", 2]}}),
        ("--chat-template None --max-model-len=", {"chat_template": None, "max_model_len": None}),
        ("--pooler-config None --hf-overrides=", {"pooler_config": {}, "hf_overrides": {}}),
        ("--trust-remote-code true m", {"trust_remote_code": "true", "model": "m"}),
        ('--pooler-config {"pooling_type":"CLS"}', {"pooler_config": {"pooling_type": "CLS"}}),
        ("--pooler-config.pooling_type MEAN", {"pooler_config": {"pooling_type": "MEAN"}}),
        ("--port 1 --port 2", {"port": "2"}),
        ("--config a.yaml", {"config": "a.yaml"}),
        ("--runner pooling --convert embed", {"runner": "pooling", "convert": "embed"}),
    ],
)
def test_a_command_line_is_read(line: str, values: dict[str, Any]) -> None:
    assert arguments(line) == values


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("--max-modl-len 8k", "Unknown flag --max-modl-len; did you mean --max-model-len?"),
        ("--no-trust-remote-cod", "Unknown flag --no-trust-remote-cod; did you mean --no-trust-remote-code?"),
        ("--no-port", "Unknown flag --no-port; did you mean --port?"),
        ("--hlp", "Unknown flag --hlp; did you mean --help?"),
        ("--port.x 1", "Unknown flag --port.x; did you mean --port?"),
        ("--max-model", "Unknown flag --max-model; did you mean --max-model-len?"),
        ("-x", "Unknown flag --x; did you mean --"),
        ("--port", "--port needs a value."),
        ("--port --host a", "--port needs a value."),
        ("--served-model-name", "--served-model-name needs a value."),
        ("--api-key a some/m n", "Unexpected argument n: the model is given already."),
        (
            "--api-key a b",
            "Is the second word after --api-key one of its values, or MODEL? Write MODEL before",
        ),
        ("a b", "Unexpected argument b: the model is given already."),
        ("--hf-overrides [1]", "--hf-overrides must be a JSON object, got [1]."),
        (
            "--hf-overrides.a 1 --hf-overrides.a+ 2",
            "--hf-overrides has a value at a that is no list to add to.",
        ),
        ("--hf-overrides {", "--hf-overrides must be a JSON object, got {."),
        ("--api-key [a", "--api-key starts like a JSON list and is none."),
        (
            "--hf-overrides.a 1 --hf-overrides.a.b 2",
            "--hf-overrides has a value at a and cannot have keys below it.",
        ),
    ],
)
def test_a_mistake_is_one_sentence(line: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        arguments(line)
    assert str(caught.value).startswith(sentence)


def test_a_flags_value_may_start_with_a_dash() -> None:
    assert from_arguments(["--seed", "-1"]).ignored == ["--seed"]
    assert arguments("--api-key -secret") == {"api_key": ["-secret"]}


def test_the_environment_is_read() -> None:
    settings = from_environment(
        {
            "CARPOOL_PORT": "1",
            "CARPOOL_API_KEY": "a, b",
            "CARPOOL_SERVED_MODEL_NAME": '["x,y"]',
            "CARPOOL_HF_OVERRIDES": '{"a": 1}',
            "CARPOOL_TOKEN_ID_INPUT": "false",
            "CARPOOL_ENFORCE_EAGER": "1",
            "HOME": "/root",
        }
    )
    assert settings.values == {
        "port": "1",
        "api_key": ["a", "b"],
        "served_model_name": ["x,y"],
        "hf_overrides": {"a": 1},
        "token_id_input": "false",
    }
    assert settings.ignored == ["--enforce-eager"]


def test_what_is_left_to_the_model_can_be_said_in_every_place(tmp_path: Path) -> None:
    path = tmp_path / "carpool.yaml"
    for text, environment, line, value in (
        ("enable-prefix-caching: true", "true", "--enable-prefix-caching", True),
        ("enable_prefix_caching: false", "0", "--no-enable-prefix-caching", False),
    ):
        path.write_text(text)
        from_file = from_yaml(str(path)).values
        from_variable = from_environment({"CARPOOL_ENABLE_PREFIX_CACHING": environment}).values
        for values in (from_file, from_variable, arguments(line)):
            assert build_config(values).engine.enable_prefix_caching is value
    assert build_config({}).engine.enable_prefix_caching is None


def test_an_unknown_variable_is_named() -> None:
    with pytest.raises(ConfigError) as caught:
        from_environment({"CARPOOL_PROT": "1"})
    assert str(caught.value) == "Unknown environment variable CARPOOL_PROT; did you mean CARPOOL_PORT?"


def test_what_kubernetes_sets_for_a_service_of_our_name_is_not_ours() -> None:
    environment = {
        "CARPOOL_SERVICE_HOST": "10.0.0.1",
        "CARPOOL_SERVICE_PORT": "8000",
        "CARPOOL_SERVICE_PORT_HTTP": "8000",
        "CARPOOL_PORT": "tcp://10.0.0.1:8000",
        "CARPOOL_PORT_8000_TCP": "tcp://10.0.0.1:8000",
        "CARPOOL_PORT_8000_TCP_ADDR": "10.0.0.1",
    }
    assert from_environment(environment).values == {}


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("CARPOOL_EMBED_SERVICE_HOST", "10.0.0.1"),
        ("CARPOOL_EMBED_SERVICE_HOST", "fd00::1"),
        ("CARPOOL_EMBED_SERVICE_PORT", "80"),
        ("CARPOOL_EMBED_SERVICE_PORT_HTTP", "80"),
        ("CARPOOL_EMBED_PORT", "tcp://10.0.0.1:80"),
        ("CARPOOL_EMBED_PORT_80_TCP", "tcp://10.0.0.1:80"),
        ("CARPOOL_EMBED_PORT_80_TCP_PROTO", "tcp"),
        ("CARPOOL_EMBED_PORT_80_TCP_PORT", "80"),
        ("CARPOOL_EMBED_PORT_80_TCP_ADDR", "10.0.0.1"),
        ("CARPOOL_MY_2ND_SERVICE_HOST", "10.0.0.1"),
        ("CARPOOL_PORT_53_UDP", "udp://10.0.0.1:53"),
    ],
)
def test_nor_what_it_sets_for_services_whose_names_begin_with_ours(variable: str, value: str) -> None:
    assert from_environment({variable: value}).values == {}


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("CARPOOL_EMBED_PORT", "80"),
        ("CARPOOL_EMBED_SERVICE_HOST", "a name"),
        ("CARPOOL_EMBED_SERVICE_PORT", "http"),
        ("CARPOOL_EMBED_SERVICE_PORTS", "80"),
        ("CARPOOL_PORT_80_TCP_ADR", "10.0.0.1"),
        ("CARPOOL_embed_SERVICE_HOST", "10.0.0.1"),
    ],
)
def test_what_only_looks_like_it_is_an_unknown_variable(variable: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"Unknown environment variable {variable.upper()}"):
        from_environment({variable: value})


def test_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "carpool.yaml"
    path.write_text(
        "model: some/model\nport: 1\nmax-model-len: 8k\nserved_model_name: [a, b]\napi-key: k\n"
        "pooler-config: {pooling_type: CLS}\nhf-overrides.is_matryoshka: true\nno-token-id-input: true\nrevision:\n"
        "hf-overrides.ids+: [1, 2]\n"
    )
    assert from_yaml(str(path)).values == {
        "model": "some/model",
        "port": 1,
        "max_model_len": "8k",
        "served_model_name": ["a", "b"],
        "api_key": ["k"],
        "pooler_config": {"pooling_type": "CLS"},
        "hf_overrides": {"is_matryoshka": True, "ids": [1, 2]},
        "token_id_input": False,
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prot: 1", "; did you mean port?"),
        ("- a", "must hold keys"),
        ("a: [", "not valid YAML"),
        ("\x00", "not valid"),
    ],
)
def test_a_files_mistakes_are_named(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "carpool.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        from_yaml(str(path))
    assert words in str(caught.value)
    assert str(path) in str(caught.value)


def test_an_empty_file_says_nothing_and_a_missing_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("")
    assert from_yaml(str(tmp_path / "empty.yaml")).values == {}
    with pytest.raises(ConfigError, match=r"Cannot read --config .*missing.yaml: No such file or directory"):
        from_yaml(str(tmp_path / "missing.yaml"))


def test_later_sources_win_and_objects_are_merged() -> None:
    file = from_arguments(
        ["--port", "1", "--host", "a", "--hf-overrides", '{"a": 1, "b": 1}', "--api-key", "x"]
    )
    line = from_arguments(["--port", "2", "--hf-overrides.b", "2", "--api-key", "y"])
    assert merged([file, line]) == {
        "port": "2",
        "host": "a",
        "hf_overrides": {"a": 1, "b": 2},
        "api_key": ["y"],
    }


def test_objects_in_objects_are_merged_too() -> None:
    words = ["--hf-overrides", '{"rope": {"a": 1, "x": {"y": 1}}, "n": {"m": 1}}']
    more = ["--hf-overrides", '{"rope": {"b": 2, "x": {"z": 2}}, "n": 5}']
    both = {"rope": {"a": 1, "b": 2, "x": {"y": 1, "z": 2}}, "n": 5}
    assert from_arguments(words + more).values == {"hf_overrides": both}
    first, second = from_arguments(words), from_arguments(more)
    assert merged([first, second]) == {"hf_overrides": both}
    assert first.values["hf_overrides"]["rope"] == {"a": 1, "x": {"y": 1}}, "what was given stays as it was"


def test_adapters_come_by_word_repeated_flag_object_and_environment() -> None:
    words = [
        "m",
        "--lora-modules",
        "a=x",
        '{"name": "b", "path": "y"}',
        "--lora-modules",
        "c=z",
        "--port",
        "1",
    ]
    given = ["a=x", '{"name": "b", "path": "y"}', "c=z"]
    assert from_arguments(words).values == {"model": "m", "lora_modules": given, "port": "1"}
    for text, listed in (
        ("a=x, c=z", ["a=x", "c=z"]),
        ('{"name": "b", "path": "y"}', ['{"name": "b", "path": "y"}']),
        ('["a=x", {"name": "b", "path": "y"}]', ["a=x", {"name": "b", "path": "y"}]),
    ):
        assert from_environment({"CARPOOL_LORA_MODULES": text}).values == {"lora_modules": listed}
