"""The operations as the engine calls them: the fastest implementation that serves, else the torch twin."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import wraps
from typing import ParamSpec, TypeVar

from torch import Tensor

from carpool.kernels import cuda_ops, launch, native, reference
from carpool.kernels.launch import LaunchError

P = ParamSpec("P")
R = TypeVar("R")

_log = logging.getLogger(__name__)
_told: set[str] = set()  # operations that were left to their twin on a device, and said so


def attention_in_use() -> str:
    """Which attention runs on a CPU, for people to read."""
    return f"native ({native.LEVELS[native.level]})" if native.library else "torch"


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    runs: Sequence[tuple[int, int]],
    *,
    scale: float,
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention within each sequence of a packed row: see `kernels.reference.varlen_attention`."""
    if bias is None and sinks is None and native.serves(query, key, value):
        return native.varlen_attention(
            query, key, value, runs, scale=scale, causal=causal, window=window, softcap=softcap
        )
    return reference.varlen_attention(
        query,
        key,
        value,
        runs,
        scale=scale,
        causal=causal,
        window=window,
        softcap=softcap,
        bias=bias,
        sinks=sinks,
    )


attention_to_first = reference.attention_to_first
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


pool_rows = _on_device(cuda_ops.pool_rows, reference.pool_rows)
gather_rows = _on_device(cuda_ops.gather_rows, reference.gather_rows)
step_rows = _on_device(cuda_ops.step_rows, reference.step_rows)
activate_rows = _on_device(cuda_ops.activate_rows, reference.activate_rows)
sparse_rows = _on_device(cuda_ops.sparse_rows, reference.sparse_rows)
cosine_pairs = _on_device(cuda_ops.cosine_pairs, reference.cosine_pairs)
maxsim = _on_device(cuda_ops.maxsim, reference.maxsim)
norm_rows = _on_device(cuda_ops.norm_rows, reference.norm_rows)
rotary = _on_device(cuda_ops.rotary, reference.rotary)
gated = _on_device(cuda_ops.gated, reference.gated)
kv_write = _on_device(cuda_ops.kv_write, reference.kv_write)
kv_gather = _on_device(cuda_ops.kv_gather, reference.kv_gather)
