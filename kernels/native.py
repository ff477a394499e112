"""The native CPU kernels (kernels/cpu/) and attention's Python face: check shapes, pass pointers. ctypes frees the GIL.

`library` is None where they were not built, or of other sources than lie here, or this CPU has no instructions for
them; then the torch twins serve.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from functools import lru_cache
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LEVELS = ("none", "AVX2", "AVX-512", "AVX-512 BF16", "AMX BF16")  # what `carpool_cpu_level` counts
AVX512, AMX = 2, 4
_FAR = 1 << 30  # tokens: no text is as long, and a place in one plus this is still an int
ACTIVATIONS = {None: 0, "gelu": 1, "gelu_tanh": 2, "silu": 3}  # as kernels/cpu/vector.h has them


class Bias(ctypes.Structure):
    """As kernels/cpu/attention.h has it."""

    _fields_ = (("table", ctypes.c_void_p), ("stride", ctypes.c_int64), ("middle", ctypes.c_int64))


class Shape(ctypes.Structure):
    """As kernels/cpu/attention.h has it."""

    _fields_ = (
        ("heads", ctypes.c_int),
        ("kv_heads", ctypes.c_int),
        ("head_size", ctypes.c_int),
        ("q_stride", ctypes.c_int64),
        ("k_stride", ctypes.c_int64),
        ("v_stride", ctypes.c_int64),
        ("o_stride", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("causal", ctypes.c_int),
        ("window", ctypes.c_int),
        ("bias", Bias),
    )


class Batch(ctypes.Structure):
    """As kernels/cpu/attention.h has it."""

    _fields_ = (
        ("cu_seqlens", ctypes.c_void_p),
        ("pages", ctypes.c_void_p),
        ("key_lengths", ctypes.c_void_p),
        ("sequences", ctypes.c_int),
        ("most_pages", ctypes.c_int),
        ("page_size", ctypes.c_int),
    )


def load(folder: Path) -> ctypes.CDLL | None:
    """The library that lies in `folder`, beside the `cpu` that its sources are in."""
    try:
        found = ctypes.CDLL(str(folder / "_native.so"))
        made_of = found.carpool_cpu_sources
    except (OSError, AttributeError):  # not there, made for another machine, or older than what it is asked
        return None
    made_of.restype = ctypes.c_char_p
    # One that was left from before an upgrade may read other structures than it is given.
    current = made_of().decode() == _digest(folder / "cpu")
    return found if current and found.carpool_cpu_level() else None


def _digest(sources: Path) -> str:
    """Of all that the library is made of: as setup.py tells the compiler."""
    return sha256(b"".join(path.read_bytes() for path in sorted(sources.glob("*.[ch]*")))).hexdigest()


library = load(Path(__file__).parent)
level = library.carpool_cpu_level() if library else 0


def pointer(x: Tensor | None) -> ctypes.c_void_p:
    """To the first element; null for none. The tensor has to outlive the call."""
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def reach(window: int | None) -> int:
    """A window as Shape has it."""
    if window is not None and window < 1:
        raise ValueError(f"a window must be at least 1, got {window}")
    return min(window or 0, _FAR)


def check(lacks_memory: int) -> None:
    """What a kernel that needs memory of its own has returned."""
    if lacks_memory:
        raise MemoryError("there is no memory for what a native kernel lays out")


def serves(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `varlen_attention` can take these: [T, N, D] on a CPU, heads contiguous, D a multiple of 16 up to 256."""
    size, heads, kv_heads = query.shape[2], query.shape[1], key.shape[1]
    return (
        library is not None
        and query.is_cpu
        and query.dtype in (torch.float32, torch.bfloat16)
        and key.dtype == value.dtype == query.dtype
        and key.shape[1:] == value.shape[1:] == (kv_heads, size)
        and kv_heads > 0
        and heads % kv_heads == 0
        and size % 16 == 0
        and 16 <= size <= 256
        and query.stride()[1:] == key.stride()[1:] == value.stride()[1:] == (size, 1)
    )


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    runs: Sequence[tuple[int, int]],
    *,
    scale: float,
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """As `kernels.reference.varlen_attention`, for what `serves`; with a bias each head has keys of its own.

    In bfloat16 the softmax's weights are rounded too.
    """
    cu_seqlens = cu_seqlens_of(tuple(runs))
    if not cu_seqlens[-1] == len(query) == len(key) == len(value):
        raise ValueError(
            f"{len(query)} queries, {len(key)} keys and {len(value)} values of {cu_seqlens[-1]} tokens"
        )
    batch = Batch(ctypes.addressof(cu_seqlens), None, None, len(cu_seqlens) - 1)
    own = None if bias is None else bias.float().contiguous()
    if own is not None:
        check_bias(own, query.shape[1], key.shape[1], runs)
    kind: dict[str, Any] = {"scale": scale, "causal": causal, "window": window, "softcap": softcap}
    return attend(query, key, value, batch, **kind, bias=own)


