"""Masks: what a model's own masks would let a token see, beside what its attention layers tell us.

No mask is ever built for a packed row: whether a layer looks back only, and how far it looks, comes in arguments. A
model may say something else in its masks (attention in chunks, a window that counts otherwise), and nothing would look
wrong. transformers describes a mask by a function of two places before it builds one: here that function is asked, for
places around every limit there may be, and compared with what the arguments make of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from carpool.engine.models import attention
from carpool.engine.models.backbone import Backbone
from carpool.engine.packing import pack_ids

NAME = "carpool_masks"  # an attention that is ours, with masks that are descriptions

# Places [Q, 1] and [1, K] → bool [Q, K] or what broadcasts to it; batch and head come first.
Sees = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Described:
    """Stands where a mask would be."""

    sees: Sees


@dataclass(frozen=True, slots=True)
class Told:
    """What a layer was given: its mask, and what its arguments say."""

    layer: str
    sees: Sees
    causal: bool
    window: int | None


_told: ContextVar[list[Told] | None] = ContextVar("carpool_masks", default=None)


def mask_fault(
    backbone: Backbone, ids: list[int], *, max_model_len: int, limits: Iterable[int] = ()
) -> str | None:
    """The end of a sentence on a layer whose mask and arguments disagree on a text that may be asked; else None."""
    device = next(backbone.module.parameters()).device
    told: list[Told] = []
    token = _told.set(told)
    try:
        with attending_by(backbone.module, NAME), torch.inference_mode():
            backbone.forward(pack_ids([ids], device))
    finally:
        _told.reset(token)
    for one in told:
        places = _places([*limits, *([one.window] if one.window else [])], max_model_len)
        query, key = places[:, None], places[None, :]
        zero = torch.zeros((), dtype=torch.int64)
        meant = torch.as_tensor(one.sees(zero, zero, query, key)).expand(len(places), len(places))
        if not torch.equal(meant.bool(), _by_arguments(query, key, one.causal, one.window)):
            return f"{one.layer} looks at other tokens by its masks than by its arguments"
    return None


@contextmanager
def attending_by(module: nn.Module, name: str) -> Iterator[None]:
    """Within this block the model looks its attention and its masks up under another name."""
    configs: list[Any] = [config for child in module.modules() if (config := getattr(child, "config", None))]
    before = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation = name
    try:
        yield
    finally:
        for config, own in zip(configs, before, strict=True):
            config._attn_implementation = own


def _places(limits: Iterable[int], end: int) -> Tensor:
    """int64: places before `end` close to all multiples of the limits that may matter, and to all powers of two."""
    centres = [0, *(limit * times for limit in limits for times in (1, 2, 3)), *(1 << i for i in range(20))]
    near = {centre + off for centre in centres for off in range(-2, 3)}
    return torch.tensor(sorted(place for place in near if 0 <= place < end))


def _by_arguments(query: Tensor, key: Tensor, causal: bool, window: int | None) -> Tensor:
    """bool [Q, K], as `kernels.reference.varlen_attention` has it."""
    distance = query - key
    sees = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    return sees if window is None else sees & (distance.abs() < window)


def _describe(*_: Any, mask_function: Sees, **__: Any) -> Described:
    return Described(mask_function)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, None]:
    told = _told.get()
    if told is not None and isinstance(attention_mask, Described):
        causal = options.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        told.append(
            Told(type(module).__name__, attention_mask.sees, bool(causal), options.get("sliding_window"))
        )
        attention_mask = None
    return attention.packed_attention(module, query, key, value, attention_mask, **options)


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, _describe)
