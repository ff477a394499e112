"""The operations as the engine calls them: the fastest implementation that serves, else the torch twin."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from carpool.kernels import cuda_ops, launch, native, native_pages, native_rows, reference, varlen
from carpool.kernels.attention import Asked, Choice, Place, choose
from carpool.kernels.launch import LaunchError
from carpool.kernels.layout import Layout
from carpool.kernels.reference import Output

P = ParamSpec("P")
R = TypeVar("R")

_log = logging.getLogger(__name__)
_told: set[str] = set()  # operations that were left to their twin on a device, and said so
_ELSEWHERE = "it is not for this kind of device"
_UNTRIED = "has not been tried on pages"


def place(device: torch.device) -> Place:
    """What there is for attention on tensors of this device."""
    return _place(device, native.level if native.library else 0, launch.backend.serves(device))


@cache  # every layer asks
def _place(device: torch.device, level: int, serves: bool) -> Place:
    if device.type == "cpu":
        kernels = None if serves else _ELSEWHERE
        return Place("cpu", None, native.LEVELS[level] if level else None, kernels, _ELSEWHERE, _ELSEWHERE)
    kernels = None if serves else (launch.fault() or _ELSEWHERE).rstrip(".")
    capability = torch.cuda.get_device_capability(device)
    return Place("cuda", capability, None, kernels, varlen.fault(device), _UNTRIED)


_choose = cache(
    choose
)  # a layer asks for the same thing every time: what it is answered is found once, at load


def attention_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row: Layout,
    *,
    softcap: float | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    **_: Any,
) -> Choice:
    """Which implementation `varlen_attention` takes for these, and why. Called as it is."""
    asked = Asked(
        dtype=query.dtype,
        head_size=query.shape[2],
        value_size=value.shape[2],
        softcap=softcap is not None,
        grouped=query.shape[1] != key.shape[1],
        bias=bias is not None,
        sinks=sinks is not None,
        unseen=bool(row.unseen),
    )
    return _choose(place(query.device), asked)


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row: Layout,
    *,
    scale: float,
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention within each sequence of a packed row: `kernels.reference.varlen_attention`, and `attention_to_first`
    for sequences of which only the first tokens are looked at.
    """
    plain: dict[str, Any] = {"scale": scale, "causal": causal, "window": window}
    whole: dict[str, Any] = {**plain, "softcap": softcap, "bias": bias, "sinks": sinks}
    match attention_of(query, key, value, row, **whole).by:
        case "varlen_attn":
            return varlen.varlen_attention(query, key, value, row.cu_seqlens, row.longest, **plain)
        case "cupy":
            return packed_attention(query, key, value, row.cu_seqlens, row.longest, **whole, seen=row.seen)
        case "native" if native.serves(query, key, value):
            out = native.varlen_attention(query, key, value, row.runs, **plain, softcap=softcap, bias=bias)
        case _:
            out = reference.varlen_attention(query, key, value, row.runs, **whole)
    for own, seen in row.partly_seen():
        out[own] = reference.attention_to_first(query[own], key[own], value[own], seen, **whole)
    return out


disentangled_attention = reference.disentangled_attention  # no other implementation yet


def _on_device(kernel: Callable[P, R], twin: Callable[P, R]) -> Callable[P, R]:
    """`kernel` if the first argument lies where kernels run, `twin` elsewhere and for what the kernel cannot take."""

    @wraps(twin)
    def dispatched(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        assert isinstance(first, Tensor), "an operation is called with its packed rows first"
        if not launch.backend.serves(first.device):
            return twin(*args, **kwargs)
        try:
            return kernel(*args, **kwargs)
        except LaunchError as why:
            if twin.__name__ not in _told:
                _told.add(twin.__name__)
                _log.warning("%s runs in torch, slower: %s", twin.__name__, why)
            return twin(*args, **kwargs)

    return dispatched


_pool_rows = _on_device(cuda_ops.pool_rows, reference.pool_rows)
gather_rows = _on_device(cuda_ops.gather_rows, reference.gather_rows)
step_rows = _on_device(cuda_ops.step_rows, reference.step_rows)
activate_rows = _on_device(cuda_ops.activate_rows, reference.activate_rows)
sparse_rows = _on_device(cuda_ops.sparse_rows, reference.sparse_rows)
cosine_pairs = _on_device(cuda_ops.cosine_pairs, reference.cosine_pairs)
maxsim = _on_device(cuda_ops.maxsim, reference.maxsim)
norm_rows = _on_device(cuda_ops.norm_rows, reference.norm_rows)
rotary = _on_device(cuda_ops.rotary, reference.rotary)
gated = _on_device(cuda_ops.gated, reference.gated)
kv_gather = _on_device(cuda_ops.kv_gather, reference.kv_gather)
packed_attention = _on_device(cuda_ops.packed_attention, reference.packed_attention)
_kv_write = _on_device(cuda_ops.kv_write, reference.kv_write)
_paged_attention = _on_device(cuda_ops.paged_attention, reference.paged_attention)


def pool_rows(
    hidden: Tensor,
    cu_seqlens: Tensor,
    modes: Tensor,
    widths: Tensor,
    normalize: Tensor,
    output: Output = "float32",
    longest: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Vectors of sequences: `kernels.reference.pool_rows`."""
    own = hidden.is_contiguous() and native_rows.serves(hidden)
    run = native_rows.pool_rows if own and not launch.backend.serves(hidden.device) else _pool_rows
    return run(hidden, cu_seqlens, modes, widths, normalize, output, longest)


def kv_write(keys: Tensor, values: Tensor, slots: Tensor, key_cache: Tensor, value_cache: Tensor) -> None:
    """Into the pages of a cache: `kernels.reference.kv_write`."""
    own = native_pages.serves(key_cache, value_cache, keys, values)
    write = native_pages.kv_write if own and not launch.backend.serves(keys.device) else _kv_write
    write(keys, values, slots, key_cache, value_cache)


def paged_attention_of(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    *,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    **_: Any,
) -> Choice:
    """Which implementation `paged_attention` takes for these, and why."""
    asked = Asked(
        dtype=query.dtype,
        head_size=query.shape[2],
        value_size=value_cache.shape[3],
        softcap=softcap is not None,
        sinks=sinks is not None,
        paged=True,
    )
    return _choose(place(query.device), asked)


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    pages: Tensor,
    cu_seqlens: Tensor,
    key_lengths: Tensor,
    longest: int,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention to keys and values in the pages of a cache: `kernels.reference.paged_attention`."""
    where = pages, cu_seqlens, key_lengths, longest
    plain: dict[str, Any] = {"scale": scale, "window": window, "softcap": softcap}
    by = paged_attention_of(query, key_cache, value_cache, softcap=softcap, sinks=sinks).by
    if by == "native" and native_pages.serves_attention(query, key_cache, value_cache):
        return native_pages.paged_attention(query, key_cache, value_cache, *where, **plain)
    return _paged_attention(query, key_cache, value_cache, *where, **plain, sinks=sinks)
