"""Each kernel that needs memory, where there is none and then with some: python -m emu.no_memory LIBRARY

The library is no_memory.cpp's, loaded before all else.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import product
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from carpool.kernels import crew, native, native_encoder, native_linear, native_linear8
from carpool.kernels.panels import Panels
from carpool.kernels.panels8 import Panels8
from carpool.kernels.twins_cpu import EncoderLayer, Norm

CORES, TOKENS, WIDTH, HEADS = 3, 600, 64, 4
NORM = Norm(torch.ones(WIDTH), torch.zeros(WIDTH), 1e-6, centred=True)


def kernels(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    row = torch.randn(TOKENS, 3 * HEADS, WIDTH).to(dtype)
    query, key, value = row.split([HEADS] * 3, dim=1)  # type: ignore[no-untyped-call]
    yield "attention", lambda: native.varlen_attention(query, key, value, [(TOKENS, 1)], scale=0.1)
    kinds: tuple[type[Panels] | type[Panels8], ...] = (Panels, Panels8)[: 1 + native_linear8.multiplies]
    for kind in kinds if native_linear.serves(row[:, 0]) else ():
        x = torch.randn(TOKENS, WIDTH).to(dtype)
        shapes = ((3 * WIDTH, WIDTH), (WIDTH, WIDTH), (96, WIDTH), (WIDTH, 96))
        joint, out, up, down = (kind.of(torch.randn(shape).to(dtype) / 8, None) for shape in shapes)
        multiply = native_linear.linear_norm if kind is Panels else native_linear8.linear_norm
        yield f"linear, {kind.__name__}", partial(multiply, x, out, x, NORM)  # type: ignore[arg-type]
        parts: dict[str, Any] = {"joint": joint, "out": out, "up": up, "down": down}
        parts |= {"attended": NORM, "done": NORM, "activation": "gelu"}
        layer = EncoderLayer(**parts, heads=HEADS, scale=0.25)
        encoder = native_encoder.Encoder([layer], dtype)
        yield f"encoder, {kind.__name__}", partial(encoder, x, [(TOKENS, 1)])


def without(library: ctypes.CDLL, call: Callable[[], Tensor]) -> str:
    """What it says of it."""
    library.no_memory(1)
    try:
        call()
    except MemoryError:
        return "lacked memory and said so"
    finally:
        library.no_memory(0)
    return "did without memory"


def tried(library: ctypes.CDLL, name: str, call: Callable[[], Tensor], whole: Tensor, helped: bool) -> None:
    """With helpers as a part of a batch, else by this thread alone."""
    with crew.leading() if helped else nullcontext():
        said = without(library, call)
        again = call()
    if not torch.equal(again, whole):
        said = "computed something else afterwards"
    print(f"{name}, {'with helpers' if helped else 'alone'}: {said}")


def main(path: str) -> None:
    library = ctypes.CDLL(path)
    crew.hire(CORES)
    for dtype, helped in product((torch.float32, torch.bfloat16), (False, True)):
        for name, call in kernels(dtype):
            # What a thread was given it keeps: a new one has nothing.
            thread = Thread(target=tried, args=(library, f"{dtype} {name}", call, call(), helped))
            thread.start()
            thread.join()


if __name__ == "__main__":
    main(sys.argv[1])
