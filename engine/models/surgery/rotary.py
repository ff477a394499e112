"""Rotary positions of query and key in three passes over each, where transformers' function takes five; by a
kernel, on a device or a CPU, in one.

That function is a global of each model's file, and everybody in the process calls it there. It is left alone: the
attention layers of one model get a class whose forward is the same code with one other global.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from carpool.engine.models.surgery.agreement import agree
from carpool.engine.models.surgery.rehearsal import Rehearsal
from carpool.kernels import launch, native_rows, ops

NAME = "apply_rotary_pos_emb"  # in every file of transformers that has one
Turn = Callable[[Tensor, Tensor, Tensor], Tensor]  # as `kernels.ops.rotary`


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """q [1, N, T, D] and k [1, N_kv, T, D], turned by cos and sin [1, T, R]; columns from R on stay as they are.

    With heads behind tokens, q [1, T, N, D], if `unsqueeze_dim` is 2.
    """
    kernel = _kernel(q, cos.shape[-1]) if len(q) == len(cos) == 1 else None
    if kernel is not None:
        angles = cos[0].contiguous(), sin[0].contiguous()
        return _by_kernel(kernel, q, *angles, unsqueeze_dim), _by_kernel(kernel, k, *angles, unsqueeze_dim)
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _kernel(x: Tensor, columns: int) -> Turn | None:
    """What turns so many columns of x in one pass where x lies, if anything does."""
    if launch.backend.serves(x.device):
        return ops.rotary
    return native_rows.rotary if native_rows.serves(x, columns // 2) else None


def _by_kernel(kernel: Turn, x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """x [1, N, T, D], or [1, T, N, D] if `heads` is 2; cos and sin [T, R] → the same, turned, in x's dtype."""
    # Views of [T, N, D], often of a part of a wider row: the kernel reads them where they are.
    rows = x.movedim(heads, 2)[0]
    if rows.stride(1) != rows.shape[2] or rows.stride(2) != 1:  # other things lie between its heads
        rows = rows.contiguous()
    return kernel(rows, cos, sin)[None].movedim(2, heads)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The left half of the columns is turned into the right one, as in GPT-NeoX."""
    size = cos.shape[-1]
    half = size // 2
    turned = x[..., :size]
    out = turned * cos
    out[..., :half].addcmul_(turned[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(turned[..., :half], sin[..., half:])
    return out if size == x.shape[-1] else torch.cat((out, x[..., size:]), -1)


@cache
def _turned(kind: Any) -> type[nn.Module] | None:
    """A class like `kind` whose forward calls `rotate`; None if its forward calls no function that agrees with it."""
    stock = kind.forward
    if NAME not in getattr(getattr(stock, "__code__", None), "co_names", ()):
        return None
    if not _does_the_same(stock.__globals__.get(NAME)):
        return None
    own_globals = {**stock.__globals__, NAME: rotate}
    forward = FunctionType(stock.__code__, own_globals, stock.__name__, stock.__defaults__, stock.__closure__)
    forward.__kwdefaults__ = stock.__kwdefaults__
    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


def _does_the_same(function: Any) -> bool:
    """On random angles, where other conventions (neighbours turned into each other, half of the angles) show."""
    generator = torch.Generator().manual_seed(1)
    q, k = (torch.randn(1, heads, 5, 16, generator=generator) for heads in (4, 2))
    for size in (16, 8):
        cos, sin = torch.randn(2, 1, 5, size, generator=generator)
        try:
            expected = function(q, k, cos, sin)
        except Exception:
            if size == q.shape[-1]:
                return False
            continue  # it cannot turn a part of the columns, and is never asked to
        if not all(map(agree, rotate(q, k, cos, sin), expected)):
            return False
    return True


def turn(path: str, attention: nn.Module, rehearsal: Rehearsal) -> bool:
    """Have an attention layer call `rotate`, if its forward calls transformers' function and then says the same."""
    stock: Any = type(attention)
    turned = _turned(stock)
    if turned is None or "forward" in vars(attention):
        return False

    def become(kind: type[nn.Module]) -> None:
        attention.__class__ = kind

    return rehearsal.holds(path, attention, lambda: become(turned), lambda: become(stock))
