"""Preparation: from what a caller gave to what can be run, with the parts that an engine is made of."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING, Protocol, Self

from carpool.engine.errors import InputTooLong, UnknownAdapter
from carpool.engine.framed import Framed
from carpool.engine.late_interaction import RoleText
from carpool.engine.results import result_keys

if TYPE_CHECKING:
    from carpool.engine.cache.cache import Cache
    from carpool.engine.chat import ChatTemplate
    from carpool.engine.model_info import ModelInfo
    from carpool.engine.params import TokenizationParams
    from carpool.engine.prepared import Prepared
    from carpool.engine.request import Request
    from carpool.engine.scoring import Framer
    from carpool.engine.tokenizer import Tokenizer
    from carpool.engine.worker import Runner

Prompts = list[str] | list[list[int]] | list[tuple[str, str]] | list[Framed] | list[RoleText]

INLINE_CHARS = 4_000  # tokenised on the loop: under half a millisecond, less than a trip to a thread
_INLINE_IDS = 20_000
_INLINE_PROMPTS = 500  # however short: each has its list, its names, its checks


class Known(Protocol):
    """What is known of a model by those who prepare its prompts."""

    @property
    def model(self) -> ModelInfo: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def chat(self) -> ChatTemplate: ...

    @property
    def framer(self) -> Framer | None: ...

    @property
    def cache(self) -> Cache | None: ...

    def of(self, model: ModelInfo) -> Self:
        """The same, of a model of which something else is known now."""


class Rack(Protocol):
    """Where adapters come and go: see `engine/models/rack.py`."""

    def hang(self, slot: int, name: str, path: str) -> None: ...

    def drop(self, slot: int) -> None: ...


class Built(Known, Protocol):
    """The parts an engine is made of: see `engine/build.py`."""

    @property
    def runners(self) -> Seq[Runner]: ...

    @property
    def tokens_per_second(self) -> float | None:
        """What all runners run together, where it was measured when they were made."""

    @property
    def rack(self) -> Rack | None:
        """None: adapters stay as they are."""


def prepared(
    parts: Known, request: Request, prompts: Prompts, tokenization: TokenizationParams, longest: int | None
) -> Prepared:
    """The prompts as ids, none longer than `longest` (-1: than the model takes), and what is told of them.

    Of prompts that are to be sliced nothing is told here: it is their slices that will run.
    """
    ready = parts.tokenizer.prepare(prompts, tokenization, longest)
    return ready if needs_slicing(parts, ready) else told(parts, request, ready)


def needs_slicing(parts: Known, prompts: Prepared) -> bool:
    """Whether one is longer than the model takes, which the tokenizer lets pass only where slices are averaged."""
    return max(map(len, prompts.token_ids)) > parts.model.max_model_len


def told(parts: Known, request: Request, prompts: Prepared) -> Prepared:
    """The same, with the names of their results and what the cache of keys and values is told of them.

    Raises InputTooLong for a prompt that no batch takes whole and the cache cannot hold.
    """
    cache, most = parts.cache, parts.model.max_num_batched_tokens
    for i, ids in enumerate(prompts.token_ids):
        if len(ids) > most and not (cache and cache.paging.holds(len(ids))):
            held = f", and the cache of keys and values holds {cache.num_tokens}" if cache else ""
            where = f"input[{i}]" if len(prompts.token_ids) > 1 else "input"
            raise InputTooLong(
                f"This prompt has {len(ids)} tokens. A batch of this server takes {most}{held}.", where
            )
    prompts.keys = result_keys(prompts, request.tasks, request.params, request.adapter, request.salt)
    if cache is not None and not prompts.unseen:
        prompts.prompts = cache.prompts(
            prompts.token_ids, request.tasks, request.adapter, request.salt, prompts.type_starts
        )
    return prompts


def slot(model: ModelInfo, adapter: str | None) -> int:
    """The adapter's number, as sequences have it; 0 is the model as it stands."""
    name = model.default_adapter if adapter is None else adapter
    if name is None:
        return 0
    if name not in model.adapters:
        loaded = f"loaded are {', '.join(model.adapters)}" if model.adapters else "none are loaded"
        raise UnknownAdapter(f"There is no adapter {name!r}: {loaded}.", "model")
    return model.adapters[name]


def is_long(prompts: Prompts) -> bool:
    """Whether preparing them takes so long that it is better done off the loop."""
    if not prompts:
        return False
    if len(prompts) > _INLINE_PROMPTS:
        return True
    if isinstance(prompts[0], Framed):
        return sum(len(part) for prompt in prompts for part in prompt.parts) > INLINE_CHARS
    if isinstance(prompts[0], tuple):
        return sum(len(side) for pair in prompts for side in pair) > INLINE_CHARS
    return sum(map(len, prompts)) > (INLINE_CHARS if isinstance(prompts[0], str) else _INLINE_IDS)
