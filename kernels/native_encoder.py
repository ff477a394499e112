"""The Python face of kernels/cpu/encoder.cpp; the twin is in `kernels.twins_cpu`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from carpool.kernels import native, native_linear, native_linear8
from carpool.kernels.native import ACTIVATIONS, Batch, Shape, cu_seqlens_of, pointer
from carpool.kernels.panels import Panels
from carpool.kernels.panels8 import Panels8
from carpool.kernels.reference import Activation
from carpool.kernels.twins_cpu import EncoderLayer

_IN_PANELS, _IN_TILES, _IN_8_BITS = range(3)  # as encoder.cpp counts them


class _Product(ctypes.Structure):
    """As encoder.cpp has it."""

    _fields_ = (("layer", ctypes.c_void_p), ("laid", ctypes.c_int), ("activation", ctypes.c_int))


class _Norm(ctypes.Structure):
    """As encoder.cpp has it."""

    _fields_ = (("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("eps", ctypes.c_float))


class _Layer(ctypes.Structure):
    """As encoder.cpp has it."""

    _fields_ = (
        *((name, _Product) for name in ("joint", "out", "up", "down")),
        *((name, _Norm) for name in ("attended", "done")),
        ("attention", Shape),
    )


class Encoder:
    """Layers described to the kernel once, and called as `kernels.twins_cpu.encoder`.

    It holds the weights that it points to and nothing that changes, so that a copy of a model goes on with the same.
    """

    def __init__(self, layers: Sequence[EncoderLayer], dtype: torch.dtype) -> None:
        """Raises ValueError for layers that this CPU does not run, or that do not fit each other."""
        assert native.library is not None
        self._layers = tuple(layers)
        self._held: list[ctypes.Structure] = []  # that descriptions point to
        self.width, self._wide = layers[0].up.inputs, layers[0].up.outputs
        self._check(dtype)
        self.dtype = dtype
        self._described = (_Layer * len(layers))(*map(self._describe, layers))

    def __len__(self) -> int:
        return len(self._layers)

    def __deepcopy__(self, _memo: dict[int, Any]) -> Encoder:
        return self

    def __call__(self, hidden: Tensor, runs: Sequence[tuple[int, int]], count: int | None = None) -> Tensor:
        """[T, H] → [T, H], rows contiguous, through the first `count` layers, all by default."""
        tokens = sum(length * times for length, times in runs)
        count = len(self) if count is None else count
        fits = hidden.is_cpu and hidden.dtype == self.dtype and hidden.is_contiguous()
        if not fits or hidden.shape != (tokens, self.width) or not 0 < count <= len(self):
            raise ValueError(
                f"{hidden.dtype} {list(hidden.shape)} through {count} layers is not what an encoder of {len(self)} for "
                f"{self.dtype} [{tokens}, {self.width}] takes"
            )
        assert native.library is not None
        is_float = self.dtype == torch.float32
        run = native.library.carpool_encoder_f32 if is_float else native.library.carpool_encoder_bf16
        room = hidden.new_empty(tokens * (max(3 * self.width, self._wide) + 2 * self.width))
        out = torch.empty_like(hidden)
        cu_seqlens = cu_seqlens_of(tuple(runs))
        batch = Batch(ctypes.addressof(cu_seqlens), None, None, len(cu_seqlens) - 1)
        native.check(
            run(
                *(self._described, count, self.width, self._wide),
                *(pointer(hidden), tokens, ctypes.byref(batch), pointer(room), pointer(out), native.level),
            )
        )
        return out

    def _check(self, dtype: torch.dtype) -> None:
        width, wide = self.width, self._wide
        shapes = (width, 3 * width), (width, width), (width, wide), (wide, width)
        for layer in self._layers:
            products = layer.joint, layer.out, layer.up, layer.down
            vectors = [vector for norm in (layer.attended, layer.done) for vector in (norm.weight, norm.bias)]
            row = torch.empty(1, width, dtype=dtype)
            heads = row.new_empty(1, layer.heads, width // layer.heads)
            if (
                tuple((product.inputs, product.outputs) for product in products) != shapes
                or not all(_multiplies(product, row) for product in products)
                or not all(
                    x is not None and x.shape == (width,) and x.dtype == torch.float32 for x in vectors
                )
                or not (layer.attended.centred and layer.done.centred)
                or width % layer.heads
                or not native.serves(heads, heads, heads)
            ):
                raise ValueError(f"not a layer of {width} and {wide} that is run natively here in {dtype}")

    def _describe(self, layer: EncoderLayer) -> _Layer:
        width, size = self.width, self.width // layer.heads
        strides = (3 * width, 3 * width, 3 * width, width)
        window, cap = native.reach(layer.window), layer.softcap or 0.0
        shape = (layer.heads, layer.heads, size, *strides, layer.scale, cap, False, window)
        products = ((layer.joint, None), (layer.out, None), (layer.up, layer.activation), (layer.down, None))
        return _Layer(
            *(self._product(*product) for product in products),
            *(
                _Norm(pointer(norm.weight), pointer(norm.bias), norm.eps)
                for norm in (layer.attended, layer.done)
            ),
            Shape(*shape),
        )

    def _product(self, layer: Panels | Panels8, activation: Activation | None) -> _Product:
        if isinstance(layer, Panels8):
            described, laid = native_linear8.described(layer), _IN_8_BITS
        else:
            described, laid = native_linear.described(layer), _IN_TILES if layer.tiled else _IN_PANELS
        self._held.append(described)
        return _Product(ctypes.addressof(described), laid, ACTIVATIONS[activation])


def _multiplies(layer: Panels | Panels8, x: Tensor) -> bool:
    """Whether its kernel takes rows like x here."""
    if isinstance(layer, Panels8):
        return native_linear8.serves(x)
    return native_linear.takes(x, layer)
