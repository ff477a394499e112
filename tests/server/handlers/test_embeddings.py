"""POST /v1/embeddings from request to answer."""

from __future__ import annotations

import asyncio
import base64
import json
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from carpool.engine.errors import DeadlineExceeded, Overloaded
from carpool.engine.params import Matryoshka, PoolingParams, TokenizationParams
from carpool.server.config import ServerConfig
from carpool.server.encoding import raw_vectors
from fakes import FAKE_MODEL, WIDTH, FakeEngine
from serving import EMBEDDINGS, Served, assert_error, serving

MODEL = "all-MiniLM-L6-v2"


async def vector(served: Served, text: str) -> Any:
    return np.array((await served.embed(input=text)).json["data"][0]["embedding"], np.float32)


async def test_the_answer_is_the_documented_one(served: Served) -> None:
    answer = await served.embed(input=["hi", "you"], model=MODEL)
    body = answer.json
    assert list(body) == ["id", "object", "created", "model", "data", "usage"]
    assert re.fullmatch("embd-[0-9a-f]{32}", body["id"])
    assert body["id"] == f"embd-{answer.headers['X-Request-Id']}"
    assert (body["object"], body["model"]) == ("list", MODEL)
    assert [(item["index"], item["object"], len(item["embedding"])) for item in body["data"]] == [
        (0, "embedding", WIDTH),
        (1, "embedding", WIDTH),
    ]
    assert body["usage"] == {
        "prompt_tokens": 9,
        "total_tokens": 9,
        "completion_tokens": 0,
        "prompt_tokens_details": None,
    }
    assert answer.headers["Content-Type"] == "application/json"


async def test_where_the_time_went_stands_in_a_header(served: Served) -> None:
    timing = (await served.embed(input="hi")).headers["Server-Timing"]
    assert timing.startswith("tokenize;dur=1.000, queue;dur=2.000, forward;dur=3.000, encode;dur=")


async def test_base64_is_the_same_vector(served: Served) -> None:
    [item] = (await served.embed(input="hi", encoding_format="base64")).json["data"]
    assert np.array_equal(
        np.frombuffer(base64.b64decode(item["embedding"]), "<f4"), await vector(served, "hi")
    )


async def test_bytes_come_with_their_map(served: Served) -> None:
    answer = await served.embed(
        input=["a", "b"], encoding_format="bytes", embed_dtype="float16", endianness="big"
    )
    assert answer.headers["Content-Type"] == "application/octet-stream"
    metadata = json.loads(answer.headers["metadata"])
    assert list(metadata) == ["id", "created", "model", "data", "usage"]
    assert metadata["data"][1] == {
        "index": 1,
        "embed_dtype": "float16",
        "endianness": "big",
        "start": 2 * WIDTH,
        "end": 4 * WIDTH,
        "shape": [WIDTH],
    }
    assert metadata["usage"] == {"prompt_tokens": 6, "total_tokens": 6}
    assert np.allclose(np.frombuffer(answer.body, ">f2")[WIDTH:], await vector(served, "b"), rtol=1e-3)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("endianness", ["little", "big"])
async def test_numbers_that_come_as_they_leave_leave_as_if_cast_here(
    served: Served, dtype: Any, endianness: Any
) -> None:
    """The engine is asked for 16 bits where the answer is made of them, and the bytes are those of float32 cast."""
    form = {"embed_dtype": dtype, "endianness": endianness}
    binary = await served.embed(input=["a", "b"], encoding_format="bytes_only", **form)
    coded = await served.embed(input=["a", "b"], encoding_format="base64", **form)
    assert [call["params"] for call in served.engine.calls] == [PoolingParams(embed_dtype=dtype)] * 2
    exact = [await vector(served, text) for text in ("a", "b")]
    assert binary.body == raw_vectors(exact, dtype, endianness)
    items = [base64.b64decode(item["embedding"]) for item in coded.json["data"]]
    assert b"".join(items) == binary.body


@pytest.mark.parametrize(
    "form",
    [
        {"encoding_format": "float", "embed_dtype": "float16"},
        {"embed_dtype": "bfloat16"},
        {"encoding_format": "bytes_only", "embed_dtype": "fp8_e4m3"},
        {"encoding_format": "base64"},
    ],
)
async def test_what_is_made_of_float32_here_is_asked_for_as_such(served: Served, form: Any) -> None:
    await served.embed(input="a", **form)
    assert served.engine.calls[0]["params"] == PoolingParams()


