"""The Python face of kernels/cpu/rows.cpp; the twins are in `kernels.reference`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from carpool.kernels import native, reference
from carpool.kernels.native import ACTIVATIONS, pointer
from carpool.kernels.reference import Activation, Output
from carpool.kernels.twins_cpu import Norm

_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}


class DescribedNorm(ctypes.Structure):
    """As rows.h has it; without a weight there is none."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("eps", ctypes.c_float),
        ("centred", ctypes.c_int),
    )


class _Table(ctypes.Structure):
    """As rows.cpp has it."""

    _fields_ = (("rows", ctypes.c_void_p), ("ids", ctypes.c_void_p), ("count", ctypes.c_int64))


def described_norm(norm: Norm | None) -> DescribedNorm:
    """Its vectors have to outlive the call."""
    if norm is None:
        return DescribedNorm()
    bias = None if norm.bias is None else norm.bias.data_ptr()
    return DescribedNorm(norm.weight.data_ptr(), bias, norm.eps, norm.centred)


def serves(x: Tensor, width: int | None = None) -> bool:
    """Whether rows of x's dtype are served: on a CPU, float32 or bfloat16, `width` (x's last) a multiple of 16.

    `rotary` asks it with half of the columns that are turned, `gated` with half of its row.
    """
    width = x.shape[-1] if width is None else width
    return (
        native.library is not None
        and x.device.type == "cpu"
        and x.dtype in _SUFFIX
        and width % 16 == 0
        and x.stride(-1) == 1
    )


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
    """As its twin; x and the residual contiguous."""
    _check(x.is_contiguous() and (residual is None or residual.is_contiguous()), x)
    _check(residual is None or (residual.shape == x.shape and residual.dtype == x.dtype), x)
    for vector in (weight, bias):
        _check(vector is None or _is_of(vector, x.shape[1:]), x)
    out = torch.empty_like(x)
    total = x if residual is None else torch.empty_like(x) if keep_sum else out
    norm = described_norm(Norm(weight, bias, eps, centred))
    _call(
        "norm_rows",
        x,
        *(ctypes.byref(norm), pointer(x), pointer(residual), ctypes.c_int64(len(x)), x.shape[1]),
        *(pointer(out), pointer(total)),
    )
    return out, total if keep_sum else None


def embed_rows(tables: Sequence[Tensor], ids: Sequence[Tensor | None], norm: Norm) -> Tensor:
    """As its twin; the ids int64 and contiguous, one of them at least given. Raises IndexError as torch does."""
    first, asked = tables[0], [own for own in ids if own is not None]
    tokens, width = asked[0].numel(), first.shape[1]
    _check(
        all(own.dtype == torch.int64 and own.is_contiguous() and own.numel() == tokens for own in asked),
        first,
    )
    _check(
        all(own.is_contiguous() and own.shape[1] == width and own.dtype == first.dtype for own in tables),
        first,
    )
    for vector in (norm.weight, norm.bias):
        _check(vector is None or _is_of(vector, (width,)), first)
    described = [
        _Table(table.data_ptr(), None if own is None else own.data_ptr(), len(table))
        for table, own in zip(tables, ids, strict=True)
    ]
    out = first.new_empty(tokens, width)
    room = first.new_empty(width, dtype=torch.float32)
    wrong = _call(
        "embed_rows",
        first,
        ctypes.byref(described_norm(norm)),
        *((_Table * len(described))(*described), len(described), ctypes.c_int64(tokens), width),
        *(pointer(room), pointer(out)),
    )
    if wrong:
        raise IndexError("a token's row lies beyond its table")
    return out


def gated(both: Tensor, activation: Activation, *, gate_first: bool = True) -> Tensor:
    """As its twin."""
    _check(both.ndim == 2 and both.shape[1] % 2 == 0, both)
    gate, up = both.chunk(2, -1) if gate_first else reversed(both.chunk(2, -1))
    out = both.new_empty(gate.shape)
    _call(
        "gated",
        gate,
        *(ACTIVATIONS[activation], pointer(gate), pointer(up), ctypes.c_int64(both.stride(0))),
        *(ctypes.c_int64(len(gate)), gate.shape[1], pointer(out)),
    )
    return out


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As its twin; each token's heads [N, D] without gaps."""
    tokens, heads, size = x.shape
    turned = cos.shape[1]
    # The stride of one head's dimension is anything.
    _check((heads == 1 or x.stride(1) == size) and turned <= size and turned % 32 == 0, x)
    _check(cos.shape == sin.shape == (tokens, turned), x)
    cosines, sines = cos.float().contiguous(), sin.float().contiguous()
    out = x.new_empty(x.shape)
    _call(
        "rotary",
        x,
        *(pointer(x), ctypes.c_int64(x.stride(0)), tokens, heads, size, turned),
        *(pointer(cosines), pointer(sines), pointer(out)),
    )
    return out


def pool_rows(
    hidden: Tensor,
    cu_seqlens: Tensor,
    modes: Tensor,
    widths: Tensor,
    normalize: Tensor,
    output: Output = "float32",
    longest: int | None = None,
) -> tuple[Tensor, Tensor]:
    """As its twin; hidden contiguous. Other outputs than float32 are made of the pooled rows in torch."""
    _check(hidden.is_contiguous(), hidden)
    count, width = len(cu_seqlens) - 1, hidden.shape[1]
    plain = output == "float32"
    cut = (widths if plain else torch.full_like(widths, width)).int().contiguous()
    unit = (normalize if plain else torch.zeros_like(normalize)).to(torch.uint8).contiguous()
    bounds, kinds = cu_seqlens.int().contiguous(), modes.to(torch.int8).contiguous()
    _check(hidden.ndim == 2 and len(kinds) == len(cut) == len(unit) == count >= 0, hidden)
    out = hidden.new_empty(count, width, dtype=torch.float32)
    wrong = _call(
        "pool_rows",
        hidden,
        *(pointer(hidden), ctypes.c_int64(len(hidden)), pointer(bounds), pointer(kinds), pointer(cut)),
        *(pointer(unit), count, width, pointer(out)),
    )
    _check(not wrong, hidden)
    return (out, out.new_ones(count)) if plain else reference.finish_rows(out, widths, normalize, output)


def _is_of(vector: Tensor, shape: Sequence[int]) -> bool:
    """Whether a norm's vector is of rows of this shape, and as the kernels read it."""
    return vector.dtype == torch.float32 and vector.shape == shape and vector.is_contiguous()


def _check(holds: bool, x: Tensor) -> None:
    if not holds:
        raise ValueError(f"{x.dtype} {list(x.shape)}, strides {x.stride()}, do not fit the rest")


def _call(name: str, x: Tensor, *args: Any) -> Any:
    """The function for x's dtype, at this CPU's level; what it returns, if it does."""
    if not serves(x):
        raise ValueError(f"rows of {x.dtype} {list(x.shape)} are not served natively here")
    return getattr(native.library, f"carpool_{name}_{_SUFFIX[x.dtype]}")(*args, native.level)
