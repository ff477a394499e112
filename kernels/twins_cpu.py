"""What native CPU kernels compute beyond `kernels.reference`, in plain torch, under their names and signatures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from carpool.kernels.panels import Panels
from carpool.kernels.panels8 import Panels8
from carpool.kernels.reference import Activation, gated, rotary, varlen_attention


@dataclass(frozen=True, slots=True)
class Norm:
    """LayerNorm if `centred`, else RMSNorm. weight and bias float32 [H]."""

    weight: Tensor
    bias: Tensor | None
    eps: float
    centred: bool


def embed_rows(tables: Sequence[Tensor], ids: Sequence[Tensor | None], norm: Norm) -> Tensor:
    """norm(the sum of tables[i][ids[i]]): tables [V_i, H] of one dtype, ids int64 [T] each, None for row 0 → [T, H].

    Summed in float32 and rounded once.
    """
    rows = [table[:1] if own is None else table[own] for table, own in zip(tables, ids, strict=True)]
    total = sum((row.float() for row in rows), start=torch.zeros(()))
    return _normed(total, norm).to(tables[0].dtype)


def activate(x: Tensor, activation: Activation) -> Tensor:
    """Any shape, in float32 and back."""
    wide = x.float()
    if activation == "silu":
        return F.silu(wide).to(x.dtype)
    return F.gelu(wide, approximate="none" if activation == "gelu" else "tanh").to(x.dtype)


def linear(x: Tensor, layer: Panels, activation: Activation | None = None) -> Tensor:
    """activation(x · weightᵀ + bias): [T, in] → [T, out] in the weights' dtype, summed in float32."""
    y = _product(x, layer)
    return y.to(x.dtype) if activation is None else activate(y, activation).to(x.dtype)


def linear_norm(
    x: Tensor, layer: Panels, residual: Tensor | None, norm: Norm | None, *, added: bool = False
) -> Tensor:
    """norm(residual + x · weightᵀ + bias) or, if the residual is `added` behind the norm, norm(x · weightᵀ + bias) +
    residual: [T, in] → [T, out], rounded once.
    """
    return _finished(_product(x, layer), residual, norm, added=added).to(x.dtype)


def _product(x: Tensor, layer: Panels) -> Tensor:
    """float32 [T, out]"""
    weight, bias = layer.unpacked()
    return F.linear(x.float(), weight.float(), bias)


def _finished(y: Tensor, residual: Tensor | None, norm: Norm | None, *, added: bool) -> Tensor:
    y = y if residual is None or added else y + residual.float()
    y = y if norm is None else _normed(y, norm)
    return y + residual.float() if residual is not None and added else y


def _normed(y: Tensor, norm: Norm) -> Tensor:
    """float32 [..., H] → [..., H]"""
    y = y - y.mean(-1, keepdim=True) if norm.centred else y
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + norm.eps) * norm.weight
    return y if norm.bias is None else y + norm.bias


# ── in 8-bit integers ────────────────────────────────────────────────────────────────────────────────────────

_LEVELS = 255  # of a row, from its smallest number to its largest


