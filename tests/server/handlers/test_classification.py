"""POST /classify: labels and probabilities."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from dataclasses import replace

import numpy as np
import pytest

from carpool.engine.errors import InputTooLong
from fakes import FAKE_CLASSIFIER, LABELS, FakeEngine
from serving import Served, assert_error, serving


@pytest.fixture
async def classifier() -> AsyncIterator[Served]:
    async with serving(engine=FakeEngine(FAKE_CLASSIFIER)) as server:
        yield server


@pytest.mark.parametrize("path", ["/classify", "/v1/classify"])
async def test_the_answer_is_the_documented_one(classifier: Served, path: str) -> None:
    body = (await classifier.post(path, {"input": ["one", "two", "three", "four"]})).json
    assert list(body) == ["id", "object", "created", "model", "data", "usage"]
    assert re.fullmatch("classify-[0-9a-f]{32}", body["id"])
    assert body["object"] == "list"
    for index, item in enumerate(body["data"]):
        assert list(item) == ["index", "label", "probs", "num_classes"]
        assert (item["index"], item["num_classes"]) == (index, 3)
        assert item["label"] == LABELS[int(np.argmax(item["probs"]))]
        assert sum(item["probs"]) == pytest.approx(1)
    assert {item["label"] for item in body["data"]} & set(LABELS)
    assert body["usage"]["prompt_tokens"] == 23


async def test_without_activation_they_are_logits(classifier: Served) -> None:
    body = (await classifier.post("/classify", {"input": "a", "use_activation": False})).json
    assert min(body["data"][0]["probs"]) < 0


async def test_numbers_are_the_shortest_text_of_their_float32(classifier: Served) -> None:
    text = (await classifier.post("/classify", {"input": "a"})).body.decode()
    numbers = re.findall(r"0\.\d+", text.partition("probs")[2].partition("]")[0])
    assert numbers
    assert all(str(np.float32(number)) == number for number in numbers)


async def test_fields_of_other_endpoints_are_ignored(classifier: Served) -> None:
    asked = {"input": "a", "dimensions": 3, "encoding_format": "hex", "task": "score", "top_k": 1}
    assert (await classifier.post("/classify", asked)).status == 200


async def test_a_class_without_a_label_has_none() -> None:
    async with serving(engine=FakeEngine(replace(FAKE_CLASSIFIER, labels=(None,)))) as server:
        assert (await server.post("/classify", {"input": "a"})).json["data"][0]["label"] is None


async def test_a_model_without_classes_says_so(served: Served) -> None:
    message = assert_error(await served.post("/classify", {"input": "a"}), 400, "BadRequestError")
    assert message == "The model does not support Classification API"


async def test_what_is_wrong_with_one_text_is_said_of_it(classifier: Served) -> None:
    answer = await classifier.post("/classify", {"input": ["a", "b" * 500]})
    assert_error(answer, 400, "BadRequestError", "input[1]")
    assert_error(await classifier.post("/classify", {"input": []}), 400, "BadRequestError", "input")
    classifier.engine.error = InputTooLong("Too long.", "input")
    answer = await classifier.post("/classify", {"input": "a"})
    assert_error(answer, 400, "BadRequestError", "input")


async def test_raw_scores_ask_for_infinitys_shape(classifier: Served) -> None:
    plain = (await classifier.post("/classify", {"input": ["one", "two"]})).json
    body = (await classifier.post("/classify", {"input": ["one", "two"], "raw_scores": False})).json
    assert list(body) == ["id", "object", "created", "model", "data", "usage"]
    assert body["object"] == "classify"
    assert body["usage"] == plain["usage"]
    for classes, item in zip(body["data"], plain["data"], strict=True):
        assert [set(each) for each in classes] == [{"score", "label"}] * 3
        assert [each["score"] for each in classes] == sorted(item["probs"], reverse=True)
        assert {each["label"] for each in classes} == {"negative", "LABEL_1", "positive"}
    raw = (await classifier.post("/classify", {"input": ["one"], "raw_scores": True})).json
    logits = (await classifier.post("/classify", {"input": ["one"], "use_activation": False})).json
    assert [each["score"] for each in raw["data"][0]] == sorted(logits["data"][0]["probs"], reverse=True)
