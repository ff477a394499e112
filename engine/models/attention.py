"""The attention function that transformers' models call on a packed row.

transformers looks attention up by name in a registry. Ours is registered for attention and, on purpose, not for
masks: then no mask is ever built, and every layer hands us `attention_mask=None` and the whole row.

The batch's layout comes through a context variable, not through keyword arguments: several models drop those
on the way down. Each thread has a context of its own, so workers do not see each other's batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from carpool.kernels.ops import varlen_attention

NAME = "carpool_packed"  # neither "flash" nor "/" may be in it: both mean something to transformers

# Arguments that change nothing for a packed forward pass without dropout or cache. Any other argument that is
# not None carries a meaning we do not know; ignoring it would give wrong numbers in silence.
_HARMLESS = frozenset(
    {
        "cache_position",
        "deterministic",
        "dropout",
        "head_mask",
        "layer_head_mask",
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


@dataclass(slots=True)
class Layout:
    """Where sequences begin and end in the row under way: `runs` of (length, count). `calls` counts layers."""

    runs: tuple[tuple[int, int], ...]
    calls: int = 0


_current: ContextVar[Layout | None] = ContextVar("carpool_layout", default=None)


@contextmanager
def layout(runs: tuple[tuple[int, int], ...]) -> Iterator[Layout]:
    """Within this block, this thread's forward passes are over a row laid out as `runs`."""
    current = Layout(runs)
    token = _current.set(current)
    try:
        yield current
    finally:
        _current.reset(token)


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
    **others: Any,
) -> tuple[Tensor, None]:
    """query [1, N, T, D], key and value [1, N_kv, T, D] → ([1, T, N, D], None), as the registry has it."""
    current = _current.get()
    if current is None:
        raise RuntimeError("packed attention ran outside `layout(...)`: this is a bug in carpool")
    current.calls += 1
    unknown = sorted(name for name, given in others.items() if given is not None and name not in _HARMLESS)
    if attention_mask is not None:
        unknown.append("attention_mask")
    if unknown:
        raise UnknownAttentionArgument(
            f"{type(module).__name__} passes {', '.join(unknown)} to its attention, which carpool does not compute"
        )
    out = varlen_attention(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        current.runs,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        causal=bool(getattr(module, "is_causal", True) if is_causal is None else is_causal),
        window=sliding_window,
        softcap=softcap,
    )
    return out[None], None


AttentionInterface.register(NAME, packed_attention)
