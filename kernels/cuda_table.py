"""The CUDA kernels as a table: what they are called, for which types they are compiled, what they take. Pure.

The launcher, the tests that compile them and the tests that run them without a device all read this one table; a test
compares it with the sources in kernels/cuda/.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

FOLDER = Path(__file__).with_name("cuda")
PRELUDE = "element.cuh"  # what all of the sources use; it comes first
CHUNK = 64  # tokens that one block sums where a long sequence is pooled in two passes; pool.cu has the same
MOST_LANES = 32  # token lanes of a block that sums rows; pool.cu has the same
# Heads are padded to one of these many columns → queries that a block of attention has; attention.cu has the same.
ATTENTION: Mapping[int, int] = {64: 64, 128: 64, 256: 32}

FLOATS = ("float", "__half", "__nv_bfloat16")  # elements of inputs
OUTPUTS = (*FLOATS, "signed char", "unsigned char")  # int8 with a scale a row; one bit a component
BYTES: Mapping[str, int] = {
    "bool": 1,
    "signed char": 1,
    "unsigned char": 1,
    "__half": 2,
    "__nv_bfloat16": 2,
    "int": 4,
    "float": 4,
    "i64": 8,
    "uint4": 16,
}
_PARAMETER = re.compile(r"(?P<const>const )?(?P<element>[\w ]+?)(?P<pointer>\*)? (?P<name>\w+)")


@dataclass(frozen=True, slots=True)
class Parameter:
    """One of a kernel. `element` is a type of C, what is pointed to if it is a pointer."""

    name: str
    element: str
    pointer: bool
    const: bool

    @classmethod
    def parse(cls, text: str, types: Mapping[str, str]) -> Parameter:
        """From C, as in "const T* hidden"; `types` are what the template's letters stand for."""
        found = _PARAMETER.fullmatch(text)
        if found is None:
            raise ValueError(f"{text!r} is no parameter of a kernel")
        element = types.get(found["element"], found["element"])
        return cls(found["name"], element, bool(found["pointer"]), bool(found["const"]))

    @property
    def element_size(self) -> int:
        """Bytes of an element, which a pointer to it must be aligned to."""
        return BYTES[self.element]

    @property
    def size(self) -> int:
        """Bytes of the argument itself."""
        return 8 if self.pointer else BYTES[self.element]


@dataclass(frozen=True, slots=True)
class Instance:
    """A kernel compiled for certain types: `expression` is its name in C++."""

    kernel: Kernel
    types: tuple[str, ...]

    @property
    def expression(self) -> str:
        return f"{self.kernel.name}<{', '.join(self.types)}>" if self.types else self.kernel.name

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return _parameters(self)


@cache  # every launch asks
def _parameters(instance: Instance) -> tuple[Parameter, ...]:
    letters = dict(zip(instance.kernel.letters, instance.types, strict=True))
    return tuple(Parameter.parse(text, letters) for text in instance.kernel.takes.split(", "))


@dataclass(frozen=True, slots=True, eq=False)  # the table's rows are themselves: hashing one is cheap
class Kernel:
    """A row of the table.

    `letters` are the template's type parameters, `types` all that each may stand for; `takes` are the parameters in C
    without `__restrict__`. `threads` is the block's size; `registers` a thread may use, on every architecture;
    `shared` bytes are in static arrays.
    """

    name: str
    file: str
    takes: str
    threads: int
    registers: int
    letters: tuple[str, ...] = ()
    types: tuple[tuple[str, ...], ...] = ((),)
    shared: int = 0

    @property
    def instances(self) -> tuple[Instance, ...]:
        return tuple(Instance(self, types) for types in self.types)


