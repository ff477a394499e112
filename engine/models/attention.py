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
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from carpool.kernels.ops import attention_to_first, varlen_attention

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


@dataclass(frozen=True, slots=True)
class Layout:
    """Where sequences begin and end in the row under way: `runs` of (length, count).

    `unseen` as PackedBatch has it.
    """

    runs: tuple[tuple[int, int], ...]
    unseen: tuple[int | None, ...] = ()

    @property
    def longest(self) -> int:
        return max(length for length, _ in self.runs)

    def positions(self, device: torch.device) -> Tensor:
        """int64 [T]: each token's place in its sequence, from 0."""
        return torch.cat([torch.arange(length, device=device).repeat(count) for length, count in self.runs])

    def distances(self, device: torch.device) -> Tensor:
        """int64 [2M - 1], M the longest length: how far a key can stand behind its query, from 1 - M to M - 1."""
        return torch.arange(1 - self.longest, self.longest, device=device)

    def partly_seen(self) -> Iterator[tuple[slice, int]]:
        """The sequences of which only the first tokens are looked at: where in the row, and how many those are."""
        if self.unseen:
            ends = accumulate(length for length, count in self.runs for _ in range(count))
            for (start, end), seen in zip(pairwise((0, *ends)), self.unseen, strict=True):
                if seen is not None:
                    yield slice(start, end), seen

    def hide(self, rows: Tensor) -> Tensor:
        """[T, H] with zeros for tokens that are not looked at: for layers that mix tokens without attention."""
        for own, seen in self.partly_seen():
            rows = rows.clone()
            rows[own][seen:] = 0
        return rows

    def split(self, rows: Tensor) -> Iterator[Tensor]:
        """[T, H] → a [count, length, H] for each run."""
        sizes = [length * count for length, count in self.runs]
        for (length, count), run in zip(self.runs, torch.split(rows, sizes), strict=True):
            yield run.view(count, length, -1)


_current: ContextVar[Layout | None] = ContextVar("carpool_layout", default=None)
_witness: ContextVar[list[torch.nn.Module] | None] = ContextVar("carpool_witness", default=None)


@contextmanager
def layout(runs: tuple[tuple[int, int], ...], unseen: tuple[int | None, ...] = ()) -> Iterator[None]:
    """Within this block, this thread's forward passes are over a row laid out like this."""
    token = _current.set(Layout(runs, unseen))
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


def row_of(module: torch.nn.Module) -> Layout:
    """The layout of the row that `module`, a layer, is about to attend over."""
    seen = _witness.get()
    if seen is not None:
        seen.append(module)
    return under_way()


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
    out = varlen_attention(q, k, v, current.runs, **kind)
    for own, seen in current.partly_seen():
        out[own] = attention_to_first(q[own], k[own], v[own], seen, **kind)
    return out[None], None


AttentionInterface.register(NAME, packed_attention)