async def test_bytes_only_are_nothing_else(served: Served) -> None:
    answer = await served.embed(input="a", encoding_format="bytes_only")
    assert "metadata" not in answer.headers
    assert np.array_equal(np.frombuffer(answer.body, "<f4"), await vector(served, "a"))


async def test_a_map_no_client_could_read_is_refused(served: Served) -> None:
    answer = await served.embed(input=["a"] * 1000, encoding_format="bytes")
    assert "bytes_only" in assert_error(answer, 400, "BadRequestError", "encoding_format")
    assert served.engine.calls == []
    assert (await served.embed(input=["a"] * 1000, encoding_format="bytes_only")).status == 200


@pytest.mark.parametrize("path", ["/v1/embeddings", "/pooling"])
async def test_how_long_a_map_must_be_is_told_by_the_width_that_the_model_is_cut_to(path: str) -> None:
    """So many vectors of 100 numbers have a map too long for clients; of one number each they are run."""
    asked = {"input": ["a"] * 650, "encoding_format": "bytes"}
    for cut, status in ((None, 400), (1, 503)):
        engine = FakeEngine(replace(FAKE_MODEL, embedding_size=100, default_dimensions=cut))
        engine.error = Overloaded("Full.", retry_after=1)
        async with serving(engine=engine) as server:
            assert (await server.post(path, asked)).status == status


async def test_null_encoding_format_is_float(served: Served) -> None:
    assert isinstance(
        (await served.embed(input="a", encoding_format=None)).json["data"][0]["embedding"], list
    )


async def test_what_was_asked_reaches_the_engine(served: Served) -> None:
    await served.embed(
        input=[5, 6, 7],
        truncate_prompt_tokens="2",
        truncation_side="left",
        add_special_tokens=False,
        padding="do_not_pad",
        normalize=False,
        priority=-3,
        user="someone",
        dimensions=WIDTH,
    )
    [call] = served.engine.calls
    assert call["prompts"] == [[5, 6, 7]]
    assert call["params"] == PoolingParams(dimensions=WIDTH, normalize=False)
    assert call["tokenization"] == TokenizationParams(
        truncate_prompt_tokens=2, truncation_side="left", add_special_tokens=False, padding="do_not_pad"
    )
    assert call["priority"] == -3
    assert call["timeout"] is None


async def test_ids_are_labels_from_header_or_body(served: Served) -> None:
    headers = {"X-Request-Id": "of-header"}
    for header, field, expected in (
        (headers, None, "of-header"),
        (headers, "of-body", "of-header"),
        ({}, "of-body", "of-body"),
    ):
        answer = await served.post(EMBEDDINGS, {"input": "a", "request_id": field}, headers=header)
        assert answer.json["id"] == f"embd-{expected}"
        assert answer.headers["X-Request-Id"] == expected
    answer = await served.embed(input="a", request_id="x" * 129)
    assert re.fullmatch("embd-[0-9a-f]{32}", answer.json["id"])


@pytest.mark.parametrize("model", [None, "", "first", "second"])
async def test_any_of_its_names_means_the_model_and_the_first_is_reported(model: str | None) -> None:
    async with serving(ServerConfig(served_model_name=("first", "second"))) as server:
        assert (await server.embed(input="a", model=model)).json["model"] == "first"


async def test_another_models_name_is_a_404(served: Served) -> None:
    for name in ("nope", MODEL.upper(), MODEL + " "):
        message = assert_error(await served.embed(input="a", model=name), 404, "NotFoundError", "model")
        assert message == f"The model `{name}` does not exist."
    assert served.engine.calls == []


async def test_dimensions_are_checked_before_anything_is_queued() -> None:
    engine = FakeEngine(replace(FAKE_MODEL, matryoshka=Matryoshka(WIDTH, allowed=(2, 4))))
    async with serving(engine=engine) as server:
        assert len((await server.embed(input="a", dimensions=4)).json["data"][0]["embedding"]) == 4
        engine.calls.clear()
        for dimensions in (3, 0, -1, WIDTH + 1, 2**70):
            answer = await server.embed(input="a", dimensions=dimensions)
            assert_error(answer, 400, "BadRequestError", "dimensions")
        assert engine.calls == []


