"""Text Embeddings Inference's own endpoints: /embed, /predict, and /rerank with `texts`. Answers are bare lists."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from aiohttp import web
from msgspec import UNSET

from carpool.server.answer import json_answer
from carpool.server.body import read_request
from carpool.server.call import Call
from carpool.server.encoding import bare_items, best_first, in_good_time, shortest
from carpool.server.errors import InvalidRequest
from carpool.server.keys import CONFIG
from carpool.server.protocol import (
    TeiEmbedRequest,
    TeiPrediction,
    TeiPredictRequest,
    TeiRank,
    TeiRerankRequest,
    decode_tei_embed_request,
    decode_tei_predict_request,
)
from carpool.server.protocol.model_request import read_prompts

if TYPE_CHECKING:
    from carpool.engine.async_engine import Prompts
    from carpool.server.encoding import Row


async def embed(request: web.Request) -> web.Response:
    asked = await read_request(request, decode_tei_embed_request)
    call = Call(request, asked)
    call.require("embed" in call.model.tasks, "Embeddings")
    call.model.matryoshka.check(asked.dimensions, call.name)
    prompts = _prompted(asked, asked.prompt(call.model.prompts), request.app[CONFIG].engine.token_id_input)
    result = await call.pool("embed", prompts, asked.pooling(), asked.tokenization(), "inputs")
    vectors = await in_good_time(bare_items, result.rows)
    return call.finish(json_answer(msgspec.Raw(vectors)))


def _prompted(asked: TeiEmbedRequest, prompt: str, token_ids_allowed: bool) -> Prompts:
    prompts = read_prompts(asked.inputs, "inputs", token_ids_allowed)
    if not prompt:
        return prompts
    texts = [item for item in prompts if isinstance(item, str)]
    if not texts:
        raise InvalidRequest("prompt_name goes with texts, not with token ids.", "prompt_name")
    return [prompt + text for text in texts]


async def predict(request: web.Request) -> web.Response:
    asked = await read_request(request, decode_tei_predict_request)
    call = Call(request, asked)
    call.require("classify" in call.model.tasks, "Classification")
    prompts = await _paired(call, asked)
    result = await call.pool("classify", prompts, asked.pooling(), asked.tokenization(), "inputs")
    every = [_predictions(row, call.model.labels) for row in result.rows]
    return call.finish(json_answer(every if asked.is_batch else every[0]))


async def _paired(call: Call, asked: TeiPredictRequest) -> Prompts:
    """Pairs as the model wants them: apart, one after the other, or in the user's template."""
    pairs = asked.pairs()
    if not any(second for _, second in pairs):
        return [first for first, _ in pairs]
    if call.model.score_template:
        roles = ("query", "document")
        conversations = [
            [{"role": role, "content": text} for role, text in zip(roles, pair, strict=True)]
            for pair in pairs
        ]
        return await call.render(conversations, {})
    if call.model.pairs == "concatenated":
        return [first + second for first, second in pairs]
    return pairs


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
