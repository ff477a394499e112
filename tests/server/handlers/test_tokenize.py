"""/tokenize and /detokenize."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from carpool.engine.errors import InvalidInput
from fakes import FAKE_MODEL, FakeEngine
from serving import Served, assert_error, serving


async def test_a_prompt_becomes_ids(served: Served) -> None:
    answer = await served.post("/tokenize", {"prompt": "ab"})
    assert answer.json == {"count": 4, "max_model_len": 256, "tokens": [101, 97, 98, 102], "token_strs": None}


async def test_special_tokens_can_be_left_out_and_texts_asked_for(served: Served) -> None:
    asked = {"prompt": "ab", "add_special_tokens": False, "return_token_strs": True}
    assert (await served.post("/tokenize", asked)).json["token_strs"] == ["a", "b"]


async def test_a_chat_is_rendered_and_then_tokenised() -> None:
    async with serving(engine=FakeEngine(replace(FAKE_MODEL, chat_template=True))) as server:
        chat = {"messages": [{"role": "a", "content": "b"}], "return_token_strs": True}
        assert (await server.post("/tokenize", chat)).json["token_strs"] == list("<a>b>")
        asked = {**chat, "add_generation_prompt": False, "add_special_tokens": True}
        assert (await server.post("/tokenize", asked)).json["token_strs"] == ["e", *"<a>b", "f"]
        asked = {**chat, "continue_final_message": True, "prompt": "unread"}
        assert (await server.post("/tokenize", asked)).json["token_strs"][:4] == list("<a>b")


async def test_tools_are_told_of() -> None:
    async with serving(engine=FakeEngine(replace(FAKE_MODEL, chat_template=True))) as server:
        tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
        asked = {"messages": [{"role": "a", "content": "b"}], "tools": [tool], "return_token_strs": True}
        text = "".join((await server.post("/tokenize", asked)).json["token_strs"])
        whole = {"name": "f", "description": None, "parameters": {"type": "object"}}
        assert text == f"<a>b>{[{'type': 'function', 'function': whole}]}"
        for tools, param in (
            ([{}], "tools[0]"),
            ([{"type": "retrieval"}], "tools[0]"),
            ([tool, {"function": {}}], "tools[1].function.name"),
            ([5], "tools[0]"),
            ({}, "tools"),
        ):
            answer = await server.post("/tokenize", {**asked, "tools": tools})
            assert_error(answer, 400, "BadRequestError", param)


async def test_text_that_the_engine_refuses_is_blamed_on_its_own_field(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def refuse(*_: Any) -> None:
        raise InvalidInput("input is no text.", "input")

    engine = FakeEngine(replace(FAKE_MODEL, chat_template=True))
    monkeypatch.setattr(engine, "tokenize", refuse)
    async with serving(engine=engine) as server:
        for body in ({"messages": [{"role": "a", "content": "b"}]}, {"prompt": "b"}):
            assert_error(await server.post("/tokenize", body), 400, "BadRequestError", *body)


async def test_there_is_no_length_limit(served: Served) -> None:
    assert (await served.post("/tokenize", {"prompt": "a" * 5000})).json["count"] == 5002


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "messages"),  # the model has no template
        ({"messages": []}, "messages"),
        ({"messages": [{"role": 5}]}, "messages[0].role"),
        ({"messages": [[{"role": "user", "content": "hi"}]]}, "messages[0]"),
    ],
)
async def test_what_is_no_prompt_is_refused(served: Served, body: Any, param: str) -> None:
    assert_error(await served.post("/tokenize", body), 400, "BadRequestError", param)


async def test_ids_become_text(served: Served) -> None:
    assert (await served.post("/detokenize", {"tokens": [97, "98", 99.0]})).json == {"prompt": "abc"}
    assert (await served.post("/detokenize", {"tokens": []})).json == {"prompt": ""}
    assert (await served.post("/detokenize", {"tokens": [99999999]})).json == {"prompt": ""}


@pytest.mark.parametrize(
    ("tokens", "param"), [([-1], "tokens[0]"), (["a"], "tokens[0]"), (5, "tokens"), (None, "tokens")]
)
async def test_what_are_no_ids_is_refused(served: Served, tokens: Any, param: str) -> None:
    assert_error(await served.post("/detokenize", {"tokens": tokens}), 400, "BadRequestError", param)


@pytest.mark.parametrize(
    ("path", "field"), [("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [97]})]
)
async def test_both_know_the_models_name(served: Served, path: str, field: dict[str, Any]) -> None:
    assert_error(await served.post(path, {"model": "nope", **field}), 404, "NotFoundError", "model")
