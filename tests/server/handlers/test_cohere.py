"""POST /v2/embed, as Cohere's clients use it."""

from __future__ import annotations

import base64
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from carpool.engine.params import Matryoshka
from fakes import FAKE_MODEL, WIDTH, FakeEngine
from serving import Served, assert_error, serving

PATH = "/v2/embed"
PROMPTED = replace(FAKE_MODEL, prompts={"query": "Q: ", "document": ""})


async def embed(served: Served, **fields: Any) -> Any:
    answer = await served.post(PATH, {"texts": ["ab"], **fields})
    assert answer.status == 200, answer.json
    return answer.json


async def test_the_answer_is_the_documented_one(served: Served) -> None:
    body = await embed(served, texts=["ab", "c"])
    assert list(body) == ["id", "embeddings", "texts", "meta", "response_type"]
    assert body["id"].startswith("embd-")
    assert body["texts"] == ["ab", "c"]
    assert list(body["embeddings"]) == ["float"]
    assert [len(row) for row in body["embeddings"]["float"]] == [WIDTH, WIDTH]
    assert body["meta"] == {
        "api_version": {"version": "2"},
        "billed_units": {"input_tokens": 7, "image_tokens": 0},
    }
    assert body["response_type"] == "embeddings_by_type"


async def test_each_type_is_the_same_vector(served: Served) -> None:
    types = ["float", "binary", "ubinary", "base64"]
    made = (await embed(served, embedding_types=types))["embeddings"]
    vector = np.array(made["float"][0], np.float32)
    assert list(made) == types
    assert np.array_equal(np.frombuffer(base64.b64decode(made["base64"][0]), "<f4"), vector)
    assert made["ubinary"] == [np.packbits(vector >= 0).tolist()]
    assert made["binary"] == [[made["ubinary"][0][0] - 128]]
    assert list((await embed(served, embedding_types=[]))["embeddings"]) == ["float"]


async def test_bits_fill_whole_bytes_only() -> None:
    engine = FakeEngine(replace(FAKE_MODEL, matryoshka=Matryoshka(WIDTH, flexible=True)))
    async with serving(engine=engine) as server:
        answer = await server.post(
            PATH, {"texts": ["a"], "output_dimension": 7, "embedding_types": ["binary"]}
        )
        assert "multiple of 8" in assert_error(answer, 400, "BadRequestError", "embedding_types")
        assert server.engine.calls == []
        assert len((await embed(server, output_dimension=7))["embeddings"]["float"][0]) == 7
        answer = await server.post(PATH, {"texts": ["a"], "output_dimension": 0})
        assert_error(answer, 400, "BadRequestError", "output_dimension")


async def test_bits_are_of_the_width_that_the_model_is_cut_to() -> None:
    model = replace(FAKE_MODEL, matryoshka=Matryoshka(WIDTH, flexible=True), default_dimensions=7)
    async with serving(engine=FakeEngine(model)) as server:
        answer = await server.post(PATH, {"texts": ["a"], "embedding_types": ["ubinary"]})
        assert "but got 7" in assert_error(answer, 400, "BadRequestError", "embedding_types")
        assert await embed(server, output_dimension=WIDTH, embedding_types=["ubinary"])


async def test_input_types_are_the_models_own_prompts(served: Served) -> None:
    async with serving(engine=FakeEngine(PROMPTED)) as server:
        await embed(server, input_type="query")
        await embed(server, input_type="document")
        assert [call["prompts"] for call in server.engine.calls] == [["Q: ab"], ["ab"]]
        answer = await server.post(PATH, {"texts": ["a"], "input_type": "search_query"})
        message = assert_error(answer, 400, "BadRequestError", "input_type")
        assert message == "Unsupported input_type 'search_query'. Supported values: document, query."
    answer = await served.post(PATH, {"texts": ["a"], "input_type": "query"})
    assert "does not define any" in assert_error(answer, 400, "BadRequestError", "input_type")


async def test_with_a_chat_template_the_prompt_is_a_system_message() -> None:
    async with serving(engine=FakeEngine(replace(PROMPTED, chat_template=True))) as server:
        await embed(server, input_type="query")
        [call] = server.engine.calls
        assert call["prompts"] == ["<system>Q: <user>ab"]
        assert call["tokenization"].add_special_tokens is False  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, (-1, None)),
        ({"truncate": "END"}, (-1, None)),
        ({"truncate": "START"}, (-1, "left")),
        ({"truncate": "NONE"}, (None, None)),
        ({"max_tokens": 5}, (5, None)),
        ({"max_tokens": 5, "truncate": "START"}, (5, "left")),
        ({"max_tokens": -1}, (-1, None)),
        ({"max_tokens": -1, "truncate": "NONE"}, (None, None)),
        ({"max_tokens": FAKE_MODEL.max_model_len}, (FAKE_MODEL.max_model_len, None)),
    ],
)
async def test_truncation(served: Served, fields: dict[str, Any], expected: Any) -> None:
    await embed(served, **fields)
    params: Any = served.engine.calls[0]["tokenization"]
    assert (params.truncate_prompt_tokens, params.truncation_side) == expected


