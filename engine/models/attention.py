"""The attention function that transformers' models call on a packed row.

transformers looks attention up by name in a registry. Ours is registered for attention and, on purpose, not for
masks: then no mask is ever built, and every layer hands us `attention_mask=None` and the whole row.

The batch's layout comes through a context variable, not through keyword arguments: several models drop those
on the way down. Each thread has a context of its own, so workers do not see each other's batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface

from carpool.engine.packing import PackedBatch
from carpool.kernels.attention import Choice
from carpool.kernels.layout import Kept, Layout
from carpool.kernels.ops import attention_of, kv_write, paged_attention, paged_attention_of, varlen_attention

NUMBER = "carpool_number"  # of an attention layer, as an attribute: a copy has its original's
NAME = "carpool_packed"  # neither "flash" nor "/" may be in it: both mean something to transformers

# Arguments that change nothing for a packed forward pass without dropout or cache. Any other argument that is
# not None carries a meaning we do not know; ignoring it would give wrong numbers in silence.
_HARMLESS = frozenset(
    {
        "cache_position",
        "deterministic",
        "dropout",
        "output_attentions",
        "output_hidden_states",
        "position_ids",
        "return_dict",
        "use_cache",
        "cu_seq_lens_q",
        "cu_seq_lens_k",
        "max_length_q",
        "max_length_k",
    }
)


class UnknownAttentionArgument(TypeError):
    """The model asks for a kind of attention that carpool does not compute."""


class Call(NamedTuple):
    """What a layer asked for in one forward pass: keys and values are [T, heads, size]."""

    layer: torch.nn.Module
    heads: int
    size: int
    dtype: torch.dtype
    kind: Mapping[str, Any]  # the keyword arguments of `kernels.ops.varlen_attention`

    @property
    def causal(self) -> bool:
        return bool(self.kind["causal"])

    @property
    def biased(self) -> bool:
        return self.kind["bias"] is not None


_current: ContextVar[Layout | None] = ContextVar("carpool_layout", default=None)
_witness: ContextVar[list[torch.nn.Module] | None] = ContextVar("carpool_witness", default=None)
_choices: ContextVar[list[Choice] | None] = ContextVar("carpool_choices", default=None)
_calls: ContextVar[list[Call] | None] = ContextVar("carpool_calls", default=None)


@contextmanager
def layout(batch: PackedBatch) -> Iterator[None]:
    """Within this block, this thread's forward passes are over this row."""
    token = _current.set(
        Layout(
            runs=batch.runs,
            longest=batch.max_seqlen,
            cu_seqlens=batch.cu_seqlens,
            positions=batch.position_ids,
            unseen=batch.unseen,
            seen=batch.seen,
            kept=batch.kept,
            wanted=batch.wanted,
        )
    )
    try:
        yield
    finally:
        _current.reset(token)


@contextmanager
def witnessed() -> Iterator[list[torch.nn.Module]]:
    """The layers that attend through us within this block, in order."""
    seen: list[torch.nn.Module] = []
    token = _witness.set(seen)
    try:
        yield seen
    finally:
        _witness.reset(token)


@contextmanager
def calls() -> Iterator[list[Call]]:
    """What layers asked for within this block, in order."""
    made: list[Call] = []
    token = _calls.set(made)
    try:
        yield made
    finally:
        _calls.reset(token)


@contextmanager
def choices() -> Iterator[list[Choice]]:
    """Which attention served within this block, a layer at a time."""
    made: list[Choice] = []
    token = _choices.set(made)
    try:
        yield made
    finally:
        _choices.reset(token)


def watched() -> bool:
    """Whether someone asks what this thread's layers do, one by one."""
    return any(asked.get() is not None for asked in (_witness, _choices, _calls))


def note(choice: Choice) -> None:
    """For those who asked within `choices`."""
    made = _choices.get()
    if made is not None:
        made.append(choice)


def row_of(module: torch.nn.Module) -> Layout:
    """The layout of the row that `module`, a layer, is about to attend over."""
    seen = _witness.get()
    if seen is not None:
        seen.append(module)
    return under_way()


def row_or_none() -> Layout | None:
    """The layout of this thread's row; None while transformers' own attention runs the model, to compare with."""
    return _current.get()


def under_way() -> Layout:
    """The layout of this thread's row."""
    current = _current.get()
    if current is None:
        raise RuntimeError("a packed model ran outside `layout(...)`: this is a bug in carpool")
    return current


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """query [1, N, T, D], key and value [1, N_kv, T, D] → ([1, T, N, D], None), as the registry has it.

    `position_bias` is by distance, [N, 2M - 1] as `kernels.reference.varlen_attention` takes it; one over the whole
    row is a caller's that does not know of packing. `s_aux` [N] are attention sinks.
    """
    current = row_of(module)
    unknown = sorted(name for name, given in others.items() if given is not None and name not in _HARMLESS)
    if attention_mask is not None:
        unknown.append("attention_mask")
    if position_bias is not None and position_bias.ndim != 2:
        unknown.append("position_bias")
    if unknown:
        raise UnknownAttentionArgument(
            f"{type(module).__name__} passes {', '.join(unknown)} to its attention, which carpool does not compute"
        )
    kind: dict[str, Any] = {
        "scale": query.shape[-1] ** -0.5 if scaling is None else scaling,
        "causal": bool(getattr(module, "is_causal", True) if is_causal is None else is_causal),
        "window": sliding_window,
        "softcap": softcap,
        "bias": position_bias,
        "sinks": s_aux,
    }
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return over(module, q, k, v, current, **kind)[None], None


def over(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, row: Layout, **kind: Any
) -> Tensor:
    """Attention of a layer over its row. query [T, N, D], key and value [T, N_kv, D] → [T, N, D]"""
    asked = _calls.get()
    if asked is not None:
        heads, size = key.shape[1:]
        asked.append(Call(module, heads, size, key.dtype, kind))
    if row.kept is not None:
        return _keep(query, key, value, row, row.kept, getattr(module, NUMBER, None), **kind)
    return attend(query, key, value, row, **kind)


def attend(query: Tensor, key: Tensor, value: Tensor, row: Layout, **kind: Any) -> Tensor:
    """`kernels.ops.varlen_attention`, noted for those who ask which it was."""
    if _choices.get() is not None:
        note(attention_of(query, key, value, row, **kind))
    return varlen_attention(query, key, value, row, **kind)


def _keep(
    query: Tensor, key: Tensor, value: Tensor, row: Layout, kept: Kept, number: int | None, **kind: Any
) -> Tensor:
    """As `attend`; keys and values are kept in this layer's pages, out of which those that have a past read theirs."""
    if number is None:
        raise RuntimeError("a layer that has no pages ran a row that is kept: this is a bug in carpool")
    pages = kept.layers[number]
    kv_write(key.contiguous(), value.contiguous(), kept.slots, *pages)
    past = kept.past
    if past is None:
        return attend(query, key, value, row, **kind)
    if not kind.pop("causal") or kind.pop("bias") is not None:
        raise UnknownAttentionArgument(
            "a layer that looks ahead, or minds distances, cannot look back at what is kept"
        )
    if _choices.get() is not None:
        note(paged_attention_of(query, *pages, **kind))
    back = paged_attention(
        query[past.start :], *pages, past.pages, past.cu_seqlens, past.key_lengths, past.longest, **kind
    )
    if past.others is None:
        return back
    query, key, value = (x[: past.start] for x in (query, key, value))
    return torch.cat((attend(query, key, value, past.others, causal=True, **kind), back))


AttentionInterface.register(NAME, packed_attention)
