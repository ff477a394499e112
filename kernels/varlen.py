"""torch's `varlen_attn` (FlashAttention, on CUDA devices) as our operations call it, and whether it works here."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from carpool.kernels import reference

_AGREES = (
    2e-2  # of numbers around 1 in bfloat16, whose weights are rounded on the way; a wrong window gives 0.3
)


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    longest: int,
    *,
    scale: float,
    causal: bool = False,
    window: int | None = None,
) -> Tensor:
    """As `kernels.reference.varlen_attention` with `cu_seqlens` int32 [B+1] in place of runs, in float16 or bfloat16.

    torch counts in a window how far a token sees besides itself, we count itself as well. One split: more of them would
    be chosen by the longest text of a batch, and a text's result would depend on its company.
    """
    reach = -1 if window is None else window - 1
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    return implementation()(
        query,
        key,
        value,
        cu_seqlens,
        cu_seqlens,
        longest,
        longest,
        scale=scale,
        window_size=(reach, 0 if causal else reach),
        enable_gqa=query.shape[1] != key.shape[1],
        num_splits=1,
    )


@cache
def implementation() -> Callable[..., Tensor]:
    """torch's own. Imported where there is a device for it: it brings torch's compiler along, which takes seconds."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn  # type: ignore[return-value]  # a pair only if asked for more than the output


@cache
def fault(device: torch.device) -> str | None:
    """Why it cannot be used on this device, as the end of a sentence; None if it does there what its twin does.

    Tried and not looked up: builds of torch leave it out, and a window counted otherwise would be wrong in silence.
    """
    lengths = (5, 1, 9)
    generator = torch.Generator().manual_seed(11)
    query, key, value = (
        torch.randn(sum(lengths), heads, 64, generator=generator).to(device, torch.bfloat16)
        for heads in (4, 2, 2)
    )
    cu_seqlens = torch.tensor((0, 5, 6, 15), dtype=torch.int32, device=device)
    runs = [(length, 1) for length in lengths]
    for causal in (False, True):
        for window in (None, 3):
            try:
                out = varlen_attention(
                    query, key, value, cu_seqlens, max(lengths), scale=0.2, causal=causal, window=window
                )
            except Exception as error:  # not built in, or not for this device
                first = str(error).strip().partition("\n")[0].partition(". ")[0].rstrip(".")
                return f"fails here ({first or type(error).__name__})"
            told = reference.varlen_attention(
                query, key, value, runs, scale=0.2, causal=causal, window=window
            )
            if not float((out.float() - told.float()).abs().max()) <= _AGREES:
                return "computes something else here than it is documented to"
    return None
