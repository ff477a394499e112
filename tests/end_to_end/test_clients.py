"""Clients of other servers work here unchanged: only their base URL is pointed at ours."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from typing import Any
from urllib.request import Request, urlopen

import pytest

import tiny
from fakes import FAKE_CLASSIFIER, FakeEngine
from process import Process, carpool_serve
from serving import serving

TEXTS = ["the cat sat on a mat", "rain in spain", "ice cream"]
QUERY = "where is the cat"


@pytest.fixture(scope="module")
def prompted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A tiny embedding model that knows the input types "query" and "document"."""
    folder = tmp_path_factory.mktemp("prompted")
    tiny.bert(folder / "model")
    tiny.edit_json(
        folder / "model" / "config_sentence_transformers.json", prompts={"query": "where ", "document": ""}
    )
    with carpool_serve(folder / "log", str(folder / "model"), "--served-model-name", "tiny") as process:
        yield process


def post(process: Process, path: str, body: dict[str, Any]) -> Any:
    request = Request(f"{process.url}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request) as answer:
        return json.load(answer)


def embedded(process: Process, texts: list[str]) -> list[list[float]]:
    return [item["embedding"] for item in post(process, "/v1/embeddings", {"input": texts})["data"]]


def close(ours: Any, theirs: Any) -> bool:
    return len(ours) == len(theirs) and all(
        math.isclose(a, b, abs_tol=1e-6) for a, b in zip(ours, theirs, strict=True)
    )


def test_cohere_embeds_and_reranks(prompted: Process) -> None:
    cohere = pytest.importorskip("cohere")
    client = cohere.ClientV2(api_key="none", base_url=prompted.url)

    answer = client.embed(model="tiny", texts=TEXTS, input_type="document", embedding_types=["float"])
    assert all(map(close, answer.embeddings.float_, embedded(prompted, TEXTS)))
    query = client.embed(
        model="tiny", texts=[QUERY], input_type="query", embedding_types=["float", "ubinary"]
    )
    assert close(query.embeddings.float_[0], embedded(prompted, ["where " + QUERY])[0])
    assert len(query.embeddings.ubinary[0]) == len(query.embeddings.float_[0]) // 8

    ranked = client.rerank(model="tiny", query=QUERY, documents=TEXTS, top_n=2)
    scores = [result.relevance_score for result in ranked.results]
    assert len(scores) == 2
    assert scores == sorted(scores, reverse=True)
    assert {result.index for result in ranked.results} < {0, 1, 2}


def test_langchain_embeds(prompted: Process) -> None:
    """With `check_embedding_ctx_length=False`: LangChain otherwise sends another model's token ids."""
    openai = pytest.importorskip("langchain_openai")
    client = openai.OpenAIEmbeddings(
        model="tiny", base_url=f"{prompted.url}/v1", api_key="none", check_embedding_ctx_length=False
    )

    assert all(map(close, client.embed_documents(TEXTS), embedded(prompted, TEXTS)))
    assert close(client.embed_query(QUERY), embedded(prompted, [QUERY])[0])


def test_llama_index_embeds(prompted: Process) -> None:
    like = pytest.importorskip("llama_index.embeddings.openai_like")
    client = like.OpenAILikeEmbedding(model_name="tiny", api_base=f"{prompted.url}/v1", api_key="none")

    assert all(map(close, client.get_text_embedding_batch(TEXTS), embedded(prompted, TEXTS)))
    assert close(client.get_query_embedding(QUERY), embedded(prompted, [QUERY])[0])


def test_the_shapes_of_text_embeddings_inference(prompted: Process) -> None:
    assert all(map(close, post(prompted, "/embed", {"inputs": TEXTS}), embedded(prompted, TEXTS)))
    assert close(
        post(prompted, "/embed", {"inputs": QUERY, "truncate": True})[0], embedded(prompted, [QUERY])[0]
    )
    ranked = post(prompted, "/rerank", {"query": QUERY, "texts": TEXTS, "return_text": True})
    assert [set(item) for item in ranked] == [{"index", "score", "text"}] * 3
    assert [item["text"] for item in ranked] == [TEXTS[item["index"]] for item in ranked]
    assert [item["score"] for item in ranked] == sorted((item["score"] for item in ranked), reverse=True)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The hub's library, which may ask: tests otherwise keep it off the network."""
    library = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(library.constants, "HF_HUB_OFFLINE", False)
    return library


def test_huggingface_hub_embeds_and_compares(prompted: Process, hub: Any) -> None:
    client = hub.InferenceClient(model=prompted.url, provider="hf-inference", token="none")

    vectors = client.feature_extraction(TEXTS, normalize=True, truncate=True, truncation_direction="right")
    assert all(map(close, vectors.tolist(), embedded(prompted, TEXTS)))
    query = client.feature_extraction(QUERY, prompt_name="query").tolist()
    assert close(query[0], embedded(prompted, ["where " + QUERY])[0])
    pairs = {"queries": QUERY, "documents": TEXTS}
    scores = [item["score"] for item in post(prompted, "/score", pairs)["data"]]
    assert close(client.sentence_similarity(QUERY, TEXTS), scores)
    assert client.health_check()
    assert client.get_endpoint_info()["model_type"] == {"embedding": {"pooling": "mean"}}
    with pytest.raises(
        hub.errors.HfHubHTTPError, match="The model has no prompt 'nope': it has document, query"
    ):
        client.feature_extraction(QUERY, prompt_name="nope")


async def test_huggingface_hub_classifies(hub: Any) -> None:
    async with serving(engine=FakeEngine(FAKE_CLASSIFIER)) as server:
        url = f"http://127.0.0.1:{server.port}"
        client = hub.InferenceClient(model=url, provider="hf-inference", token="none")
        classes = await asyncio.to_thread(client.text_classification, QUERY)
        best = await asyncio.to_thread(client.text_classification, QUERY, top_k=1)
        raw = await asyncio.to_thread(client.text_classification, QUERY, function_to_apply="none")
        [ours] = (await server.post("/classify", {"input": QUERY})).json["data"]
        [logits] = (await server.post("/classify", {"input": QUERY, "use_activation": False})).json["data"]
    assert close([each.score for each in classes], sorted(ours["probs"], reverse=True))
    assert classes[0].label == (ours["label"] or "LABEL_1")
    assert best == classes[:1]
    assert close([each.score for each in raw], sorted(logits["probs"], reverse=True))


def test_the_shapes_of_jina_and_voyage(prompted: Process) -> None:
    jina = post(
        prompted,
        "/v1/rerank",
        {"model": "tiny", "query": QUERY, "documents": [{"text": text} for text in TEXTS], "top_n": 1},
    )
    assert jina["results"][0]["document"]["text"] == TEXTS[jina["results"][0]["index"]]
    assert jina["usage"]["total_tokens"] > 0
    voyage = post(prompted, "/v1/rerank", {"query": QUERY, "documents": TEXTS, "return_documents": False})
    assert "document" not in voyage["results"][0] or voyage["results"][0]["document"] is None
    voyage = post(prompted, "/v1/rerank", {"query": QUERY, "documents": TEXTS, "truncation": True})
    assert [item["index"] for item in voyage["data"]] == [item["index"] for item in voyage["results"]]
    vectors = post(prompted, "/v1/embeddings", {"input": TEXTS, "input_type": "document", "truncation": True})
    assert len(vectors["data"]) == 3