def check_bias(bias: Tensor, heads: int, kv_heads: int, runs: Sequence[tuple[int, int]]) -> None:
    """Raises ValueError unless this is [N, 2M - 1] for so many heads and these runs."""
    longest = max((length for length, _ in runs), default=0)
    shaped = bias.is_cpu and bias.ndim == 2 and len(bias) == heads == kv_heads
    if not shaped or bias.shape[1] % 2 == 0 or bias.shape[1] < 2 * longest - 1:
        raise ValueError(
            f"a bias {list(bias.shape)} for {heads} heads, {kv_heads} of keys, and {longest} tokens"
        )


def described_bias(bias: Tensor) -> Bias:
    """float32 [N, 2M - 1], contiguous; it has to outlive the call."""
    return Bias(bias.data_ptr(), bias.shape[1], bias.shape[1] // 2)


@lru_cache(maxsize=64)  # every layer of a batch asks for the same
def cu_seqlens_of(runs: tuple[tuple[int, int], ...]) -> ctypes.Array[ctypes.c_int32]:
    """int32 [B+1]: the cumulative lengths of runs of (length, count)."""
    lengths = list(chain.from_iterable([length] * count for length, count in runs))
    bounds = [0, *lengths]
    for i in range(1, len(bounds)):
        bounds[i] += bounds[i - 1]
    return (ctypes.c_int32 * len(bounds))(*bounds)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    batch: Batch,
    *,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
    bias: Tensor | None = None,
    by: int | None = None,
) -> Tensor:
    """query [T, N, D], rows of keys and values [., N_kv, D], bias as `described_bias` has it → [T, N, D].

    By the kernel of another level, if named.
    """
    assert library is not None
    out = torch.empty(query.shape, dtype=query.dtype)
    shape = Shape(
        query.shape[1],
        key.shape[1],
        query.shape[2],
        *(x.stride(0) for x in (query, key, value, out)),
        scale,
        softcap or 0.0,
        causal,
        reach(window),
        Bias() if bias is None else described_bias(bias),
    )
    is_float = query.dtype == torch.float32
    kernel = library.carpool_attention_f32 if is_float else library.carpool_attention_bf16
    check(
        kernel(
            *map(pointer, (query, key, value, out)),
            ctypes.byref(batch),
            ctypes.byref(shape),
            level if by is None else by,
        )
    )
    return out


# ── AMX, tried first ─────────────────────────────────────────────────────────────────────────────────────────


def tried(found: int) -> int:
    """The level, or the one below AMX where attention or 8-bit products do not come out there as they do on AVX-512.

    Its kernels were proven on tiles in software. Surgery compares each layer in bfloat16 with torch's; this is for the
    rest.
    """
    return found if found < AMX or (_attends_alike() and _multiplies_bytes_alike()) else AMX - 1


def _attends_alike() -> bool:
    # Heads and sequences that end within a tile, and more than one block of keys.
    lengths, heads, size = (17, 300), 2, 48
    row = torch.randn(sum(lengths), 4 * heads, size, generator=torch.Generator().manual_seed(0)).bfloat16()
    query, key, value = row.tensor_split((2 * heads, 3 * heads), dim=1)
    bounds = cu_seqlens_of(tuple((length, 1) for length in lengths))
    batch = Batch(ctypes.addressof(bounds), None, None, len(lengths))
    for causal in (False, True):
        how = {"scale": size**-0.5, "causal": causal, "window": None, "softcap": None}
        mine, other = (attend(query, key, value, batch, **how, by=by).float() for by in (AMX, AMX - 1))
        if not torch.allclose(mine, other, rtol=2**-6, atol=2**-6):
            return False
    return True


def _multiplies_bytes_alike() -> bool:
    """To the bit, since integers are exact and what follows them is the same."""
    assert library is not None
    if not library.carpool_cpu_multiplies_int8():
        return True
    # Tokens, inputs and outputs that end within a tile; weights, steps, sums and biases as native_linear8 passes them.
    tokens, inputs, outputs, panel = 37, 80, 48, 64
    some = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (inputs, panel), generator=some, dtype=torch.int8)
    step, total, bias = torch.rand(3, panel, generator=some)
    x, out = torch.randn(tokens, inputs, generator=some), torch.empty(2, tokens, outputs)
    layer = struct.pack("@4P2i", *(part.data_ptr() for part in (weight, step, total, bias)), inputs, outputs)
    for i, by in enumerate((AMX, AMX - 1)):
        rows = pointer(x), ctypes.c_int64(inputs), tokens, pointer(out[i]), ctypes.c_int64(outputs)
        check(library.carpool_linear_int8_f32(layer, 0, None, *rows, by))
    return torch.equal(out[0], out[1])


def _setback(found: int) -> str | None:
    """Why the best that this CPU has is not used, in words; None where it is."""
    if level < found:
        return f"{LEVELS[found]} computes something else on this CPU than {LEVELS[level]}, which serves in its place."
    if library is not None and library.carpool_has_amx() < 0:
        return (
            f"Linux does not lend this process the AMX that its CPU has: {LEVELS[level]} serves, slower. "
            "It does from version 5.16 on, unless a sandbox (seccomp, gVisor) refuses arch_prctl."
        )
    return None


_found = level
level = tried(_found)
setback = _setback(_found)
