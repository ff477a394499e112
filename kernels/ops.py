"""The operations as the engine calls them: the fastest implementation that serves, else the torch twin."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from carpool.kernels import native, reference


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
