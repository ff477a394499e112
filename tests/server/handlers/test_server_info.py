"""What runs here, and how busy it is."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from carpool import __version__
from carpool.engine.config import EngineConfig
from carpool.server.config import ServerConfig
from fakes import FAKE_CLASSIFIER, FAKE_CROSS_ENCODER, FAKE_M3, FAKE_MODEL, LABELS, FakeEngine
from serving import EMBEDDINGS, Served, assert_error, serving


async def test_the_version_is_told(served: Served) -> None:
    assert (await served.get("/version")).json == {"version": __version__}


async def test_the_load_is_the_requests_to_the_model_under_way(served: Served) -> None:
    assert (await served.get("/load")).json == {"server_load": 0}
    served.engine.gate.clear()
    running = [asyncio.create_task(served.embed(input="a")) for _ in range(3)]
    running += [asyncio.create_task(served.post("/rerank", {"query": "a", "documents": ["b"]}))]
    while served.engine.waiting_sequences < 5:
        await asyncio.sleep(0.01)
    assert (await served.get("/load")).json == {"server_load": 4}
    served.engine.gate.set()
    await asyncio.gather(*running)
    assert (await served.get("/load")).json == {"server_load": 0}
    await served.post(EMBEDDINGS, b"{")
    assert (await served.get("/load")).json == {"server_load": 0}


async def test_the_facts_of_the_model(served: Served) -> None:
    async with serving(ServerConfig(served_model_name=("a", "b")), FakeEngine(FAKE_CLASSIFIER)) as server:
        info = (await server.get("/info")).json
    assert (info["model"], info["names"]) == ("a", ["a", "b"])
    assert info["labels"] == list(LABELS)
    assert info["tasks"] == ["classify", "token_classify"]
    assert (info["packing"], info["attention"]) == ("packed", "fake")
    assert info["limits"]["max_model_len"] == info["limits"]["max_embed_len"] == 256
    served.engine.state = "starting"
    assert_error(await served.get("/info"), 503, "ServiceUnavailableError")


async def test_the_facts_of_the_cache(served: Served) -> None:
    def of_the_cache(info: dict[str, object]) -> tuple[object, ...]:
        return info["prefix_caching"], info["chunked_prefill"], info["kv_cache_tokens"]

    assert of_the_cache((await served.get("/info")).json) == (False, False, 0)
    keeping = replace(FAKE_MODEL, prefix_caching=True, chunked_prefill=True, kv_cache_tokens=4096)
    async with serving(engine=FakeEngine(keeping)) as server:
        assert of_the_cache((await server.get("/info")).json) == (True, True, 4096)


async def test_the_memory_that_results_may_take(served: Served) -> None:
    assert (await served.get("/info")).json["result_cache_bytes"] == 0
    async with serving(ServerConfig(engine=EngineConfig(cache_size=1 << 20))) as server:
        assert (await server.get("/info")).json["result_cache_bytes"] == 1 << 20


async def test_the_front_page_links_what_is_there() -> None:
    async with serving(ServerConfig(root_path="/proxy", api_key=("k",))) as server:
        page = await server.get("/proxy")
        assert page.headers["Content-Type"].startswith("text/html")
        for path in ("/docs", "/openapi.json", "/info"):
            assert f'href="/proxy{path}"' in page.body.decode()


async def test_teis_words_for_the_model() -> None:
    classes = {"0": "negative", "1": "LABEL_1", "2": "positive"}
    for model, kind in (
        (FAKE_MODEL, {"embedding": {"pooling": "mean"}}),
        (replace(FAKE_MODEL, pooling="LAST"), {"embedding": {"pooling": "last_token"}}),
        (FAKE_M3, {"embedding": {"pooling": "mean"}}),
        (
            FAKE_CLASSIFIER,
            {"classifier": {"id2label": classes, "label2id": {name: int(i) for i, name in classes.items()}}},
        ),
        (
            FAKE_CROSS_ENCODER,
            {"reranker": {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}},
        ),
    ):
        async with serving(engine=FakeEngine(model)) as server:
            info = (await server.get("/info")).json
        assert info["model_type"] == kind
        assert info["max_input_length"] == info["limits"]["max_model_len"]
        assert info["max_client_batch_size"] == info["limits"]["max_num_seqs"]
        assert (info["model_id"], info["model_dtype"]) == ("/models/fake", "float32")
