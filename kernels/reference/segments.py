"""What belongs to which sequence, and whether all of them ask for the same."""

from __future__ import annotations

import torch
from torch import Tensor


def segment_ids(cu_seqlens: Tensor, tokens: int | None = None) -> Tensor:
    """int64 [T]: which sequence each token belongs to. cu_seqlens int [B+1], whose last is `tokens`, if known."""
    lengths = cu_seqlens.diff().long()
    return torch.repeat_interleave(
        torch.arange(len(lengths), device=cu_seqlens.device), lengths, output_size=tokens
    )


def shared_value(values: Tensor) -> int | None:
    """What all of them are; None if they differ, are none, or lie where the host would wait for the answer."""
    if values.device.type != "cpu" or not len(values):
        return None
    low, high = values.aminmax()
    return int(low) if low == high else None