async def test_a_model_without_matryoshka_says_so_in_the_documented_words(served: Served) -> None:
    message = assert_error(await served.embed(input="a", dimensions=4), 400, "BadRequestError")
    assert message == (
        f'Model "{MODEL}" does not support matryoshka representation, '
        "changing output dimensions will lead to poor results."
    )


async def test_a_model_that_does_not_embed_says_so() -> None:
    async with serving(engine=FakeEngine(replace(FAKE_MODEL, tasks=frozenset()))) as server:
        message = assert_error(await server.embed(input="a"), 400, "BadRequestError")
        assert message == "The model does not support Embeddings API"


@pytest.mark.parametrize(("path", "field"), [("/v1/embeddings", "input"), ("/embed", "inputs")])
async def test_token_ids_are_the_engines_to_turn_away(served: Served, path: str, field: str) -> None:
    served.engine.token_id_input = False
    for ids in ([5], [[5]], [5, "6"]):
        assert_error(await served.post(path, {field: ids}), 400, "BadRequestError", field)
    assert (await served.post(path, {field: ["5"]})).status == 200


@pytest.mark.parametrize("token", [-1, 1000, 2**63, 2**64])
async def test_ids_out_of_vocabulary_are_the_engines_to_refuse(served: Served, token: int) -> None:
    message = assert_error(await served.embed(input=[token]), 400, "BadRequestError", "input")
    assert message.startswith(f"Token id {token} is out of vocabulary")


async def test_before_the_model_is_loaded_it_is_a_503(served: Served) -> None:
    served.engine.state = "starting"
    answer = await served.embed(input="a")
    assert_error(answer, 503, "ServiceUnavailableError")
    assert answer.headers["Retry-After"] == "5"


async def test_overload_and_deadlines_have_their_statuses(served: Served) -> None:
    served.engine.error = Overloaded("Too many tokens wait already.", retry_after=7.2)
    answer = await served.embed(input="a")
    assert_error(answer, 503, "ServiceUnavailableError")
    assert answer.headers["Retry-After"] == "8"
    served.engine.error = DeadlineExceeded("The request's deadline passed before it could run.")
    assert_error(await served.embed(input="a"), 504, "TimeoutError")


async def test_one_requests_failure_is_not_its_neighbours(served: Served) -> None:
    bad: list[Any] = [{"input": []}, {"input": [1.5]}, {"input": "a", "dimensions": 3}, {"input": [99999]}]
    good = [served.embed(input=f"text {i}") for i in range(10)]
    answers = await asyncio.gather(*good, *(served.post(EMBEDDINGS, body) for body in bad))
    assert [answer.status for answer in answers] == [200] * 10 + [400] * 4


async def test_a_large_answer_leaves_the_loop_free(served: Served) -> None:
    answer = await served.embed(input=["x"] * 20_000)
    assert len(answer.json["data"]) == 20_000


async def test_no_body_of_any_kind_makes_a_500(served: Served) -> None:
    fields = ["input", "model", "dimensions", "encoding_format", "user", "priority", "request_id", "padding"]
    values = (
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.text(max_size=5)
        | st.lists(st.integers())
    )
    bodies = st.dictionaries(st.sampled_from(fields), values | st.lists(values, max_size=3), max_size=5)
    loop = asyncio.get_running_loop()

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
    @given(document=bodies | st.binary(max_size=30))
    def post(document: Any) -> None:
        body = document if isinstance(document, bytes) else json.dumps(document).encode()
        answer = asyncio.run_coroutine_threadsafe(served.post(EMBEDDINGS, body), loop).result()
        assert answer.status in (200, 400, 404)
        if answer.status != 200:
            assert_error(answer, answer.status, answer.json["type"], answer.json["param"])

    await asyncio.to_thread(post)


CHAT = [{"role": "user", "content": "hi"}]


