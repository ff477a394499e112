"""Text Embeddings Inference's own endpoints: /embed and its like, /predict, and /rerank with `texts`. Bare lists."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from aiohttp import web
from msgspec import UNSET

from carpool.server.answer import HOLE, encode, json_answer, json_around
from carpool.server.body import read_request
from carpool.server.call import Call, prefixed
from carpool.server.encoding import bare_array, best_first, ranked_array, shortest, sparse_items
from carpool.server.keys import CONFIG
from carpool.server.protocol import (
    TeiInputsRequest,
    TeiPrediction,
    TeiPredictRequest,
    TeiRank,
    TeiRerankRequest,
    decode_tei_embed_request,
    decode_tei_inputs_request,
    decode_tei_predict_request,
)
from carpool.server.protocol.model_request import read_prompts
from carpool.server.slices import ITEM, Array, in_good_time

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from carpool.engine.async_engine import Prompts
    from carpool.engine.outputs import PoolingResult
    from carpool.engine.params import Task
    from carpool.server.encoding import Row


async def embed(request: web.Request) -> web.StreamResponse:
    asked = await read_request(request, decode_tei_embed_request)
    call = Call(request, asked)
    call.require("embed" in call.model.tasks, "Embeddings")
    call.model.matryoshka.check(asked.dimensions, call.name)
    result = await _pool(request, call, asked, "embed")
    return call.finish(await json_around(HOLE, bare_array(result.rows)))


async def embed_all(request: web.Request) -> web.StreamResponse:
    """A vector a token, through the model's own head."""
    return await _rows(request, "token_embed", "Token Embeddings", bare_array)


async def embed_sparse(request: web.Request) -> web.StreamResponse:
    """What each text weighs in those entries of the vocabulary in which it weighs anything."""
    return await _rows(request, "sparse_embed", "Sparse Embeddings", partial(Array, sparse_items))


async def _rows(
    request: web.Request, task: Task, name: str, array: Callable[[list[Row]], Array]
) -> web.StreamResponse:
    """The task's results of all inputs, as an `array` of them; `name` is what a model without it lacks."""
    asked = await read_request(request, decode_tei_inputs_request)
    call = Call(request, asked)
    call.require(task in call.model.tasks, name)
    result = await _pool(request, call, asked, task)
    return call.finish(await json_around(HOLE, array(result.rows)))


async def _pool(request: web.Request, call: Call, asked: TeiInputsRequest, task: Task) -> PoolingResult:
    tasked = asked.prompt_name in call.model.task_adapters
    prompt = call.take_task(asked.prompt_name, "prompt_name") if tasked else asked.prompt(call.model.prompts)
    inputs = read_prompts(asked.inputs, "inputs", request.app[CONFIG].engine.token_id_input)
    prompts = prefixed(prompt, inputs, "prompt_name")
    return await call.pool(task, prompts, asked.pooling(), asked.tokenization(), "inputs", prompt)


async def predict(request: web.Request) -> web.StreamResponse:
    asked = await read_request(request, decode_tei_predict_request)
    call = Call(request, asked)
    call.require("classify" in call.model.tasks, "Classification")
    prompts = await _paired(call, asked)
    result = await call.pool("classify", prompts, asked.pooling(), asked.tokenization(), "inputs")
    every = Array(_predicted, result.rows, (call.model.labels,), weigh=lambda row: ITEM * row.size)
    if asked.is_batch:
        return call.finish(await json_around(HOLE, every))
    [row] = result.rows
    return call.finish(json_answer(await in_good_time(_predictions, ITEM * row.size, row, call.model.labels)))


def _predicted(rows: Sequence[Row], labels: tuple[str | None, ...], first: int = 0) -> bytes:
    return encode([_predictions(row, labels) for row in rows])


async def _paired(call: Call, asked: TeiPredictRequest) -> Prompts:
    """Pairs as the model wants them: apart, one after the other, or in a prompt."""
    pairs = asked.pairs()
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
    return call.finish(await json_around(HOLE, ranked))


def _ranks(best: Sequence[tuple[int, float]], texts: Sequence[str] | None, first: int = 0) -> bytes:
    return encode([TeiRank(index, score, texts[index] if texts else UNSET) for index, score in best])
