"""The native CPU kernels, built with sanitizers, over the corners of their shapes: python -m emu.sanitized_cpu LIBRARY

With `--fault` one kernel is told of a row more than its tensors have, instead.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import replace
from itertools import product
from typing import Any

import torch

from carpool.kernels import native, native_encoder, native_linear, native_linear8, native_pages, native_rows
from carpool.kernels.panels import Panels
from carpool.kernels.panels8 import Panels8
from carpool.kernels.twins_cpu import EncoderLayer, Norm

DTYPES = (torch.float32, torch.bfloat16)
BFLOAT16 = 3  # the level that multiplies it
LENGTHS = ([1], [33, 1, 6], [17, 64, 65])


def attend(dtype: torch.dtype) -> None:
    """Packed and in pages, to the last token of each tensor."""
    for lengths, size, (heads, kv_heads) in product(LENGTHS, (16, 48, 256), ((1, 1), (2, 2), (6, 2))):
        row = torch.randn(sum(lengths), heads + 2 * kv_heads, size).to(dtype)
        query, key, value = row.split([heads, kv_heads, kv_heads], dim=1)  # type: ignore[no-untyped-call]
        runs = [(length, 1) for length in lengths]
        bias = torch.randn(heads, 2 * max(lengths) - 1) if heads == kv_heads else None
        for causal, window in ((False, None), (True, None), (False, 5), (True, 40)):
            native.varlen_attention(
                query, key, value, runs, scale=0.1, causal=causal, window=window, softcap=3.0, bias=bias
            )
        pages = torch.arange(len(lengths) * 5, dtype=torch.int32).view(-1, 5)
        pages[:, 0] = 0
        cache = torch.randn(len(lengths) * 5, 13, kv_heads, size).to(dtype)
        bounds = torch.tensor([0, *lengths]).cumsum(0)
        native_pages.paged_attention(
            query.contiguous(), cache, cache, pages, bounds, torch.tensor(lengths), max(lengths), scale=0.1
        )


def write_pages(dtype: torch.dtype) -> None:
    """The last slot among them, and one that is nowhere."""
    for heads, size in ((1, 16), (3, 80)):
        keys = torch.randn(3, 2 * heads, size).to(dtype)[:, :heads]
        caches = [torch.zeros(4, 5, heads, size, dtype=dtype) for _ in range(2)]
        native_pages.kv_write(keys, keys, torch.tensor([19, -1, 0]), *caches)


def multiply(dtype: torch.dtype) -> None:
    for tokens, outputs, inputs in product((1, 7, 130), (16, 80), (2, 38, 1536)):
        x, residual = torch.randn(tokens, inputs).to(dtype), torch.randn(tokens, outputs).to(dtype)
        panels = Panels.of(torch.randn(outputs, inputs).to(dtype), torch.randn(outputs))
        norm = Norm(torch.ones(outputs), torch.zeros(outputs), 1e-6, centred=True)
        native_linear.linear(x, panels)
        native_linear.linear(x, panels, "gelu")
        native_linear.linear_norm(x, panels, residual, norm)


def multiply_integers(dtype: torch.dtype) -> None:
    for tokens, outputs, inputs in product((1, 7, 130), (16, 80), (16, 48, 1536)):
        x, residual = torch.randn(tokens, inputs).to(dtype), torch.randn(tokens, outputs).to(dtype)
        panels = Panels8.of(torch.randn(outputs, inputs), torch.randn(outputs))
        norm = Norm(torch.ones(outputs), torch.zeros(outputs), 1e-6, centred=True)
        native_linear8.linear(x, panels)
        native_linear8.linear(x, panels, "gelu")
        native_linear8.linear_norm(x, panels, residual, norm)


def encode(dtype: torch.dtype, kind: type[Panels] | type[Panels8]) -> None:
    for lengths, width in product(LENGTHS, (16, 48)):
        shapes = ((3 * width, width), (width, width), (96, width), (width, 96))
        joint, out, up, down = (kind.of(torch.randn(shape).to(dtype), None) for shape in shapes)
        norm = Norm(torch.ones(width), torch.zeros(width), 1e-6, centred=True)
        parts: dict[str, Any] = {"joint": joint, "out": out, "up": up, "down": down}
        parts |= {"activation": "gelu", "heads": width // 16, "scale": 0.25}
        layer = EncoderLayer(**parts, attended=norm, done=norm)
        _run([layer] * 3, lengths, dtype)


def encode_with_gates(dtype: torch.dtype, kind: type[Panels] | type[Panels8]) -> None:
    """Layers with all that they may have, and one with nothing; of heads that are not as wide as a row together."""
    for lengths, width, added in product(LENGTHS, (16, 80), (False, True)):
        shapes = ((10 * 48, width), (width, 6 * 48), (2 * 96, width), (width, 96))
        joint, out, up, down = (kind.of(torch.randn(shape).to(dtype), None) for shape in shapes)
        norm, own = (Norm(torch.ones(size), None, 1e-6, centred=False) for size in (width, 48))
        parts: dict[str, Any] = {
            "joint": joint,
            "out": out,
            "up": up,
            "down": down,
            "heads": 6,
            "kv_heads": 2,
        }
        parts |= {"activation": "silu", "gate_first": False, "scale": 0.25, "causal": True, "window": 5}
        plain = EncoderLayer(**parts)
        norms: dict[str, Any] = dict.fromkeys(("before", "attended", "between", "done"), norm)
        full = replace(plain, **norms, query=own, key=own, angles=1, added=added)
        _run([plain, full, replace(full, angles=0)], lengths, dtype)


def _run(layers: list[EncoderLayer], lengths: list[int], dtype: torch.dtype) -> None:
    tokens, runs = sum(lengths), [(length, 1) for length in lengths]
    angles = [(torch.randn(tokens, 32), torch.randn(tokens, 32)) for _ in range(2)]
    encoder, hidden = native_encoder.Encoder(layers, dtype), torch.randn(tokens, layers[0].joint.inputs)
    for wanted in (None, torch.tensor([tokens - 1]), torch.arange(tokens)):
        encoder(hidden.to(dtype), runs, angles if layers[0].kv_heads else (), wanted=wanted)


def work_rows(dtype: torch.dtype) -> None:
    for tokens, width in product((1, 5), (16, 48, 400)):
        x, vector = torch.randn(tokens, width).to(dtype), torch.ones(width)
        native_rows.norm_rows(x, x, vector, vector, 1e-6, centred=True)
        native_rows.gated(torch.cat((x, x), 1), "gelu")
    x = torch.randn(5, 3, 64).to(dtype)
    native_rows.rotary(x, torch.randn(5, 32), torch.randn(5, 32))
    for width in (16, 400):
        bounds, modes = torch.tensor([0, 1, 1, 4, 9]), torch.tensor([2, 2, 0, 1])
        widths, unit = torch.tensor([width, width, 3, width]), torch.tensor([True, True, True, False])
        native_rows.pool_rows(torch.randn(9, width).to(dtype), bounds, modes, widths, unit)


def main(path: str, fault: bool) -> None:
    library = native.library = ctypes.CDLL(path)
    if fault:
        x = torch.randn(1, 4096)
        norm = native_rows.DescribedNorm(x.data_ptr(), None, 1e-6, 1)
        row = ctypes.c_void_p(x.data_ptr())
        library.carpool_norm_rows_f32(ctypes.byref(norm), row, None, ctypes.c_int64(2), 4096, row, None, 1)
        return
    calls = 0
    for level in range(1, native.level + 1):
        native.level = level
        for dtype in DTYPES:
            attend(dtype)
            work_rows(dtype)
            write_pages(dtype)
            calls += 3
            if dtype == torch.float32 or level >= BFLOAT16:
                multiply(dtype)
                encode(dtype, Panels)
                encode_with_gates(dtype, Panels)
                calls += 3
    for dtype in DTYPES if native_linear8.multiplies else ():
        if native_linear8.serves(torch.empty(1, 16, dtype=dtype)):
            multiply_integers(dtype)
            encode(dtype, Panels8)
            encode_with_gates(dtype, Panels8)
            calls += 3
    print(f"{calls} groups of kernels ran clean")


if __name__ == "__main__":
    main(sys.argv[1], "--fault" in sys.argv)
