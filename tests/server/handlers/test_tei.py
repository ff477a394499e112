"""TEI's own endpoints: /embed and /predict."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fakes import FAKE_CLASSIFIER, FAKE_CROSS_ENCODER, FAKE_M3, FAKE_MODEL, WIDTH, FakeEngine
from serving import Served, assert_error, serving


@pytest.fixture
async def classifier() -> AsyncIterator[Served]:
    async with serving(engine=FakeEngine(FAKE_CLASSIFIER)) as server:
        yield server


async def test_vectors_come_bare(served: Served) -> None:
    for inputs, count in (("ab", 1), (["ab", "c"], 2), ([5, 6], 1), ([[5], [6, 7]], 2)):
        assert np.array((await served.post("/embed", {"inputs": inputs})).json).shape == (count, WIDTH)
    alike = (await served.embed(input="ab")).json["data"][0]["embedding"]
    assert (await served.post("/embed", {"inputs": "ab"})).json == [alike]


async def test_a_thousand_vectors_are_as_bare(served: Served) -> None:
    assert np.array((await served.post("/embed", {"inputs": ["ab"] * 10_000})).json).shape == (10_000, WIDTH)


async def test_the_fields_mean_what_they_mean_there(served: Served) -> None:
    await served.post("/embed", {"inputs": "ab"})
    await served.post(
        "/embed", {"inputs": "ab", "normalize": False, "truncate": True, "truncation_direction": "Left"}
    )
    first, second = ((call["params"], call["tokenization"]) for call in served.engine.calls)
    assert first[0].use_activation is True  # type: ignore[attr-defined]
    assert first[1].truncate_prompt_tokens is None  # type: ignore[attr-defined]
    assert second[0].use_activation is False  # type: ignore[attr-defined]
    assert (second[1].truncate_prompt_tokens, second[1].truncation_side) == (-1, "left")  # type: ignore[attr-defined]


async def test_prompts_by_name(served: Served) -> None:
    async with serving(engine=FakeEngine(replace(FAKE_MODEL, prompts={"query": "Q: "}))) as server:
        await server.post("/embed", {"inputs": "ab", "prompt_name": "query"})
        assert server.engine.calls[0]["prompts"] == ["Q: ab"]
        for fields in ({"prompt_name": "nope"}, {"prompt_name": "query", "inputs": [5]}):
            answer = await server.post("/embed", {"inputs": "ab", **fields})
            assert_error(answer, 400, "BadRequestError", "prompt_name")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "inputs"),
        ({"inputs": []}, "inputs"),
        ({"inputs": 5}, "inputs"),
        ({"inputs": ["a", [5]]}, "inputs[1]"),
        ({"inputs": [{"role": "user", "content": "a"}]}, "inputs"),
        ({"inputs": ["a", "b" * 500]}, "inputs[1]"),
        ({"inputs": "a", "truncation_direction": "Up"}, "truncation_direction"),
        ({"inputs": "a", "dimensions": 4}, None),
    ],
)
async def test_what_cannot_be_embedded_is_refused(
    served: Served, body: dict[str, Any], param: str | None
) -> None:
    assert_error(await served.post("/embed", body), 400, "BadRequestError", param)


async def test_a_text_gets_its_classes_best_first(classifier: Served) -> None:
    classes = (await classifier.post("/predict", {"inputs": "ab"})).json
    assert [set(each) for each in classes] == [{"score", "label"}] * 3
    assert {each["label"] for each in classes} == {"negative", "LABEL_1", "positive"}
    assert [each["score"] for each in classes] == sorted((each["score"] for each in classes), reverse=True)


@pytest.mark.parametrize(
    ("inputs", "prompts", "is_batch"),
    [
        ("ab", ["ab"], False),
        (["a", "b"], [("a", "b")], False),
        (["a"], ["a"], False),
        ([["a"], ["b"]], ["a", "b"], True),
        ([["a", "b"], ["c"]], [("a", "b"), ("c", "")], True),
        (["a", ["b", "c"]], [("a", ""), ("b", "c")], True),
    ],
)
async def test_two_texts_are_a_pair(classifier: Served, inputs: Any, prompts: Any, is_batch: bool) -> None:
    answer = (await classifier.post("/predict", {"inputs": inputs, "raw_scores": True})).json
    [call] = classifier.engine.calls
    assert call["prompts"] == prompts
    assert call["params"].use_activation is False  # type: ignore[attr-defined]
    assert isinstance(answer[0], list) is is_batch
    assert len(answer) == (len(prompts) if is_batch else 3)


async def test_pairs_are_put_together_as_the_model_wants_them() -> None:
    joined = replace(FAKE_CROSS_ENCODER, pairs="concatenated")
    async with serving(engine=FakeEngine(joined)) as server:
        await server.post("/predict", {"inputs": ["a", "b"]})
        assert server.engine.calls[0]["prompts"] == ["ab"]
    templated = replace(FAKE_CROSS_ENCODER, score_template=True, chat_template=True)
    async with serving(engine=FakeEngine(templated)) as server:
        await server.post("/predict", {"inputs": ["a", "b"]})
        assert server.engine.calls[0]["prompts"] == ["<query>a<document>b"]


@pytest.mark.parametrize(
    ("inputs", "param"),
    [
        ([], "inputs"),
        ([[]], "inputs[0]"),
        (["a", "b", "c"], "inputs"),
        ({"text_pair": "b"}, "inputs.text"),
        ([{"text": "a"}, {"text": "b", "text_pair": 5}], "inputs[1].text_pair"),
        ([["a", 5]], "inputs[0][1]"),
        (5, "inputs"),
    ],
)
async def test_what_is_no_pair_is_refused(classifier: Served, inputs: Any, param: str) -> None:
    assert_error(await classifier.post("/predict", {"inputs": inputs}), 400, "BadRequestError", param)


async def test_a_model_that_cannot_says_so(served: Served, classifier: Served) -> None:
    message = assert_error(await served.post("/predict", {"inputs": "a"}), 400, "BadRequestError")
    assert message == "The model does not support Classification API"
    message = assert_error(await classifier.post("/embed", {"inputs": "a"}), 400, "BadRequestError")
    assert message == "The model does not support Embeddings API"


# ── a vector a token, a weight an entry ──────────────────────────────────────────────────────────────────────


@pytest.fixture
async def m3() -> AsyncIterator[Served]:
    async with serving(engine=FakeEngine(replace(FAKE_M3, prompts={"query": "Q: "}))) as server:
        yield server


async def test_a_vector_for_each_token(m3: Served) -> None:
    found = (await m3.post("/embed_all", {"inputs": ["ab", "c"]})).json
    assert [np.array(text).shape for text in found] == [(4, WIDTH), (3, WIDTH)]
    alike = (await m3.post("/pooling", {"input": "ab", "task": "token_embed"})).json["data"][0]["data"]
    assert found[0] == alike


async def test_the_weights_that_are_any(m3: Served) -> None:
    found = (await m3.post("/embed_sparse", {"inputs": ["ab", "a"]})).json
    ids = [sorted({101, 97, 98, 102}), sorted({101, 97, 102})]
    assert found == [[{"index": token, "value": token / 1000} for token in text] for text in ids]
    assert all(type(weight["index"]) is int for text in found for weight in text)
    assert (await m3.post("/embed_sparse", {"inputs": [7]})).json == [[{"index": 7, "value": 0.007}]]


@pytest.mark.parametrize("path", ["/embed_all", "/embed_sparse"])
async def test_their_fields_are_those_of_embed(m3: Served, path: str) -> None:
    body = {"inputs": ["ab"], "prompt_name": "query", "truncate": True, "truncation_direction": "Left"}
    assert (await m3.post(path, body)).status == 200
    call: dict[str, Any] = m3.engine.calls[0]
    assert call["prompts"] == ["Q: ab"]
    assert call["tokenization"].truncate_prompt_tokens == -1
    assert call["tokenization"].truncation_side == "left"
    assert call["tokenization"].prompt == "Q: "
    unknown = await m3.post(path, {"inputs": "a", "prompt_name": "x"})
    assert_error(unknown, 400, "BadRequestError", "prompt_name")


@pytest.mark.parametrize(
    ("path", "api"), [("/embed_all", "Token Embeddings"), ("/embed_sparse", "Sparse Embeddings")]
)
async def test_a_model_without_them_says_so(classifier: Served, path: str, api: str) -> None:
    message = assert_error(await classifier.post(path, {"inputs": "a"}), 400, "BadRequestError")
    assert message == f"The model does not support {api} API"


# ── one text with others ─────────────────────────────────────────────────────────────────────────────────────


def sentences(*texts: str, **parameters: Any) -> dict[str, Any]:
    body: dict[str, Any] = {"inputs": {"source_sentence": texts[0], "sentences": list(texts[1:])}}
    return {**body, "parameters": parameters} if parameters else body


async def test_similarity_is_the_cosine_of_the_vectors(served: Served) -> None:
    vectors = np.array((await served.post("/embed", {"inputs": ["ab", "ab", "c"]})).json, np.float32)
    found = (await served.post("/similarity", sentences("ab", "ab", "c"))).json
    lengths = np.linalg.norm(vectors, axis=1)
    assert found == pytest.approx(list(vectors[1:] @ vectors[0] / (lengths[1:] * lengths[0])))
    assert found[0] == pytest.approx(1)


async def test_its_parameters_are_those_of_embed(m3: Served) -> None:
    body = sentences("a", "b", prompt_name="query", truncate=True, truncation_direction="Left")
    assert (await m3.post("/similarity", body)).status == 200
    [call] = m3.engine.calls
    assert call["prompts"] == ["Q: a", "Q: b"]
    tokenization: Any = call["tokenization"]
    assert (tokenization.truncate_prompt_tokens, tokenization.truncation_side) == (-1, "left")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"inputs": "a"}, "inputs"),
        ({"inputs": {}}, "inputs.source_sentence"),
        ({"inputs": {"source_sentence": "a"}}, "inputs.sentences"),
        (sentences("a"), "inputs.sentences"),
        ({"inputs": {"source_sentence": "a", "sentences": ["b", 5]}}, "inputs.sentences[1]"),
        (sentences("a" * 500, "b"), "inputs.source_sentence"),
        (sentences("a", "b", "c" * 500), "inputs.sentences[1]"),
        (sentences("a", "b", prompt_name="nope"), "parameters.prompt_name"),
        (sentences("a", "b", truncation_direction="Up"), "parameters.truncation_direction"),
        ({**sentences("a", "b"), "parameters": []}, "parameters"),
    ],
)
async def test_what_cannot_be_compared_is_refused(served: Served, body: dict[str, Any], param: str) -> None:
    assert_error(await served.post("/similarity", body), 400, "BadRequestError", param)


async def test_a_classifier_compares_nothing(classifier: Served) -> None:
    message = assert_error(await classifier.post("/similarity", sentences("a", "b")), 400, "BadRequestError")
    assert message == "The model does not support Embeddings API"


# ── pipelines, headers ───────────────────────────────────────────────────────────────────────────────────────


async def test_a_pipelines_only_answer_has_a_list_around_it(classifier: Served) -> None:
    bare = (await classifier.post("/predict", {"inputs": "ab"})).json
    assert (await classifier.post("/predict", {"inputs": "ab", "parameters": {}})).json == [bare]
    asked = {"inputs": "ab", "parameters": {"top_k": 2, "function_to_apply": "none"}}
    [logits] = (await classifier.post("/predict", asked)).json
    raw = (await classifier.post("/predict", {"inputs": "ab", "raw_scores": True})).json
    assert logits == raw[:2]


async def test_texts_are_a_pair_to_tei_and_two_inputs_to_a_pipeline(classifier: Served) -> None:
    pair = (await classifier.post("/predict", {"inputs": ["a", "bc"]})).json
    each = [(await classifier.post("/predict", {"inputs": text})).json for text in ("a", "bc")]
    assert pair not in each
    assert (await classifier.post("/predict", {"inputs": ["a", "bc"], "parameters": None})).json == pair
    assert (await classifier.post("/predict", {"inputs": ["a", "bc"], "parameters": {}})).json == each
    assert (await classifier.post("/predict", {"inputs": ["a"], "parameters": {}})).json == each[:1]
    nothing = await classifier.post("/predict", {"inputs": [], "parameters": {}})
    assert assert_error(nothing, 400, "BadRequestError", "inputs") == "You must pass at least one prompt"


async def test_a_pipelines_pair_is_a_pair(classifier: Served) -> None:
    pair = (await classifier.post("/predict", {"inputs": ["a", "bc"]})).json
    alone = (await classifier.post("/predict", {"inputs": "a"})).json
    asked: dict[str, Any] = {"text": "a", "text_pair": "bc"}
    for path in ("/predict", "/", "/invocations"):
        assert (await classifier.post(path, {"inputs": asked})).json == pair
        assert (await classifier.post(path, {"inputs": asked, "parameters": {}})).json == [pair]
        assert (await classifier.post(path, {"inputs": [asked, {"text": "a"}]})).json == [pair, alone]


@pytest.mark.parametrize(
    ("parameters", "param"),
    [
        ({"candidate_labels": ["a", "b"]}, "parameters.candidate_labels"),
        ({"function_to_apply": "sigmoid"}, "parameters.function_to_apply"),
        ({"top_k": 0}, "parameters.top_k"),
        (5, "parameters"),
    ],
)
async def test_what_a_pipeline_does_and_this_does_not_is_refused(
    classifier: Served, parameters: Any, param: str
) -> None:
    answer = await classifier.post("/predict", {"inputs": "a", "parameters": parameters})
    assert_error(answer, 400, "BadRequestError", param)
    assert not classifier.engine.calls


@pytest.mark.parametrize(
    ("path", "body", "characters", "tokens"),
    [
        ("/embed", {"inputs": ["ab", "c"]}, 3, 7),
        ("/embed", {"inputs": [[5, 6], [7]]}, 3, 3),
        ("/embed_all", {"inputs": "abc"}, 3, 5),
        ("/embed_sparse", {"inputs": "abc"}, 3, 5),
        ("/similarity", sentences("ab", "c"), 3, 7),
        ("/rerank", {"query": "ab", "texts": ["c", "de"]}, 7, 11),
    ],
)
async def test_the_headers_say_what_it_took(
    m3: Served, path: str, body: dict[str, Any], characters: int, tokens: int
) -> None:
    headers = (await m3.post(path, body)).headers
    assert headers["x-compute-type"] == "cpu"
    assert headers["x-compute-characters"] == str(characters)
    assert headers["x-compute-tokens"] == str(tokens)
    assert [headers[f"x-{stage}-time"] for stage in ("tokenization", "queue", "inference")] == ["1", "2", "3"]
    assert headers["x-total-time"] == headers["x-compute-time"] == "6"
    assert "x-compute-type" not in (await m3.embed(input="a")).headers


async def test_predictions_have_them_too(classifier: Served) -> None:
    headers = (await classifier.post("/predict", {"inputs": [["ab", "c"], ["d"]]})).headers
    assert headers["x-compute-characters"] == "4"


async def test_what_a_refusal_advises_works_here_too(m3: Served) -> None:
    long = "a" * 500
    for path, body in (
        ("/embed", {"inputs": long}),
        ("/embed_all", {"inputs": long}),
        ("/similarity", sentences(long, "b")),
        ("/rerank", {"query": "a", "texts": [long]}),
    ):
        assert (await m3.post(path, body)).status == 400
        for cure in ({"truncate_prompt_tokens": -1}, {"truncate": True}):
            assert (await m3.post(path, {**body, **cure})).status == 200
        nothing = await m3.post(path, {**body, "truncate_prompt_tokens": 0})
        assert_error(nothing, 400, "BadRequestError", "truncate_prompt_tokens")
