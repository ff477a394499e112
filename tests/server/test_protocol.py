"""What a decoded request asks of the engine."""

from __future__ import annotations

from typing import Any

import pytest

from carpool.engine.errors import InvalidInput
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
        ({"input": [[1], [{"role": "user"}]]}, "input[1][0]", "must be a token id"),
        ({"input": [[], [{"role": "user"}]]}, "input", "must be texts or token ids here"),
    ],
)
def test_there_must_be_something_to_run(fields: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        EmbeddingRequest(**fields).prompts()
    assert caught.value.param == param
    assert words in str(caught.value)


HI: list[Any] = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("fields", "conversations"),
    [
        ({"messages": HI}, [HI]),
        ({"messages": [HI, HI]}, [HI, HI]),
        ({"input": HI}, [HI]),
        ({"input": [HI, HI]}, [HI, HI]),
        ({"input": "a", "messages": HI}, [HI]),
        ({"messages": [{"role": "anything", "content": None}]}, [[{"role": "anything", "content": None}]]),
        ({"messages": [{"role": "a", "content": ["b", {"type": "text", "text": "c"}]}]}, ...),
    ],
)
def test_chats_may_stand_in_both_fields_and_messages_win(fields: dict[str, Any], conversations: Any) -> None:
    asked = EmbeddingRequest(**fields)
    assert asked.is_chat
    assert not asked.tokenization().add_special_tokens
    assert asked.conversations() == ([fields["messages"]] if conversations is ... else conversations)


@pytest.mark.parametrize(
    ("messages", "param", "words"),
    [
        ([], "messages", "must not be empty"),
        ([[]], "messages[0]", "must not be empty"),
        ([{}], "messages[0].role", "must be a string, got null"),
        ([{"role": 5}], "messages[0].role", "must be a string, got 5"),
        ([HI[0], HI], "messages[1]", "must be a chat message"),
        ([HI, HI[0]], "messages[0]", "must be a chat message"),
        ([{"role": "a", "content": 5}], "messages[0].content", "a text or a list of parts"),
        ([{"role": "a", "content": [5]}], "messages[0].content[0]", "must be a text part"),
        ([{"role": "a", "content": [{"type": "text"}]}], "messages[0].content[0]", "its text a string"),
        ([{"role": "a", "content": [{"type": "image_url"}]}], "messages[0].content[0]", "accepts text only"),
    ],
)
def test_what_is_no_chat_is_refused(messages: Any, param: str, words: str) -> None:
    with pytest.raises((InvalidRequest, InvalidInput), match=words) as caught:
        EmbeddingRequest(messages=messages).conversations()
    assert getattr(caught.value, "param", None) == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"media_io_kwargs": {"image": {}}}, "media_io_kwargs"),
        ({"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message"),
    ],
)
def test_how_a_chat_is_rendered_has_its_limits(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        EmbeddingRequest(messages=HI, **fields).rendering()
    assert caught.value.param == param


def test_multimodal_options_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="text only"):
        EmbeddingRequest(input="a", mm_processor_kwargs={"a": 1}).pooling()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"truncation": True}, (-1, None)),
        ({"truncation": "true"}, (-1, None)),
        ({"truncation": "END"}, (None, None)),
        ({"truncation": {"x": []}}, (None, None)),
        ({"truncate": True}, (-1, None)),
        ({"truncate": "END"}, (-1, None)),
        ({"truncate": "START"}, (-1, "left")),
        ({"truncate": "NONE"}, (None, None)),
        ({"truncate": {"x": []}}, (None, None)),
        ({"truncation": True, "truncate_prompt_tokens": 5}, (5, None)),
    ],
)
def test_other_vendors_words_for_truncation_are_understood(fields: dict[str, Any], expected: Any) -> None:
    params = EmbeddingRequest(input="a", **fields).tokenization()
    assert (params.truncate_prompt_tokens, params.truncation_side) == expected


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
    with pytest.raises(InvalidRequest) as caught:
        TokenizeRequest().text()
    assert caught.value.param == "prompt"
