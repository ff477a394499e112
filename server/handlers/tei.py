"""Text Embeddings Inference's own endpoints: /embed and its like, /predict, and /rerank with `texts`. Bare lists."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from aiohttp import web
from msgspec import UNSET

from carpool.engine.errors import InvalidInput
from carpool.server.answer import HOLE, encode, json_answer, json_around
from carpool.server.body import read_request
from carpool.server.call import Call, prefixed
from carpool.server.encoding import (
    bare_array,
    best_first,
    cosines,
    plain_array,
    ranked_array,
    shortest,
    sparse_items,
)
from carpool.server.errors import InvalidRequest
from carpool.server.protocol import (
    TeiEmbedRequest,
    TeiInputsRequest,
    TeiPrediction,
    TeiPredictRequest,
    TeiRank,
    TeiRerankRequest,
    TeiSimilarityRequest,
    decode_tei_embed_request,
    decode_tei_inputs_request,
    decode_tei_predict_request,
    decode_tei_similarity_request,
)
from carpool.server.protocol.model_request import read_prompts
from carpool.server.protocol.tei import prompt_of
from carpool.server.slices import ITEM, Array, in_good_time

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from carpool.engine.async_engine import Prompts
    from carpool.engine.outputs import PoolingResult, ScoreResult
    from carpool.engine.params import Task
    from carpool.server.encoding import Row, Rows

R = TypeVar("R", bound=web.StreamResponse)


async def create_embeddings(request: web.Request) -> web.StreamResponse:
    return await embed(request, await read_request(request, decode_tei_embed_request))


async def create_token_embeddings(request: web.Request) -> web.StreamResponse:
    return await embed_all(request, await read_request(request, decode_tei_inputs_request))


async def create_sparse_embeddings(request: web.Request) -> web.StreamResponse:
    return await embed_sparse(request, await read_request(request, decode_tei_inputs_request))


async def compare(request: web.Request) -> web.StreamResponse:
    return await similarity(request, await read_request(request, decode_tei_similarity_request))


async def create_predictions(request: web.Request) -> web.StreamResponse:
    return await predict(request, await read_request(request, decode_tei_predict_request))


async def embed(request: web.Request, asked: TeiEmbedRequest) -> web.StreamResponse:
    call = Call(request, asked)
    call.require("embed" in call.model.tasks, "Embeddings")
    call.model.matryoshka.check(asked.dimensions, call.name)
    inputs, result = await _pool(call, asked, "embed")
    return _finish(call, inputs, result, await json_around(HOLE, bare_array(result.rows)))


async def embed_all(request: web.Request, asked: TeiInputsRequest) -> web.StreamResponse:
    """A vector a token, through the model's own head."""
    return await _rows(request, asked, "token_embed", "Token Embeddings", bare_array)


async def embed_sparse(request: web.Request, asked: TeiInputsRequest) -> web.StreamResponse:
    """What each text weighs in those entries of the vocabulary in which it weighs anything."""
    return await _rows(request, asked, "sparse_embed", "Sparse Embeddings", partial(Array, sparse_items))


async def _rows(
    request: web.Request,
    asked: TeiInputsRequest,
    task: Task,
    name: str,
    array: Callable[[list[Row]], Array],
) -> web.StreamResponse:
    """The task's results of all inputs, as an `array` of them; `name` is what a model without it lacks."""
    call = Call(request, asked)
    call.require(task in call.model.tasks, name)
    inputs, result = await _pool(call, asked, task)
    return _finish(call, inputs, result, await json_around(HOLE, array(result.rows)))


async def _pool(call: Call, asked: TeiInputsRequest, task: Task) -> tuple[Prompts, PoolingResult]:
    """The inputs as they were sent, and what became of them."""
    name = asked.prompt_name
    tasked = name in call.model.task_adapters
    prompt = call.take_task(name, "prompt_name") if tasked else prompt_of(name, call.model.prompts)
    inputs = read_prompts(asked.inputs, "inputs")
    prompts = prefixed(prompt, inputs, "prompt_name")
    result = await call.pool(task, prompts, asked.pooling(), asked.tokenization(), "inputs", prompt)
    return inputs, result


