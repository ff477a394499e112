"""The Python face of kernels/cpu/encoder.cpp; the twin is in `kernels.twins_cpu`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from carpool.kernels import native, native_linear, native_linear8, native_pages
from carpool.kernels.layout import Kept
from carpool.kernels.native import ACTIVATIONS, Batch, Shape, cu_seqlens_of, pointer
from carpool.kernels.native_rows import DescribedNorm, described_norm
from carpool.kernels.panels import Panels
from carpool.kernels.panels8 import Panels8
from carpool.kernels.reference import Activation
from carpool.kernels.twins_cpu import EncoderLayer, Norm

_IN_PANELS, _IN_TILES, _IN_8_BITS = range(3)  # as encoder.cpp counts them
_GATES = {None: 0, True: 1, False: 2}  # the same, by what is `gate_first`


class _Product(ctypes.Structure):
    """As encoder.cpp has it."""

    _fields_ = (
        ("layer", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in ("laid", "activation", "inputs", "outputs")),
    )


class _Layer(ctypes.Structure):
    """As encoder.cpp has it."""

    _fields_ = (
        *((name, _Product) for name in ("joint", "out", "up", "down")),
        *((name, DescribedNorm) for name in ("before", "query", "key", "attended", "between", "done")),
        ("attention", Shape),
        *((name, ctypes.c_int) for name in ("biased", "angles", "gate", "activation", "added")),
    )


class _Angles(ctypes.Structure):
    """As encoder.cpp has it."""

    _fields_ = (("cosines", ctypes.c_void_p), ("sines", ctypes.c_void_p), ("turned", ctypes.c_int))


class _Kept(ctypes.Structure):
    """As encoder.cpp has it."""

    _fields_ = (
        ("pages", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("slots", ctypes.c_void_p),
        ("start", ctypes.c_int),
        ("past", ctypes.c_void_p),
    )


class _Wanted(ctypes.Structure):
    """As encoder.cpp has it."""

    _fields_ = (("tokens", ctypes.c_void_p), ("count", ctypes.c_int))


class Encoder:
    """Layers described to the kernel once, and called as `kernels.twins_cpu.encoder`.

    It holds the weights that it points to and nothing that changes, so that a copy of a model goes on with the same.
    """

    def __init__(self, layers: Sequence[EncoderLayer], dtype: torch.dtype) -> None:
        """Raises ValueError for layers that this CPU does not run, or that do not fit each other."""
        assert native.library is not None
        self._layers = tuple(layers)
        self._held: list[ctypes.Structure] = []  # that descriptions point to
        self.width, self.dtype = layers[0].joint.inputs, dtype
        for layer in layers:
            if not _fits(layer, torch.empty(1, self.width, dtype=dtype)):
                raise ValueError(f"not a layer of {self.width} that is run natively here in {dtype}")
        self._widest = max(max(layer.joint.outputs, layer.up.outputs) for layer in layers)
        self._other = max(max(self.width, layer.out.inputs) for layer in layers)
        self._tables = 1 + max(-1 if layer.angles is None else layer.angles for layer in layers)
        self._narrowest = min(_size(layer) for layer in layers)
        self._described = (_Layer * len(layers))(*map(self._describe, layers))

    def __len__(self) -> int:
        return len(self._layers)

    def __deepcopy__(self, _memo: dict[int, Any]) -> Encoder:
        return self

    def __call__(
        self,
        hidden: Tensor,
        runs: Sequence[tuple[int, int]],
        angles: Sequence[tuple[Tensor, Tensor]] = (),
        kept: Kept | None = None,
        wanted: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """[T, H] → [T, H], rows contiguous; so is `bias`, and float32.

        With `kept`, whose layers are these, keys and values go into their pages, and those of tokens with a past come
        from there. With `wanted`, int64 [R], other tokens are NaN, and not computed behind the last attention.
        """
        tokens = sum(length * times for length, times in runs)
        if hidden.dtype != self.dtype or hidden.shape != (tokens, self.width) or not _is_plain(hidden):
            raise ValueError(
                f"{hidden.dtype} {list(hidden.shape)} is not what an encoder for {self.dtype} [{tokens}, {self.width}] "
                "takes"
            )
        assert native.library is not None
        is_float = self.dtype == torch.float32
        run = native.library.carpool_encoder_f32 if is_float else native.library.carpool_encoder_bf16
        room = hidden.new_empty(tokens * (self._widest + self._other + self.width))
        out = torch.empty_like(hidden)
        keeping, own, _tables = self._keeping(kept, tokens)
        cu_seqlens = cu_seqlens_of(tuple(runs) if own is None else own)
        if kept is not None and kept.past is not None and cu_seqlens[-1] != kept.past.start:
            raise ValueError(f"{cu_seqlens[-1]} tokens have no past, and others begin with {kept.past.start}")
        batch = Batch(ctypes.addressof(cu_seqlens), None, None, len(cu_seqlens) - 1)
        few = None
        if wanted is not None:
            if wanted.ndim != 1 or wanted.dtype != torch.int64 or not _is_plain(wanted):
                raise ValueError(f"{wanted.dtype} {list(wanted.shape)} are not the numbers of tokens")
            few = ctypes.byref(_Wanted(wanted.data_ptr(), len(wanted)))
        fault = run(
            *(self._described, len(self), self._turning(angles, tokens), self._leaning(bias, runs)),
            *(pointer(hidden), tokens),
            *(ctypes.byref(batch), keeping, few, pointer(room)),
            *(ctypes.c_int64(self._widest), ctypes.c_int64(self._other), pointer(out), native.level),
        )
        if fault < 0:
            raise ValueError(f"a token is wanted that is not among {tokens}, or more than once")
        native.check(fault)
        return out

    def _turning(self, angles: Sequence[tuple[Tensor, Tensor]], tokens: int) -> ctypes.Array[_Angles]:
        """What the kernel is told of them; it does not hold them."""
        for table in (table for pair in angles for table in pair):
            columns = table.shape[-1]
            shaped = table.shape == (tokens, columns) and columns <= self._narrowest and columns % 32 == 0
            if not shaped or table.dtype != torch.float32 or not _is_plain(table):
                raise ValueError(f"{table.dtype} {list(table.shape)} are not angles of {tokens} tokens")
        if len(angles) < self._tables or any(cosines.shape != sines.shape for cosines, sines in angles):
            raise ValueError(f"{len(angles)} tables of angles for layers that take {self._tables}")
        pairs = (_Angles(one.data_ptr(), two.data_ptr(), one.shape[1]) for one, two in angles)
        return (_Angles * len(angles))(*pairs)

    def _leaning(self, bias: Tensor | None, runs: Sequence[tuple[int, int]]) -> Any:
        """What the kernel is told of a bias; it does not hold it."""
        biased = [layer for layer in self._layers if layer.biased]
        if not biased:
            return None
        if bias is None or bias.dtype != torch.float32 or not _is_plain(bias):
            raise ValueError("layers that are biased want a bias, float32 and contiguous")
        for layer in biased:
            native.check_bias(bias, *layer.all_heads[:2], runs)
        return ctypes.byref(native.described_bias(bias))

    def _keeping(
        self, kept: Kept | None, tokens: int
    ) -> tuple[Any, tuple[tuple[int, int], ...] | None, tuple[Any, ...]]:
        """What the kernel is told; the runs that have no past, None for all; and what all this points to."""
        if kept is None:
            return None, None, ()
        if len(kept.layers) != len(self) or kept.slots.shape != (tokens,) or kept.slots.dtype != torch.int64:
            raise ValueError(
                f"pages of {len(kept.layers)} layers and {list(kept.slots.shape)} slots do not fit"
            )
        first = kept.layers[0][0]
        for layer, pages in zip(self._layers, kept.layers, strict=True):
            shape = (*first.shape[:2], layer.all_heads[1], _size(layer))
            if any(x.shape != shape or x.dtype != self.dtype or not _is_plain(x) for x in pages):
                raise ValueError(f"keys and values are not kept as {list(shape)} in {self.dtype}")
        pointers = [x.data_ptr() for pages in kept.layers for x in pages]
        table, slots = (ctypes.c_void_p * len(pointers))(*pointers), kept.slots.contiguous()
        told = _Kept(ctypes.addressof(table), first.shape[0] * first.shape[1], slots.data_ptr(), 0, None)
        past = kept.past
        if past is None:
            return ctypes.byref(told), None, (table, slots)
        if not all(layer.causal and not layer.biased for layer in self._layers):
            raise ValueError("a layer that looks ahead, or is biased, cannot look back at what is kept")
        queries = tokens - past.start
        batch, tables = native_pages.batch_of(queries, first, past.pages, past.cu_seqlens, past.key_lengths)
        told.start, told.past = past.start, ctypes.addressof(batch)
        runs = () if past.others is None else past.others.runs
        return ctypes.byref(told), runs, (table, slots, batch, tables)

    def _describe(self, layer: EncoderLayer) -> _Layer:
        heads, kv_heads, _ = layer.all_heads
        size, gated = _size(layer), layer.gate_first is not None
        strides = (*[layer.joint.outputs] * 3, layer.out.inputs)
        kind = layer.scale, layer.softcap or 0.0, layer.causal, native.reach(layer.window)
        norms = layer.before, layer.query, layer.key, layer.attended, layer.between, layer.done
        return _Layer(
            self._product(layer.joint),
            self._product(layer.out),
            self._product(layer.up, None if gated else layer.activation),
            self._product(layer.down),
            *map(described_norm, norms),
            Shape(heads, kv_heads, size, *strides, *kind),
            layer.biased,
            -1 if layer.angles is None else layer.angles,
            *(_GATES[layer.gate_first], ACTIVATIONS[layer.activation], layer.added),
        )

    def _product(self, layer: Panels | Panels8, activation: Activation | None = None) -> _Product:
        if isinstance(layer, Panels8):
            described, laid = native_linear8.described(layer), _IN_8_BITS
        else:
            described, laid = native_linear.described(layer), _IN_TILES if layer.tiled else _IN_PANELS
        self._held.append(described)
        activated = ACTIVATIONS[activation]
        return _Product(ctypes.addressof(described), laid, activated, layer.inputs, layer.outputs)


def _size(layer: EncoderLayer) -> int:
    """Of a head."""
    return layer.joint.outputs // sum(layer.all_heads)


def _fits(layer: EncoderLayer, row: Tensor) -> bool:
    """Whether its parts fit each other, and rows like this one, [1, H]; and whether they are run here."""
    width, (heads, kv_heads, _), gated = row.shape[1], layer.all_heads, layer.gate_first is not None
    products = layer.joint, layer.out, layer.up, layer.down
    if min(heads, kv_heads) < 1 or heads % kv_heads or not all(_multiplies(one, row) for one in products):
        return False
    size, wide = _size(layer), layer.down.inputs
    joint, mixed = size * sum(layer.all_heads), size * heads
    shapes = (width, joint), (mixed, width), (width, wide * (1 + gated)), (wide, width)
    norms = [(norm, width) for norm in (layer.before, layer.attended, layer.between, layer.done)]
    norms += [(norm, size) for norm in (layer.query, layer.key)]
    head = row.new_empty(1, 1, size)
    return (
        tuple((product.inputs, product.outputs) for product in products) == shapes
        and all(norm is None or _is_of(norm, width) for norm, width in norms)
        and native.serves(head, head, head)
        and width % 16 == 0
        and not (gated and (layer.activation is None or wide % 16))
        and not (layer.angles is not None and layer.angles < 0)
    )


def _is_plain(x: Tensor) -> bool:
    return x.is_cpu and x.is_contiguous()


def _is_of(norm: Norm, width: int) -> bool:
    """Whether it is of rows of this width, and as the kernel reads it."""
    vectors = [vector for vector in (norm.weight, norm.bias) if vector is not None]
    return all(x.shape == (width,) and x.dtype == torch.float32 and _is_plain(x) for x in vectors)


def _multiplies(layer: Panels | Panels8, x: Tensor) -> bool:
    """Whether its kernel takes rows like x here."""
    if isinstance(layer, Panels8):
        return native_linear8.serves(x)
    return native_linear.takes(x, layer)
