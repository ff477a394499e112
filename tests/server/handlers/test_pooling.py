"""POST /pooling: every task the model has, in every form."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from carpool.engine.params import Matryoshka, PoolingParams
from fakes import FAKE_CLASSIFIER, FAKE_M3, FAKE_MODEL, FAKE_TAGGER, LABELS, WIDTH, FakeEngine
from serving import Served, assert_error, serving

PATH = "/pooling"


async def data(served: Served, **fields: Any) -> Any:
    answer = await served.post(PATH, {"input": "ab", **fields})
    assert answer.status == 200, answer.json
    return answer.json["data"][0]["data"]


async def test_the_answer_is_the_documented_one(served: Served) -> None:
    answer = await served.post(PATH, {"input": ["a", "b"]})
    body = answer.json
    assert list(body) == ["id", "object", "created", "model", "data", "usage"]
    assert re.fullmatch("pool-[0-9a-f]{32}", body["id"])
    assert [(item["index"], item["object"]) for item in body["data"]] == [(0, "pooling"), (1, "pooling")]
    assert body["usage"]["prompt_tokens"] == 6


@pytest.mark.parametrize(
    ("model", "task", "ran", "shape"),
    [
        (FAKE_MODEL, None, "embed", (WIDTH,)),
        (FAKE_MODEL, "embed", "embed", (WIDTH,)),
        (FAKE_MODEL, "token_embed", "token_embed", (4, WIDTH)),
        (FAKE_MODEL, "encode", "token_embed", (4, WIDTH)),
        (replace(FAKE_MODEL, default_task="token_embed"), None, "token_embed", (4, WIDTH)),
        (FAKE_CLASSIFIER, None, "classify", (len(LABELS),)),
        (FAKE_CLASSIFIER, "encode", "token_classify", (4, len(LABELS))),
        (FAKE_TAGGER, None, "token_classify", (4, len(LABELS))),
    ],
)
async def test_each_task_runs_by_its_name(model: Any, task: str | None, ran: str, shape: Any) -> None:
    async with serving(engine=FakeEngine(model)) as server:
        assert np.array(await data(server, task=task)).shape == shape
        assert server.engine.calls[0]["task"] == ran


@pytest.mark.parametrize("task", ["classify", "token_classify", "score", "embed&token_classify", "x", ""])
async def test_a_task_that_the_model_lacks_names_those_it_has(served: Served, task: str) -> None:
    message = assert_error(
        await served.post(PATH, {"input": "a", "task": task}), 400, "BadRequestError", "task"
    )
    assert message == f"Unsupported task: '{task}'. Supported tasks: embed, token_embed."


async def test_plugins_have_their_own_sentence(served: Served) -> None:
    message = assert_error(await served.post(PATH, {"data": {"a": 1}}), 400, "BadRequestError", "data")
    assert message.startswith("No IOProcessor plugin installed.")
    asked = {"input": "a", "task": "plugin"}
    assert message == assert_error(await served.post(PATH, asked), 400, "BadRequestError", "task")
    assert (await served.post(PATH, {"data": 1, "input": "a"})).status == 200
    assert_error(await served.post(PATH, {}), 400, "BadRequestError", "input")


async def test_dimensions_obey_the_rules_of_matryoshka() -> None:
    engine = FakeEngine(replace(FAKE_MODEL, matryoshka=Matryoshka(WIDTH, allowed=(2, 4))))
    async with serving(engine=engine) as server:
        assert len(await data(server, dimensions=4)) == 4
        assert np.array(await data(server, dimensions=2, task="token_embed")).shape == (4, 2)
        for dimensions in (3, 0, WIDTH + 1):
            answer = await server.post(PATH, {"input": "a", "dimensions": dimensions})
            assert_error(answer, 400, "BadRequestError", "dimensions")
    async with serving(engine=FakeEngine(FAKE_CLASSIFIER)) as server:
        answer = await server.post(PATH, {"input": "a", "dimensions": 3})
        assert_error(answer, 400, "BadRequestError", "dimensions")


@pytest.mark.parametrize("task", ["embed", "token_embed"])
async def test_all_forms_carry_the_same_numbers(served: Served, task: str) -> None:
    floats = np.array(await data(served, task=task), np.float32)
    packed = await data(served, task=task, encoding_format="base64")
    assert np.array_equal(np.frombuffer(base64.b64decode(packed), "<f4"), floats.reshape(-1))
    answer = await served.post(PATH, {"input": "ab", "task": task, "encoding_format": "bytes"})
    place = json.loads(answer.headers["metadata"])["data"][0]
    assert place["shape"] == list(floats.shape)
    assert np.array_equal(np.frombuffer(answer.body, "<f4").reshape(place["shape"]), floats)
    only = await served.post(PATH, {"input": "ab", "task": task, "encoding_format": "bytes_only"})
    assert only.body == answer.body
    assert "metadata" not in only.headers


async def test_the_activation_is_the_callers_to_choose(served: Served) -> None:
    await data(served, softmax=False)
    assert served.engine.calls[0]["params"] == PoolingParams(softmax=False)


# ── several tasks at once ────────────────────────────────────────────────────────────────────────────────────

ALL_OF_M3 = ("embed", "token_classify", "sparse_embed", "token_embed")


async def test_several_tasks_are_answered_at_once_each_under_its_name() -> None:
    async with serving(engine=FakeEngine(FAKE_M3)) as server:
        answer = await server.post(PATH, {"input": ["ab", "c"], "task": "&".join(ALL_OF_M3)})
        assert [(item["index"], item["object"]) for item in answer.json["data"]] == [
            (0, "pooling"),
            (1, "pooling"),
        ]
        assert answer.json["usage"]["prompt_tokens"] == 7
        assert server.engine.calls[0]["task"] == ALL_OF_M3
        for text, item in zip(("ab", "c"), answer.json["data"], strict=True):
            assert tuple(item["data"]) == ALL_OF_M3
            for task in ALL_OF_M3:
                assert item["data"][task] == await data(server, input=text, task=task)


async def test_as_base64_each_result_is_a_text() -> None:
    async with serving(engine=FakeEngine(FAKE_M3)) as server:
        both = await data(server, task="embed&token_embed", encoding_format="base64")
        for task, text in both.items():
            numbers = np.frombuffer(base64.b64decode(text), np.float32)
            assert numbers.tolist() == pytest.approx(np.ravel(await data(server, task=task)))
        for encoding in ("bytes", "bytes_only"):
            body = {"input": "a", "task": "embed&token_embed", "encoding_format": encoding}
            assert "float or base64" in assert_error(
                await server.post(PATH, body), 400, "BadRequestError", "encoding_format"
            )


@pytest.mark.parametrize("task", ["embed&embed", "embed"])
async def test_a_task_named_twice_is_a_task(task: str) -> None:
    async with serving(engine=FakeEngine(FAKE_M3)) as server:
        assert isinstance(await data(server, task=task), list)
        assert server.engine.calls[0]["task"] == "embed"


@pytest.mark.parametrize("task", ["embed&classify", "embed&", "&", "embed&token_embed&x"])
async def test_all_of_them_must_be_the_models(task: str) -> None:
    async with serving(engine=FakeEngine(FAKE_M3)) as server:
        answer = await server.post(PATH, {"input": "a", "task": task})
        message = assert_error(answer, 400, "BadRequestError", "task")
    assert message == (
        f"Unsupported task: '{task}'. Supported tasks: embed, sparse_embed, token_classify, token_embed."
    )


async def test_encode_is_the_first_of_the_token_tasks_that_the_model_has() -> None:
    async with serving(engine=FakeEngine(FAKE_M3)) as server:
        assert np.array(await data(server, task="encode")).shape == (4, WIDTH)


async def test_a_sparse_vector_has_no_width_to_ask_for() -> None:
    async with serving(engine=FakeEngine(FAKE_M3)) as server:
        answer = await server.post(PATH, {"input": "a", "task": "sparse_embed", "dimensions": 4})
        assert "dense embeddings" in assert_error(answer, 400, "BadRequestError", "dimensions")
