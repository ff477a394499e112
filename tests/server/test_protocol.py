"""What a decoded request asks of the engine."""

from __future__ import annotations

from typing import Any

import pytest

from carpool.engine.params import TokenizationParams
from carpool.server.errors import InvalidRequest
from carpool.server.protocol import EmbeddingRequest, TokenizeRequest


@pytest.mark.parametrize(
    ("value", "prompts"),
    [
        ("a", ["a"]),
        ("", [""]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        ([[]], [[]]),
        ([1, "2"], [[1, 2]]),
    ],
)
def test_input_stands_for_a_list_of_prompts(value: Any, prompts: Any) -> None:
    assert EmbeddingRequest(input=value).prompts() == prompts


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({}, "input", "input is required."),
        ({"input": []}, "input", "You must pass at least one prompt"),
        ({"input": ["a", 1]}, "input[1]", "must be a text"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "messages", "does not take chat messages"),
        ({"messages": []}, "messages", "does not take chat messages"),
        (
            {"input": "a", "mm_processor_kwargs": {"a": 1}},
            "mm_processor_kwargs",
            "This model accepts text only.",
        ),
    ],
)
def test_there_must_be_something_to_run(fields: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        EmbeddingRequest(**fields).prompts()
    assert caught.value.param == param
    assert words in str(caught.value)


def test_input_wins_over_messages() -> None:
    assert EmbeddingRequest(input="a", messages=[{"role": "user", "content": "hi"}]).prompts() == ["a"]


@pytest.mark.parametrize("value", [[1], [[1]], [1, "2"]])
def test_token_ids_can_be_turned_away(value: Any) -> None:
    with pytest.raises(InvalidRequest, match="--no-token-id-input"):
        EmbeddingRequest(input=value).prompts(token_ids_allowed=False)
    assert EmbeddingRequest(input=["7"]).prompts(token_ids_allowed=False) == ["7"]


@pytest.mark.parametrize("name", ["use_activation", "normalize", "softmax", "activation"])
def test_all_names_of_the_activation_are_one(name: str) -> None:
    for value in (True, False, None):
        asked = EmbeddingRequest()
        setattr(asked, name, value)
        assert asked.pooling().use_activation is value


def test_tokenization_defaults() -> None:
    assert EmbeddingRequest().tokenization() == TokenizationParams()
    assert EmbeddingRequest(add_special_tokens=False).tokenization() == TokenizationParams(
        add_special_tokens=False
    )


def test_tokenize_wants_a_prompt() -> None:
    assert TokenizeRequest(prompt="").text() == ""
    for request, param in ((TokenizeRequest(), "prompt"), (TokenizeRequest(messages=[]), "messages")):
        with pytest.raises(InvalidRequest) as caught:
            request.text()
        assert caught.value.param == param
