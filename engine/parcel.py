"""Parcel: what a front needs of a loaded model, as the engine's process sends it. Between our own processes only."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

from carpool.engine.cache.blocks import BlockPool
from carpool.engine.cache.paging import Paging
from carpool.engine.chat import ChatTemplate

if TYPE_CHECKING:
    from carpool.engine.cache.cache import Cache
    from carpool.engine.model_info import ModelInfo
    from carpool.engine.preparation import Known
    from carpool.engine.scoring import Framer
    from carpool.engine.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Parts:
    """See `preparation.Known`."""

    model: ModelInfo
    tokenizer: Tokenizer
    chat: ChatTemplate
    framer: Framer | None
    cache: Cache | None

    def of(self, model: ModelInfo) -> Self:
        """The same, of a model of which something else is known now."""
        return replace(self, model=model)


def pack(parts: Known) -> bytes:
    """Without weights and without what lies in the cache: a front knows its size, and how prompts are named in it.

    A tokenizer of transformers goes along only where it has a template to render: to import transformers takes a front
    a second and 30 MB.
    """
    chat = parts.chat if parts.chat.present else ChatTemplate(None, None)
    cache = parts.cache
    if cache is not None:
        pool = cache.paging.pool
        empty = Paging(BlockPool(pool.num_blocks, pool.block_size), cache.paging.max_chunk_tokens)
        cache = replace(cache, paging=empty)
    return pickle.dumps(Parts(parts.model, parts.tokenizer, chat, parts.framer, cache))


def unpack(packed: bytes, *, trust_remote_code: bool = False) -> Parts:
    """Imports no torch."""
    if trust_remote_code:  # where transformers keeps the classes that came with models
        from transformers.dynamic_module_utils import init_hf_modules

        init_hf_modules()
    parts: Parts = pickle.loads(packed)
    return parts
