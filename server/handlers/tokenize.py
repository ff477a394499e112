"""Text or chat to token ids and back, as the model's own tokenizer does it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from aiohttp import web

from carpool.engine.errors import InvalidInput
from carpool.engine.params import TokenizationParams
from carpool.server.answer import HOLE, encode, json_around
from carpool.server.body import decoded, read_json_body, read_request
from carpool.server.call import rename, rendered, served_name
from carpool.server.encoding import list_array
from carpool.server.keys import ENGINE
from carpool.server.protocol import (
    DetokenizeResponse,
    TeiToken,
    TeiTokenizeRequest,
    TokenizeRequest,
    TokenizeResponse,
    decode_detokenize_request,
    decode_tei_decode_request,
    decode_tei_tokenize_request,
    decode_tokenize_request,
)
from carpool.server.protocol.tei import prompt_of
from carpool.server.slices import ITEM, Array, Text, in_good_time

if TYPE_CHECKING:
    from carpool.engine.outputs import Piece

TURN = 100  # lists of ids that are made text before others have theirs


async def create_tokens(request: web.Request) -> web.StreamResponse:
    body = await read_json_body(request)
    asked = await decoded(body, decode_tokenize_request)
    if asked.is_teis:
        return await tokenize_all(request, await decoded(body, decode_tei_tokenize_request))
    return await tokenize(request, asked)


async def tokenize(request: web.Request, asked: TokenizeRequest) -> web.StreamResponse:
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


async def tokenize_all(request: web.Request, asked: TeiTokenizeRequest) -> web.StreamResponse:
    """TEI's: of each text its tokens, and where in it they stand."""
    served_name(request.app, asked.model)
    engine = request.app[ENGINE]
    prompt = prompt_of(asked.prompt_name, engine.model.prompts)
    texts = [prompt + text for text in asked.texts()]
    try:
        pieces = await engine.pieces(texts, asked.add_special_tokens is not False)
    except InvalidInput as error:
        rename(error, {"input": "inputs"})
        raise
    items = list(zip(texts, pieces, strict=True))
    return await json_around(HOLE, Array(_written, items, weigh=lambda item: ITEM * len(item[1])))


def _written(items: Sequence[tuple[str, list[Piece]]], first: int = 0) -> bytes:
    return encode([_tokens(text, pieces) for text, pieces in items])


def _tokens(text: str, pieces: list[Piece]) -> list[TeiToken]:
    """`pieces` count characters, the answer counts bytes."""
    bytes_before: Sequence[int] = range(len(text) + 1)
    if not text.isascii():
        bytes_before = list(accumulate((len(character.encode()) for character in text), initial=0))
    return [
        TeiToken(token, there, True, None, None)
        if start is None or stop is None
        else TeiToken(token, there, False, bytes_before[start], bytes_before[stop])
        for token, there, start, stop in pieces
    ]


async def decode(request: web.Request) -> web.StreamResponse:
    """TEI's: of each list of token ids its text."""
    asked = await read_request(request, decode_tei_decode_request)
    served_name(request.app, asked.model)
    engine = request.app[ENGINE]
    skip = asked.skip_special_tokens is not False
    texts = []
    for number, token_ids in enumerate(asked.texts()):
        if number % TURN == 0:
            await asyncio.sleep(0)
        texts.append(await engine.detokenize(token_ids, skip))
    return await json_around(HOLE, list_array(texts))


async def detokenize(request: web.Request) -> web.StreamResponse:
    asked = await read_request(request, decode_detokenize_request)
    served_name(request.app, asked.model)
    text = await request.app[ENGINE].detokenize(asked.tokens)
    return await json_around(DetokenizeResponse(HOLE), Text(text))
