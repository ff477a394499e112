"""POST /invocations, the one door that SageMaker knows, and /, TEI's: what the body looks like says what is meant."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from aiohttp import web

from carpool.server.body import decoded, read_json_body
from carpool.server.decoding import RequestDecoder, parse
from carpool.server.errors import InvalidRequest
from carpool.server.handlers import classification, embeddings, pooling, rerank, scoring, tei
from carpool.server.keys import ENGINE
from carpool.server.protocol import (
    decode_classification_request,
    decode_embedding_request,
    decode_pooling_request,
    decode_rerank_request,
    decode_score_request,
    decode_tei_embed_request,
    decode_tei_inputs_request,
    decode_tei_predict_request,
    decode_tei_rerank_request,
    decode_tei_similarity_request,
)
from carpool.server.protocol.scoring import NAMES

if TYPE_CHECKING:
    from carpool.engine.model_info import ModelInfo
    from carpool.engine.params import Task


ADAPTER = "X-Amzn-SageMaker-Adapter-Identifier"  # wins over the body's `model`


class Endpoint(NamedTuple):
    decode: RequestDecoder[Any]
    answer: Callable[[web.Request, Any], Awaitable[web.StreamResponse]]


EMBEDDING = Endpoint(decode_embedding_request, embeddings.embed)
CLASSIFICATION = Endpoint(decode_classification_request, classification.classify)
RERANK = Endpoint(decode_rerank_request, rerank.rerank)
TEI_RERANK = Endpoint(decode_tei_rerank_request, tei.rerank)
TEI_SIMILARITY = Endpoint(decode_tei_similarity_request, tei.similarity)
# Of a model, by what it does first, where the body has TEI's `inputs`.
TEI: dict[Task, Endpoint] = {
    "embed": Endpoint(decode_tei_embed_request, tei.embed),
    "token_embed": Endpoint(decode_tei_inputs_request, tei.embed_all),
    "sparse_embed": Endpoint(decode_tei_inputs_request, tei.embed_sparse),
    "classify": Endpoint(decode_tei_predict_request, tei.predict),
}
SCORE = Endpoint(decode_score_request, scoring.score)
POOLING = Endpoint(decode_pooling_request, pooling.pool)


async def invoke(request: web.Request) -> web.StreamResponse:
    body = await read_json_body(request)
    document = await decoded(body, parse)
    endpoint = _endpoint(document, request.app[ENGINE].model)
    asked = await decoded(body, endpoint.decode)
    if adapter := request.headers.get(ADAPTER):
        asked.model = adapter
    return await endpoint.answer(request, asked)


def _endpoint(document: Any, model: ModelInfo) -> Endpoint:
    """The first that the body has the fields of and the model a task for."""
    fields = _given(document)
    if fields & {"input", "messages"}:
        task = document.get("task")
        pools = task not in (None, model.default_task) and not (
            isinstance(task, str) and task in model.task_adapters
        )
        if pools or model.default_task not in ("embed", "classify"):
            return POOLING
        return EMBEDDING if model.default_task == "embed" else CLASSIFICATION
    if "query" in fields and fields & {"documents", "texts"}:
        return RERANK if "documents" in fields else TEI_RERANK
    if any(fields >= set(pair) for pair in NAMES):
        return SCORE
    if "inputs" in fields and model.default_task in TEI:
        inputs = document["inputs"]
        compares = isinstance(inputs, Mapping) and "source_sentence" in inputs
        return TEI_SIMILARITY if compares else TEI[model.default_task]
    if "data" in fields:
        return POOLING
    raise InvalidRequest(
        "Cannot find suitable handler for request: send the body of an embedding, classification, rerank, score "
        "or pooling request."
    )


def _given(document: Any) -> set[str]:
    if not isinstance(document, Mapping):
        raise InvalidRequest("The body must be a JSON object.")
    return {name for name, value in document.items() if value is not None}
