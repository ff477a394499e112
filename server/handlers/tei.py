"""Text Embeddings Inference's own endpoints: /embed and its like, /predict, and /rerank with `texts`. Bare lists."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from aiohttp import web
from msgspec import UNSET

from carpool.server.answer import json_answer
from carpool.server.body import read_request
from carpool.server.call import Call, prefixed
from carpool.server.encoding import bare_items, best_first, in_good_time, shortest, sparse_items
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

if TYPE_CHECKING:
    from collections.abc import Callable

    from carpool.engine.async_engine import Prompts
    from carpool.engine.outputs import PoolingResult
    from carpool.engine.params import Task
    from carpool.server.encoding import Row


async def embed(request: web.Request) -> web.Response:
    asked = await read_request(request, decode_tei_embed_request)
    call = Call(request, asked)
    call.require("embed" in call.model.tasks, "Embeddings")
    call.model.matryoshka.check(asked.dimensions, call.name)
    result = await _pool(request, call, asked, "embed")
    vectors = await in_good_time(bare_items, result.rows)
    return call.finish(json_answer(msgspec.Raw(vectors)))


async def embed_all(request: web.Request) -> web.Response:
    """A vector a token, through the model's own head."""
    return await _rows(request, "token_embed", "Token Embeddings", bare_items)


async def embed_sparse(request: web.Request) -> web.Response:
    """What each text weighs in those entries of the vocabulary in which it weighs anything."""
    return await _rows(request, "sparse_embed", "Sparse Embeddings", sparse_items)


async def _rows(
    request: web.Request, task: Task, name: str, write: Callable[[list[Row]], bytes]
) -> web.Response:
    """The task's results of all inputs, as `write` makes text of them; `name` is what a model without it lacks."""
    asked = await read_request(request, decode_tei_inputs_request)
    call = Call(request, asked)
    call.require(task in call.model.tasks, name)
    result = await _pool(request, call, asked, task)
    written = await in_good_time(write, result.rows)
    return call.finish(json_answer(msgspec.Raw(written)))


async def _pool(request: web.Request, call: Call, asked: TeiInputsRequest, task: Task) -> PoolingResult:
    tasked = asked.prompt_name in call.model.task_adapters
    prompt = call.take_task(asked.prompt_name, "prompt_name") if tasked else asked.prompt(call.model.prompts)
    inputs = read_prompts(asked.inputs, "inputs", request.app[CONFIG].engine.token_id_input)
    prompts = prefixed(prompt, inputs, "prompt_name")
    return await call.pool(task, prompts, asked.pooling(), asked.tokenization(), "inputs", prompt)


async def predict(request: web.Request) -> web.Response:
    asked = await read_request(request, decode_tei_predict_request)
    call = Call(request, asked)
    call.require("classify" in call.model.tasks, "Classification")
    prompts = await _paired(call, asked)
    result = await call.pool("classify", prompts, asked.pooling(), asked.tokenization(), "inputs")
    every = [_predictions(row, call.model.labels) for row in result.rows]
    return call.finish(json_answer(every if asked.is_batch else every[0]))


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


async def rerank(request: web.Request, asked: TeiRerankRequest) -> web.Response:
    call = Call(request, asked)
    call.require(call.model.score_type is not None, "Rerank")
    result = await call.score(
        [asked.query], asked.texts, asked.pooling(), asked.tokenization(), fields=("query", "texts")
    )
    ranks = [
        TeiRank(index, score, asked.texts[index] if asked.return_text else UNSET)
        for index, score in best_first(result.scores)
    ]
    return call.finish(json_answer(ranks))