def leveled(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [R, in] → uint8 [R, in]; for each row the height of a level and level 0, both float32 [R, 1].

    Where a number or the range is not finite, the height is NaN.
    """
    wide = rows.float()
    smallest, largest = wide.amin(1, keepdim=True), wide.amax(1, keepdim=True)
    step = (largest - smallest).div_(_LEVELS).clamp_min_(1e-20)
    levels = (wide - smallest).mul_(step.reciprocal()).round_()
    # By way of int8, to which torch converts many numbers at a time; turning the highest bit adds 128.
    signed = levels.sub_(128).to(torch.int8)
    height = torch.where(step.isfinite(), step, torch.nan)
    return signed.view(torch.uint8).bitwise_xor_(128), height, smallest


def linear8(x: Tensor, layer: Panels8, activation: Activation | None = None) -> Tensor:
    """activation(x · weightᵀ + bias) of what `leveled` makes of x: [T, in] → [T, out], the integers' product exact."""
    y = _product8(x, layer)
    return y.to(x.dtype) if activation is None else activate(y, activation).to(x.dtype)


def linear8_norm(
    x: Tensor, layer: Panels8, residual: Tensor | None, norm: Norm | None, *, added: bool = False
) -> Tensor:
    """As `linear_norm`, of what `leveled` makes of x: [T, in] → [T, out], rounded once."""
    return _finished(_product8(x, layer), residual, norm, added=added).to(x.dtype)


def _product8(x: Tensor, layer: Panels8) -> Tensor:
    """float32 [T, out]"""
    levels, height, smallest = leveled(x)
    product = levels.double() @ layer.unpacked().double().T
    step, total, bias = (vector[: layer.outputs] for vector in (layer.step, layer.sum, layer.bias))
    return product.float() * height * step + (smallest * total + bias)


# ── a whole encoder ──────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderLayer:
    """Attention, then a feed-forward block; what is None is not there.

        mixed = attention(turned(query(joint(before(x)))), ...)    attended = attended(x + out(mixed))
        wide = activation(up(between(attended)))                   done = done(attended + down(wide))

    `joint` makes query, key and value, in `heads` for the query and `kv_heads` each for the others, by default as many.
    `query` and `key` are norms of each head of theirs, and both are turned by the `angles` of that number. With
    `gate_first`, true or false, `up` makes twice as much: one half goes through the activation, and is multiplied with
    the other. If the residual is `added` last, `attended` and `done` are norms of what `out` and `down` make alone.
    `scale`, `causal`, `window` and `softcap` as `varlen_attention` has them; `biased`: so it does the encoder's `bias`.
    """

    joint: Panels | Panels8
    out: Panels | Panels8
    up: Panels | Panels8
    down: Panels | Panels8
    before: Norm | None = None
    query: Norm | None = None
    key: Norm | None = None
    attended: Norm | None = None
    between: Norm | None = None
    done: Norm | None = None
    activation: Activation | None
    gate_first: bool | None = None
    added: bool = False
    angles: int | None = None
    heads: int
    kv_heads: int | None = None
    scale: float
    causal: bool = False
    window: int | None = None
    softcap: float | None = None
    biased: bool = False

    @property
    def all_heads(self) -> tuple[int, int, int]:
        """Of query, key and value."""
        kv_heads = self.heads if self.kv_heads is None else self.kv_heads
        return self.heads, kv_heads, kv_heads


def encoder(
    hidden: Tensor,
    layers: Sequence[EncoderLayer],
    runs: Sequence[tuple[int, int]],
    angles: Sequence[tuple[Tensor, Tensor]] = (),
    bias: Tensor | None = None,
) -> Tensor:
    """[T, H] → [T, H] through all layers, of the sequences that `runs` of (length, count) are. Nothing is kept, and all
    is wanted.

    `angles`: cosines and sines, float32 [T, R] each, by which a layer may turn R columns of query and key. `bias`: one
    for all layers that are biased, as `varlen_attention` has it.
    """
    for layer in layers:
        joint = _linear(_norm(hidden, layer.before), layer.joint)
        heads = joint.view(len(hidden), sum(layer.all_heads), -1)
        query, key, value = heads.split(layer.all_heads, dim=1)  # type: ignore[no-untyped-call]
        query, key = _norm(query, layer.query), _norm(key, layer.key)
        if layer.angles is not None:
            query, key = (rotary(x, *angles[layer.angles]) for x in (query, key))
        kind: dict[str, Any] = {"scale": layer.scale, "causal": layer.causal, "window": layer.window}
        kind |= {"softcap": layer.softcap, "bias": bias if layer.biased else None}
        mixed = varlen_attention(query, key, value, runs, **kind)
        attended = _linear_norm(mixed.flatten(1), layer.out, hidden, layer.attended, layer.added)
        wide = _wide(_norm(attended, layer.between), layer)
        hidden = _linear_norm(wide, layer.down, attended, layer.done, layer.added)
    return hidden


def _wide(x: Tensor, layer: EncoderLayer) -> Tensor:
    if layer.gate_first is None or layer.activation is None:
        return _linear(x, layer.up, layer.activation)
    return gated(_linear(x, layer.up), layer.activation, gate_first=layer.gate_first)


def _norm(x: Tensor, norm: Norm | None) -> Tensor:
    return x if norm is None else _normed(x.float(), norm).to(x.dtype)


def _linear(x: Tensor, layer: Panels | Panels8, activation: Activation | None = None) -> Tensor:
    return linear(x, layer, activation) if isinstance(layer, Panels) else linear8(x, layer, activation)


def _linear_norm(
    x: Tensor, layer: Panels | Panels8, residual: Tensor, norm: Norm | None, added: bool
) -> Tensor:
    if isinstance(layer, Panels):
        return linear_norm(x, layer, residual, norm, added=added)
    return linear8_norm(x, layer, residual, norm, added=added)