async def similarity(request: web.Request, asked: TeiSimilarityRequest) -> web.StreamResponse:
    """The cosines of one text's vector with others'."""
    call = Call(request, asked)
    call.require("embed" in call.model.tasks, "Embeddings")
    try:
        inputs, result = await _pool(call, asked.as_inputs(), "embed")
    except (InvalidInput, InvalidRequest) as error:
        error.param = _place(error.param)
        raise
    found = await in_good_time(cosines, sum(row.size for row in result.rows), result.rows)
    return _finish(call, inputs, result, await json_around(HOLE, plain_array(found)))


def _place(param: str | None) -> str | None:
    """Where in the body of /similarity that stood which is called `inputs[i]` or `prompt_name` in those of /embed."""
    if param == "prompt_name":
        return "parameters.prompt_name"
    if param is None or not param.startswith("inputs["):
        return param
    place = int(param[len("inputs[") : -1])
    return f"inputs.sentences[{place - 1}]" if place else "inputs.source_sentence"


async def predict(request: web.Request, asked: TeiPredictRequest) -> web.StreamResponse:
    call = Call(request, asked)
    call.require("classify" in call.model.tasks, "Classification")
    pairs, most = asked.pairs(), asked.how().top_k
    prompts = await _paired(call, pairs)
    result = await call.pool("classify", prompts, asked.pooling(), asked.tokenization(), "inputs")
    texts = [text for pair in pairs for text in pair]
    if not asked.is_bare:
        every = predictions_array(result.rows, call.model.labels, most)
        return _finish(call, texts, result, await json_around(HOLE, every))
    [row] = result.rows
    found = await in_good_time(_predictions, ITEM * row.size, row, call.model.labels)
    return _finish(call, texts, result, json_answer(found))


def predictions_array(rows: Rows, labels: tuple[str | None, ...], most: int | None = None) -> Array:
    """Of each row its classes, the likeliest first; at `most` so many."""
    return Array(_predicted, rows, (labels, most), weigh=lambda row: ITEM * row.size)


def _predicted(
    rows: Sequence[Row], labels: tuple[str | None, ...], most: int | None, first: int = 0
) -> bytes:
    return encode([_predictions(row, labels)[:most] for row in rows])


async def _paired(call: Call, pairs: list[tuple[str, str]]) -> Prompts:
    """Pairs as the model wants them: apart, one after the other, or in a prompt."""
    if not any(second for _, second in pairs):
        return [first for first, _ in pairs]
    return await call.pair_prompts(pairs)


def _predictions(row: Row, labels: tuple[str | None, ...]) -> list[TeiPrediction]:
    """Every class with its score, best first."""
    scored = [
        TeiPrediction(score, (labels[i] if i < len(labels) else None) or f"LABEL_{i}")
        for i, score in enumerate(shortest(row))
    ]
    return sorted(scored, key=lambda prediction: -prediction.score)


async def rerank(request: web.Request, asked: TeiRerankRequest) -> web.StreamResponse:
    call = Call(request, asked)
    call.require(call.model.score_type is not None, "Rerank")
    result = await call.score(
        [asked.query], asked.texts, asked.pooling(), asked.tokenization(), fields=("query", "texts")
    )
    best = await in_good_time(best_first, ITEM * len(asked.texts), result.scores)
    ranked = ranked_array(_ranks, best, asked.texts if asked.return_text else None)
    texts = [asked.query] * len(asked.texts) + asked.texts
    return _finish(call, texts, result, await json_around(HOLE, ranked))


def _ranks(best: Sequence[tuple[int, float]], texts: Sequence[str] | None, first: int = 0) -> bytes:
    return encode([TeiRank(index, score, texts[index] if texts else UNSET) for index, score in best])


def _finish(call: Call, inputs: Sequence[Any], result: PoolingResult | ScoreResult, response: R) -> R:
    """Say what it took in the headers that TEI has for it: whole milliseconds, characters, tokens."""
    characters = sum(len(text) for text in inputs)
    timings = result.timings
    spent = {"tokenization": timings.tokenize, "queue": timings.queue, "inference": timings.forward}
    total = str(round(1000 * sum(spent.values())))
    response.headers.update(
        {
            "x-compute-type": "cpu" if call.model.device == "cpu" else "gpu",
            "x-compute-time": total,
            "x-compute-characters": str(characters),
            "x-compute-tokens": str(result.prompt_tokens),
            "x-total-time": total,
            **{f"x-{stage}-time": str(round(1000 * seconds)) for stage, seconds in spent.items()},
        }
    )
    return call.finish(response)
