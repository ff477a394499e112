"""The official client works unchanged, in both shapes of errors."""

from __future__ import annotations

import asyncio
import base64

import numpy as np
import openai
import pytest

from process import Process

TEXTS = ["The quick brown fox jumps over the lazy dog.", "Bananas are rich in potassium.", ""]


@pytest.fixture
def client(minilm: Process) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{minilm.url}/v1", api_key="none", max_retries=0)


@pytest.fixture
def guarded(matryoshka: Process) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{matryoshka.url}/v1", api_key="secret", max_retries=0)


def test_embeddings_come_as_floats_though_the_client_asks_for_base64(client: openai.OpenAI) -> None:
    answer = client.embeddings.create(model="all-MiniLM-L6-v2", input=TEXTS)

    assert [item.index for item in answer.data] == [0, 1, 2]
    assert all(len(item.embedding) == 384 for item in answer.data)
    assert np.linalg.norm([item.embedding for item in answer.data], axis=1) == pytest.approx(1.0, abs=1e-5)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == 12 + 8 + 2
    assert answer.model == "all-MiniLM-L6-v2"


def test_base64_and_float_are_the_same_float32(client: openai.OpenAI) -> None:
    floats = client.embeddings.create(model="", input=TEXTS[0], encoding_format="float").data[0].embedding
    raw = client.embeddings.with_raw_response.create(model="", input=TEXTS[0], encoding_format="base64")
    text = raw.http_response.json()["data"][0]["embedding"]

    assert np.array_equal(np.frombuffer(base64.b64decode(text), "<f4"), np.array(floats, "f4"))


def test_a_list_of_ids_is_one_prompt(client: openai.OpenAI) -> None:
    ids = [101, 1996, 4248, 2829, 4419, 14523, 2058, 1996, 13971, 3899, 1012, 102]
    of_ids = client.embeddings.create(model="", input=ids).data
    of_text = client.embeddings.create(model="", input=TEXTS[0]).data

    assert len(of_ids) == 1
    assert np.dot(of_ids[0].embedding, of_text[0].embedding) == pytest.approx(1.0, abs=1e-5)


async def test_many_requests_at_once_get_each_their_own_answer(minilm: Process) -> None:
    client = openai.AsyncOpenAI(base_url=f"{minilm.url}/v1", api_key="none", max_retries=0)
    texts = [f"{i} " * (1 + i % 40) for i in range(60)]
    together = await asyncio.gather(*(client.embeddings.create(model="", input=text) for text in texts))
    alone = await client.embeddings.create(model="", input=texts)
    await client.close()

    for mine, theirs in zip(together, alone.data, strict=True):
        assert np.dot(mine.data[0].embedding, theirs.embedding) == pytest.approx(1.0, abs=1e-5)


def test_dimensions_cut_and_normalise(guarded: openai.OpenAI) -> None:
    whole = np.array(guarded.embeddings.create(model="tiny", input="a cat").data[0].embedding)
    cut = np.array(guarded.embeddings.create(model="tiny", input="a cat", dimensions=8).data[0].embedding)

    assert cut.shape == (8,)
    assert cut == pytest.approx(whole[:8] / np.linalg.norm(whole[:8]), abs=1e-6)


@pytest.mark.parametrize("shape", ["flat", "openai"])
def test_errors_are_read_from_both_shapes(shape: str, client: openai.OpenAI, guarded: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        (client if shape == "flat" else guarded).embeddings.create(model="", input="a", dimensions=0)

    error = caught.value
    body = error.response.json()
    assert (set(body) == {"error"}) is (shape == "openai")
    assert error.status_code == 400
    assert str(error.code) == "400"
    assert error.type == "BadRequestError"
    assert error.param == ("dimensions" if shape == "openai" else None)  # MiniLM is no Matryoshka model
    assert ("greater than 0" if shape == "openai" else "matryoshka representation") in error.message


def test_an_unknown_model_and_a_wrong_key_raise_the_clients_own_errors(
    client: openai.OpenAI, matryoshka: Process
) -> None:
    with pytest.raises(openai.NotFoundError, match="The model `nope` does not exist"):
        client.embeddings.create(model="nope", input="a")
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{matryoshka.url}/v1", api_key="wrong", max_retries=0).models.list()


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["all-MiniLM-L6-v2"]
    assert client.models.retrieve("all-MiniLM-L6-v2").owned_by == "carpool"