async def test_none_and_a_maximum_refuse_what_is_longer(served: Served) -> None:
    assert (await embed(served, truncate="NONE", max_tokens=4))["texts"] == ["ab"]
    answer = await served.post(PATH, {"texts": ["ab"], "truncate": "NONE", "max_tokens": 3})
    assert "Input of 4 tokens exceeds max_tokens=3" in assert_error(
        answer, 400, "BadRequestError", "max_tokens"
    )
    answer = await served.post(PATH, {"texts": ["ab"], "truncate": "NONE", "max_tokens": 0})
    assert_error(answer, 400, "BadRequestError", "max_tokens")
    assert len(served.engine.calls) == 1  # the others were not run for nothing


async def test_a_maximum_beyond_the_models_own_is_refused_where_texts_would_be_cut() -> None:
    async with serving(engine=FakeEngine(replace(FAKE_MODEL, max_embed_len=99))) as server:
        answer = await server.post(PATH, {"texts": ["ab"], "max_tokens": 100})
        message = assert_error(answer, 400, "BadRequestError", "max_tokens")
        assert message.startswith("max_tokens must be at least 1 and at most 99")
        await embed(server, truncate="NONE", max_tokens=100)
    async with serving(engine=FakeEngine(replace(FAKE_MODEL, max_embed_len=None))) as server:
        await embed(server, max_tokens=100_000)


async def test_inputs_of_text_parts_are_texts(served: Served) -> None:
    part = {"type": "text", "text": "x"}
    answer = await served.post(PATH, {"inputs": [{"content": [part, part]}]})
    assert answer.status == 200
    assert "texts" not in answer.json
    assert served.engine.calls[0]["prompts"] == ["x\nx"]


async def test_with_a_chat_template_inputs_are_messages() -> None:
    inputs = [{"content": [{"type": "text", "text": text}]} for text in ("x", "y")]
    async with serving(engine=FakeEngine(replace(PROMPTED, chat_template=True))) as server:
        for input_type, system in ((None, ""), ("document", ""), ("query", "<system>Q: ")):
            server.engine.calls.clear()
            answer = await server.post(PATH, {"inputs": inputs, "input_type": input_type})
            assert answer.status == 200
            [call] = server.engine.calls
            assert call["prompts"] == [f"{system}<user>['x']", f"{system}<user>['y']"]
            assert call["tokenization"].add_special_tokens is False  # type: ignore[attr-defined]
        await embed(server)
        assert server.engine.calls[-1]["prompts"] == ["ab"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "texts"),
        ({"texts": []}, "texts"),
        ({"texts": "a"}, "texts"),
        ({"texts": [5]}, "texts[0]"),
        ({"texts": ["a", "\ud800"]}, "texts[1]"),
        ({"texts": ["a"], "inputs": [{"content": [{"type": "text", "text": "a"}]}]}, "inputs"),
        ({"images": ["data:image/png;base64,AAAA"]}, "images"),
        (
            {"inputs": [{"content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "inputs[0].content[0]",
        ),
        ({"inputs": [{"content": "a"}]}, "inputs[0].content"),
        ({"inputs": [5]}, "inputs[0]"),
        ({"texts": ["a"], "embedding_types": ["int8"]}, "embedding_types[0]"),
        ({"texts": ["a"], "truncate": "MIDDLE"}, "truncate"),
        ({"texts": ["a"], "max_tokens": -2}, "max_tokens"),
        ({"texts": ["a"], "max_tokens": 0}, "max_tokens"),
        (
            {"inputs": [{"content": [{"type": "text", "text": "\ud800"}]}]},
            "inputs[0].content[0]",
        ),
        ({"texts": ["a"], "output_dimension": 4}, None),
        ({"texts": ["a" * 500], "truncate": "NONE"}, "texts"),
    ],
)
async def test_what_is_wrong_is_named(served: Served, body: dict[str, Any], param: str | None) -> None:
    assert_error(await served.post(PATH, body), 400, "BadRequestError", param)
