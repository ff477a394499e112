"""What runs here: the version, the load, the facts of the model, and a page for those who come by browser."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from aiohttp import web

from carpool import __version__
from carpool.server.answer import json_answer
from carpool.server.keys import CONFIG, ENGINE, METRICS
from carpool.server.protocol import InfoResponse, LoadResponse, ServerLimits, TeiModel, VersionResponse

if TYPE_CHECKING:
    from carpool.engine.model_info import ModelInfo

PAGE = """\
<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<title>carpool</title>
<body>
<h1>carpool {version}</h1>
<p>A server for pooling models: embed, rerank, classify.</p>
<ul>
{docs}<li><a href="{root}/info">The model that is served</a></li>
</ul>
</body>
</html>
"""
DOCS = """\
<li><a href="{root}/docs">The API, to read and to try</a></li>
<li><a href="{root}/openapi.json">The API, for programs</a></li>
"""


async def show_home(request: web.Request) -> web.Response:
    config = request.app[CONFIG]
    root = escape(config.root_path)
    docs = DOCS.format(root=root) if config.docs else ""
    page = PAGE.format(version=__version__, root=root, docs=docs)
    return web.Response(text=page, content_type="text/html")


async def show_version(request: web.Request) -> web.Response:
    return json_answer(VersionResponse(__version__))


async def show_load(request: web.Request) -> web.Response:
    return json_answer(LoadResponse(await request.app[METRICS].load()))


async def show_info(request: web.Request) -> web.Response:
    config, model = request.app[CONFIG], request.app[ENGINE].model
    body = InfoResponse(
        version=__version__,
        model=config.model_names[0],
        names=list(config.model_names),
        root=model.root,
        architectures=list(model.architectures),
        tasks=sorted(model.tasks),
        default_task=model.default_task,
        score_type=model.score_type,
        pooling=model.pooling,
        normalize=model.normalize,
        embedding_size=model.embedding_size,
        matryoshka=model.matryoshka.supported,
        dimensions=list(model.matryoshka.allowed),
        labels=list(model.labels),
        prompts=dict(model.prompts),
        lora_modules=dict(model.lora_modules),
        adapter_tasks=sorted(model.task_adapters),
        default_adapter=model.default_adapter,
        parameters=model.parameters,
        vocab_size=model.vocab_size,
        dtype=model.dtype,
        device=model.device,
        workers=model.workers,
        worker_cpus=list(map(list, model.worker_cpus)),
        packing=model.packing,
        attention=model.attention,
        prefix_caching=model.prefix_caching,
        chunked_prefill=model.chunked_prefill,
        kv_cache_tokens=model.kv_cache_tokens,
        kv_cache_bytes=model.kv_cache_bytes,
        result_cache_bytes=config.engine.cache_size,
        quantization=model.quantization,
        surgery=dict(model.surgery),
        notices=list(model.notices),
        limits=ServerLimits(
            max_model_len=model.max_model_len,
            max_embed_len=model.longest_embedded,
            max_num_batched_tokens=model.max_num_batched_tokens,
            batch_tokens=model.batch_tokens or model.max_num_batched_tokens,
            chunk_tokens=model.chunk_tokens,
            max_num_seqs=model.max_num_seqs,
            max_body_size=config.max_body_size,
        ),
        model_id=model.root,
        model_sha=None,
        model_dtype=model.dtype,
        model_type=_tei_model(model),
        max_input_length=model.max_model_len,
        max_batch_tokens=model.max_num_batched_tokens,
        max_batch_requests=model.max_num_seqs,
        max_client_batch_size=model.max_num_seqs,
        auto_truncate=False,
    )
    return json_answer(body)


def _tei_model(model: ModelInfo) -> dict[str, TeiModel]:
    if not model.labels or model.default_task == "embed":
        words = {"LAST": "last_token"}
        return {"embedding": TeiModel(pooling=words.get(model.pooling, model.pooling.lower()))}
    names = [label or f"LABEL_{i}" for i, label in enumerate(model.labels)]
    classes = TeiModel(
        id2label={str(i): name for i, name in enumerate(names)},
        label2id={name: i for i, name in enumerate(names)},
    )
    return {"reranker" if model.score_type == "cross-encoder" else "classifier": classes}
