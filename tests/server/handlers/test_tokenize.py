"""/tokenize and /detokenize."""

from __future__ import annotations

import asyncio
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


# ── as Text Embeddings Inference has them ────────────────────────────────────────────────────────────────────


def named(token: int, text: str, start: int | None = None, stop: int | None = None) -> dict[str, Any]:
    return {"id": token, "text": text, "special": start is None, "start": start, "stop": stop}


async def test_inputs_are_answered_token_by_token(served: Served) -> None:
    cls, sep = named(101, "[CLS]"), named(102, "[SEP]")
    found = (await served.post("/tokenize", {"inputs": ["ab", "c"]})).json
    assert found == [[cls, named(97, "a", 0, 1), named(98, "b", 1, 2), sep], [cls, named(99, "c", 0, 1), sep]]
    bare = {"inputs": "", "add_special_tokens": False}
    assert (await served.post("/tokenize", bare)).json == [[]]


async def test_places_are_counted_in_bytes(served: Served) -> None:
    [tokens] = (await served.post("/tokenize", {"inputs": "aé文b", "add_special_tokens": False})).json
    assert [(token["start"], token["stop"]) for token in tokens] == [(0, 1), (1, 3), (3, 6), (6, 7)]
    text = "aé文b".encode()
    assert [text[token["start"] : token["stop"]].decode() for token in tokens] == list("aé文b")


async def test_a_prompt_by_name_goes_before() -> None:
    async with serving(engine=FakeEngine(replace(FAKE_MODEL, prompts={"query": "Q"}))) as server:
        asked = {"inputs": "a", "prompt_name": "query", "add_special_tokens": False}
        [tokens] = (await server.post("/tokenize", asked)).json
        assert [token["text"] for token in tokens] == ["Q", "a"]
        unknown = await server.post("/tokenize", {**asked, "prompt_name": "nope"})
        assert_error(unknown, 400, "BadRequestError", "prompt_name")


async def test_a_long_text_is_answered_in_full(served: Served) -> None:
    found = (await served.post("/tokenize", {"inputs": ["a" * 20_000, "b"]})).json
    assert list(map(len, found)) == [20_002, 3]


async def test_where_a_prompt_is_given_inputs_are_not_read(served: Served) -> None:
    assert (await served.post("/tokenize", {"prompt": "ab", "inputs": 5})).json["count"] == 4


async def test_ids_are_decoded_text_by_text(served: Served) -> None:
    assert (await served.post("/decode", {"ids": [101, 97, 98, 102]})).json == ["ab"]
    assert (await served.post("/decode", {"ids": [[97], ["98", 99.0], []]})).json == ["a", "bc", ""]
    kept = {"ids": [101, 97], "skip_special_tokens": False}
    assert (await served.post("/decode", kept)).json == ["ea"]


async def test_others_have_their_turn_between_many_lists_of_ids(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns, seen = 0, set()

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def watched(*_: object) -> str:
        seen.add(turns)
        return ""

    monkeypatch.setattr(served.engine, "detokenize", watched)
    other = asyncio.ensure_future(others())
    assert len((await served.post("/decode", {"ids": [[97]] * 1000})).json) == 1000
    other.cancel()
    assert len(seen) >= 10


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {"inputs": []}, "inputs"),
        ("/tokenize", {"inputs": [5]}, "inputs[0]"),
        ("/tokenize", {"inputs": {}}, "inputs"),
        ("/decode", {}, "ids"),
        ("/decode", {"ids": []}, "ids"),
        ("/decode", {"ids": "a"}, "ids"),
        ("/decode", {"ids": ["a"]}, "ids"),
        ("/decode", {"ids": [-1]}, "ids"),
        ("/decode", {"ids": [[5], [-1]]}, "ids"),
        ("/decode", {"ids": [[5], 6]}, "ids[1]"),
    ],
)
async def test_what_is_neither_text_nor_ids_is_refused(
    served: Served, path: str, body: dict[str, Any], param: str
) -> None:
    assert_error(await served.post(path, body), 400, "BadRequestError", param)


@pytest.mark.parametrize(("path", "body"), [("/tokenize", {"inputs": "a"}), ("/decode", {"ids": [5]})])
async def test_these_know_the_models_name_too(served: Served, path: str, body: dict[str, Any]) -> None:
    assert_error(await served.post(path, {"model": "nope", **body}), 404, "NotFoundError", "model")
