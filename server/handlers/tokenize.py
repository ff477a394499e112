"""Text or chat to token ids and back, as the model's own tokenizer does it."""

from __future__ import annotations

from aiohttp import web

from carpool.engine.errors import InvalidInput
from carpool.engine.params import TokenizationParams
from carpool.server.answer import HOLE, json_around
from carpool.server.body import read_request
from carpool.server.call import rename, rendered, served_name
from carpool.server.encoding import list_array
from carpool.server.keys import ENGINE
from carpool.server.protocol import (
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
    decode_detokenize_request,
    decode_tokenize_request,
)
from carpool.server.slices import ITEM, Text, in_good_time


async def tokenize(request: web.Request) -> web.StreamResponse:
    asked = await read_request(request, decode_tokenize_request)
    served_name(request.app, asked.model)
    engine = request.app[ENGINE]
    params = TokenizationParams(add_special_tokens=asked.specials)
    text = await _text(request.app, asked)
    try:
        [token_ids] = await engine.tokenize([text], params)
    except InvalidInput as error:
        rename(error, {"input": "prompt" if asked.messages is None else "messages"})
        raise
    arrays = [list_array(token_ids)]
    if asked.return_token_strs:
        arrays.append(list_array(await in_good_time(engine.tokens, ITEM * len(token_ids), token_ids)))
    texts = HOLE if asked.return_token_strs else None
    body = TokenizeResponse(len(token_ids), engine.model.max_model_len, HOLE, texts)
    return await json_around(body, *arrays)


async def _text(app: web.Application, asked: TokenizeRequest) -> str:
    if asked.messages is None:
        return asked.text()
    [text] = await rendered(app, [asked.conversation()], asked.rendering())
    return text


async def detokenize(request: web.Request) -> web.StreamResponse:
    asked = await read_request(request, decode_detokenize_request)
    served_name(request.app, asked.model)
    text = await request.app[ENGINE].detokenize(asked.tokens)
    return await json_around(DetokenizeResponse(HOLE), Text(text))
