"""What a layer does to its rows between the products: norm, rotary positions, gate."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Literal["silu", "gelu", "gelu_tanh"]


def norm_rows(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    centred: bool,
    keep_sum: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """x [R, H] plus the residual, in x's dtype, and its norm times weight plus bias, float32 [H] each, in x's dtype.

    `centred`: LayerNorm, else RMSNorm. Returns (norm, sum); the sum is x itself where there is no residual, and
    None where it is not to be kept.
    """
    total = x if residual is None else (x.float() + residual.float()).to(x.dtype)
    wide = total.float()
    if centred:
        wide = wide - wide.mean(1, keepdim=True)
    normed = wide * torch.rsqrt(wide.square().mean(1, keepdim=True) + eps) * weight
    return (normed if bias is None else normed + bias).to(x.dtype), total if keep_sum else None


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions of packed heads: x [T, N, D], cos and sin [T, R], float32 or of x's dtype → [T, N, D].

    The left half of the first R columns is turned into the right one; the columns from R on stay as they are.
    """
    turned = cos.shape[1]
    head, rest = x[..., :turned].float(), x[..., turned:]
    cosine, sine = cos.float()[:, None], sin.float()[:, None]
    left, right = head.chunk(2, -1)
    out = head * cosine + torch.cat((-right, left), -1) * sine
    return torch.cat((out.to(x.dtype), rest), -1)


def gated(both: Tensor, activation: Activation, *, gate_first: bool = True) -> Tensor:
    """activation(gate) * up: both [R, 2F], gate and up beside each other → [R, F] in its dtype."""
    one, other = both.float().chunk(2, -1)
    gate, up = (one, other) if gate_first else (other, one)
    if activation == "silu":
        return (F.silu(gate) * up).to(both.dtype)
    return (F.gelu(gate, approximate="none" if activation == "gelu" else "tanh") * up).to(both.dtype)