async def test_chats_are_rendered_and_each_conversation_is_a_vector() -> None:
    async with serving(engine=FakeEngine(replace(FAKE_MODEL, chat_template=True))) as server:
        for fields, prompts in (
            ({"messages": CHAT}, ["<user>hi"]),
            ({"messages": [CHAT, CHAT]}, ["<user>hi", "<user>hi"]),
            ({"input": CHAT}, ["<user>hi"]),
            ({"input": [CHAT, CHAT]}, ["<user>hi", "<user>hi"]),
            ({"input": "text", "messages": CHAT}, ["<user>hi"]),
            ({"messages": CHAT, "add_generation_prompt": True}, ["<user>hi>"]),
            ({"messages": CHAT, "continue_final_message": True}, ["<user>hi…"]),
            ({"messages": CHAT, "chat_template_kwargs": {"a": 1}}, ["<user>hi{'a': 1}"]),
        ):
            server.engine.calls.clear()
            answer = await server.embed(**fields)
            assert len(answer.json["data"]) == len(prompts)
            [call] = server.engine.calls
            assert call["prompts"] == prompts
            assert call["tokenization"] == TokenizationParams(add_special_tokens=False)
        await server.embed(messages=CHAT, add_special_tokens=True)
        assert server.engine.calls[-1]["tokenization"] == TokenizationParams()
        answer = await server.embed(messages=[CHAT, [{"role": "user", "content": "x" * 500}]])
        assert_error(answer, 400, "BadRequestError", "messages[1]")


async def test_a_model_without_a_template_takes_no_chats(served: Served) -> None:
    assert_error(await served.embed(messages=CHAT), 400, "BadRequestError", "messages")
    assert_error(
        await served.embed(messages=CHAT, chat_template="{{ 1 }}"), 400, "BadRequestError", "chat_template"
    )


async def test_voyages_word_for_dimensions_counts() -> None:
    engine = FakeEngine(replace(FAKE_MODEL, matryoshka=Matryoshka(WIDTH, flexible=True)))
    async with serving(engine=engine) as server:
        answer = await server.embed(input="a", output_dimension=4)
        assert len(answer.json["data"][0]["embedding"]) == 4
        for asked in ({}, {"dimensions": 0, "modality": "text"}):
            answer = await server.embed(input="a", output_dimension=-3, **asked)
            assert_error(answer, 400, "BadRequestError", "output_dimension")
        answer = await server.embed(input="a", dimensions=-3, output_dimension=4)
        assert_error(answer, 400, "BadRequestError", "dimensions")


@pytest.mark.parametrize("field", ["output_dtype", "embedding_type"])
async def test_other_vendors_words_for_the_numbers_are_not_passed_over(served: Served, field: str) -> None:
    """Voyage's client reads an answer as what it asked for: floats, as int8, would be four numbers each."""
    answer = await served.embed(input="a", **{field: "float"})
    assert len(answer.json["data"][0]["embedding"]) == WIDTH
    for kind in ("int8", "uint8", "binary", "ubinary"):
        answer = await served.embed(input="a", **{field: kind})
        assert_error(answer, 400, "BadRequestError", field)
        assert answer.json["message"] == f"{field} must be 'float', got \"{kind}\"."


async def test_inputs_are_not_taken_for_parts_of_one_text(served: Served) -> None:
    plain = await served.embed(input=["a", "b"])
    for said in (False, None):
        assert (await served.embed(input=["a", "b"], late_chunking=said)).json["data"] == plain.json["data"]
    served.engine.calls.clear()
    answer = await served.embed(input=["a", "b"], late_chunking=True)
    assert_error(answer, 400, "BadRequestError", "late_chunking")
    assert not served.engine.calls


async def test_infinitys_clients_write_0_for_no_dimensions_and_a_word_for_no_model(served: Served) -> None:
    asked = {"input": "ab", "modality": "text", "dimensions": 0, "model": "default/not-specified"}
    answer = await served.post("/embeddings", asked)
    assert answer.status == 200, answer.json
    assert answer.json["data"] == (await served.embed(input="ab")).json["data"]
    assert (await served.embed(input="ab", dimensions=0)).status == 400


async def test_nvidias_words_are_understood(served: Served) -> None:
    plain = (await served.embed(input=["ab"])).json["data"]
    asked = {"input": ["ab"], "input_type": "passage", "modality": ["text"], "truncate": "NONE"}
    assert (await served.post(EMBEDDINGS, asked)).json["data"] == plain


@pytest.mark.parametrize("modality", ["image", "audio", "", ["image"], ["text", "image"], 5])
async def test_what_is_no_text_is_not_embedded_as_if_it_were(served: Served, modality: Any) -> None:
    answer = await served.post("/embeddings", {"input": "http://a/b.png", "modality": modality})
    assert assert_error(answer, 400, "BadRequestError", "modality") == "This model accepts text only."
    assert not served.engine.calls