def _each(*choices: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    return tuple(product(*choices))


KERNELS: tuple[Kernel, ...] = (
    Kernel(
        "pool_split", "pool.cu",
        "const T* hidden, const int* bounds, const signed char* modes, const int* widths, float* partial, "
        "int n, int columns",
        threads=256, registers=64, letters=("T",), types=_each(FLOATS),
    ),
    Kernel(
        "pool_rows", "pool.cu",
        "const T* hidden, const int* bounds, const signed char* modes, const int* widths, "
        "const bool* unit, const float* partial, TO* out, float* scales, int columns, float eps",
        threads=256, registers=64, letters=("T", "TO"), types=_each(FLOATS, OUTPUTS), shared=132,
    ),
    Kernel(
        "gather_rows", "gather.cu",
        "const T* hidden, const int* rows, const int* widths, const bool* unit, TO* out, float* scales, "
        "int count, int columns, float eps",
        threads=128, registers=56, letters=("T", "TO"), types=_each(FLOATS, OUTPUTS),
    ),
    Kernel(
        "step_count", "gather.cu",
        "const i64* ids, const int* bounds, int* counts, int n, i64 tag",
        threads=128, registers=40,
    ),
    Kernel(
        "step_fill", "gather.cu",
        "const i64* ids, const int* bounds, const int* starts, int* rows, int n, i64 tag",
        threads=128, registers=40,
    ),
    Kernel(
        "activate_rows", "heads.cu",
        "const T* logits, const signed char* kinds, float* out, int rows, int columns, float mean, "
        "float sigma",
        threads=128, registers=40, letters=("T",), types=_each(FLOATS),
    ),
    Kernel(
        "sparse_rows", "heads.cu",
        "const T* logits, const int* bounds, float* out, int columns, int sums, int twice",
        threads=128, registers=48, letters=("T",), types=_each(FLOATS),
    ),
    Kernel(
        "cosine_pairs", "pairs.cu",
        "const T* a, const T* b, const int* in_a, const int* in_b, float* out, int pairs, int columns, "
        "float eps",
        threads=128, registers=48, letters=("T",), types=_each(FLOATS),
    ),
    Kernel(
        "maxsim", "pairs.cu",
        "const T* queries, const int* query_bounds, const T* documents, const int* document_bounds, "
        "const int* in_queries, const int* in_documents, float* out, int columns",
        threads=256, registers=80, letters=("T",), types=_each(FLOATS), shared=12676,
    ),
    Kernel(
        "norm_rows", "layers.cu",
        "const T* x, const T* residual, const float* weight, const float* bias, T* out, T* sum, "
        "int columns, int centred, float eps",
        threads=256, registers=48, letters=("T",), types=_each(FLOATS), shared=132,
    ),
    Kernel(
        "rotary", "layers.cu",
        "const T* x, const TC* cosines, const TC* sines, T* out, i64 tokens, int heads, int size, "
        "int turned, i64 stride",
        threads=256, registers=48, letters=("T", "TC"),
        types=(*_each(FLOATS, ("float",)), ("__half", "__half"), ("__nv_bfloat16", "__nv_bfloat16")),
    ),
    Kernel(
        "gated", "layers.cu",
        "const T* both, T* out, i64 rows, int columns, int activation, int gate_first",
        threads=256, registers=48, letters=("T",), types=_each(FLOATS),
    ),
    Kernel(
        "kv_write", "paged.cu",
        "const uint4* keys, const uint4* values, const i64* slots, uint4* key_cache, uint4* value_cache, "
        "i64 tokens, i64 capacity, int units",
        threads=256, registers=40,
    ),
    Kernel(
        "kv_gather", "paged.cu",
        "const uint4* key_cache, const uint4* value_cache, const int* pages, const int* bounds, "
        "uint4* keys, uint4* values, i64 tokens, int n, int most, int page_size, int units",
        threads=256, registers=48,
    ),
    Kernel(
        "attention", "attention.cu",
        "const T* query, const T* key, const T* value, T* out, const int* bounds, const int* key_lengths, "
        "const int* pages, const int* seen, const float* bias, const float* sinks, int n, int group, "
        "int size, int most, int page_size, int reach, int query_stride, int query_head, int key_stride, "
        "int key_head, int value_stride, int value_head, int left, int right, float scale, float softcap",
        threads=256, registers=128, letters=("T", "W"),
        types=_each(FLOATS, tuple(map(str, ATTENTION))), shared=29696,
    ),
)  # fmt: skip
BY_NAME: Mapping[str, Kernel] = {kernel.name: kernel for kernel in KERNELS}


def instance(name: str, *types: str) -> Instance:
    """The row `name` for these types; KeyError where the table has none such."""
    kernel = BY_NAME[name]
    if types not in kernel.types:
        raise KeyError(f"{name} is not compiled for {', '.join(types) or 'no types'}")
    return Instance(kernel, types)


def instances() -> Iterator[Instance]:
    """All of them, in the table's order."""
    for kernel in KERNELS:
        yield from kernel.instances


@cache
def source() -> str:
    """All sources as one text: CuPy's cache of compiled kernels knows the text it was given, and no file included."""
    files = [PRELUDE, *dict.fromkeys(kernel.file for kernel in KERNELS)]
    return "".join(f'#line 1 "{name}"\n{(FOLDER / name).read_text(encoding="utf-8")}\n' for name in files)


def pooling_shared(columns: int, vector: int, threads: int) -> int:
    """Bytes of dynamic shared memory that `pool_rows` and `pool_split` may use for rows of up to `columns`.

    `vector`: elements in 16 bytes. Staged rows are `vector` lines, whose pitch in words is the number of vectors up to
    an odd multiple of 32 / vector: less than 64 / vector more. There are as many as token lanes, threads over vectors.
    """
    more = 64 // vector
    one = -(-columns // vector) + more
    several = threads + MOST_LANES * more
    return 4 * vector * max(one, several)
