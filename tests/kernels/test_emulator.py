"""The emulator by itself: 16-bit floats to the bit, and what it says of kernels that are wrong in one way each."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from emu import build
from emu.module import Argument, Fresh, KernelError, Module

pytestmark = pytest.mark.skipif(build.MISSING is not None, reason=str(build.MISSING))

SOURCE = """
#include <cuda_fp16.h>
#include <cuda_bf16.h>
__global__ void widen(const __half* h, const __nv_bfloat16* b, float* of_h, float* of_b, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) of_h[i] = __half2float(h[i]), of_b[i] = __bfloat162float(b[i]);
}
__global__ void narrow(const float* x, __half* h, __nv_bfloat16* b, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) h[i] = __float2half_rn(x[i]), b[i] = __float2bfloat16_rn(x[i]);
}
__global__ void neighbour(const float* x, float* out, int barrier) {
  extern __shared__ float kept[];
  kept[threadIdx.x] = x[threadIdx.x];
  if (barrier) __syncwarp();
  out[threadIdx.x] = kept[threadIdx.x ^ 1];
}
__global__ void vectors(const float4* x, float4* out) { out[threadIdx.x] = x[threadIdx.x]; }
__global__ void count(int* out, int atomic) {
  if (atomic) atomicAdd(out, 1);
  else out[0] = out[0] + 1;
}
__global__ void scale(const float* x, float* out, float factor, long long n) {
  if (threadIdx.x < n) out[threadIdx.x] = factor * x[threadIdx.x];
}
""".replace(
    "extern __shared__ float kept[];",
    "extern __shared__ unsigned char bytes[];\n  float* kept = (float*)bytes;",
)
NAMES = ("widen", "narrow", "neighbour", "vectors", "count", "scale")


@pytest.fixture(scope="module", params=[False, True], ids=["fast", "check"])
def module(request: pytest.FixtureRequest) -> Module:
    return Module.compile(SOURCE, {f"k_{name}": name for name in NAMES}, check=request.param)


@pytest.fixture(scope="module")
def checked() -> Module:
    return Module.compile(SOURCE, {f"k_{name}": name for name in NAMES}, check=True)


def test_all_16_bit_floats_widen_exactly(module: Module) -> None:
    every = torch.arange(1 << 16).to(torch.uint16)
    half, bfloat = every.view(torch.float16), every.view(torch.bfloat16)
    wide = [torch.empty(1 << 16) for _ in range(2)]
    module.launch("k_widen", (256,), (256,), (half, bfloat, *map(Fresh, wide), np.int32(1 << 16)))

    for got, exact in zip(wide, (half.float(), bfloat.float()), strict=True):
        assert torch.equal(got.nan_to_num(7), exact.nan_to_num(7))
        assert torch.equal(got.isnan(), exact.isnan())


def test_floats_narrow_to_the_nearest(module: Module) -> None:
    """Patterns at random, and every tie between two neighbouring bfloat16s."""
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(-(1 << 31), 1 << 31, (40000,), generator=generator).int()
    ties = (torch.arange(1 << 16) * (1 << 16) + (1 << 15)).to(torch.int64)
    x = torch.cat([random, torch.where(ties >= 1 << 31, ties - (1 << 32), ties).int()]).view(torch.float32)
    # Those below the smallest normal number are zero on both sides of a kernel.
    x = x[(x.abs() >= 2.0**-126) | (x == 0) | x.isnan()].contiguous()
    half, bfloat = torch.empty(len(x), dtype=torch.float16), torch.empty(len(x), dtype=torch.bfloat16)
    blocks = -(-len(x) // 256)
    module.launch("k_narrow", (blocks,), (256,), (x, Fresh(half), Fresh(bfloat), np.int32(len(x))))

    for got, exact in ((half, x.half()), (bfloat, x.bfloat16())):
        assert torch.equal(got.float().nan_to_num(7), exact.float().nan_to_num(7))
        assert torch.equal(got.isnan(), exact.isnan())


def _neighbour(module: Module, threads: int, barrier: int, shared: int) -> None:
    x, out = torch.arange(threads).float(), torch.empty(threads)
    module.launch("k_neighbour", (1,), (threads,), (x, Fresh(out), np.int32(barrier)), shared=shared)
    assert torch.equal(out, x.view(-1, 2).flip(1).flatten())


def test_lanes_that_share_memory(module: Module) -> None:
    _neighbour(module, 64, 1, 256)


def test_lanes_that_share_memory_without_a_barrier(checked: Module) -> None:
    with pytest.raises(KernelError, match=r"race on shared memory|uninitialised.*kernels\.cu:\d+"):
        _neighbour(checked, 64, 0, 256)


def test_too_little_shared_memory_asked_for(checked: Module) -> None:
    with pytest.raises(KernelError, match=r"byte 252 of 252 bytes of dynamic shared memory"):
        _neighbour(checked, 64, 1, 252)


@pytest.mark.parametrize("shift", [0, 16, 4, 8])
def test_vectors_at_odd_addresses(checked: Module, shift: int) -> None:
    """Where g++ reads a vector as one. Where it reads its parts, only the compiler's PTX shows the fault."""
    arguments: list[Argument] = [torch.arange(32.0), Fresh(torch.empty(32))]
    if shift % 16 == 0:
        checked.launch("k_vectors", (1,), (8,), arguments, shift=shift)
    else:
        with pytest.raises(KernelError, match=rf"misaligned (read|write) of 16 bytes .* {shift} past"):
            checked.launch("k_vectors", (1,), (8,), arguments, shift=shift)


def test_atomics_may_meet_and_nothing_else(checked: Module) -> None:
    total = torch.zeros(1, dtype=torch.int32)
    checked.launch("k_count", (3,), (64,), (total, np.int32(1)))
    assert total.item() == 192
    with pytest.raises(KernelError, match="race on global memory"):
        checked.launch("k_count", (3,), (64,), (total, np.int32(0)))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((np.float64(2.0), np.int64(8)), "argument 2 is float64"),
        ((np.float32(2.0), np.int32(8)), "argument 3 is int32"),
        ((np.int32(2), np.int64(8)), "argument 2 is int32"),
        ((np.float32(2.0),), "takes 4 arguments, not 3"),
    ],
)
def test_arguments_of_another_width(module: Module, arguments: tuple[np.generic, ...], said: str) -> None:
    x, out = torch.arange(8.0), torch.empty(8)
    with pytest.raises(KernelError, match=said):
        module.launch("k_scale", (1,), (32,), (x, Fresh(out), *arguments))
    with pytest.raises(KernelError, match="takes 4 bytes an element"):
        module.launch("k_scale", (1,), (32,), (x.double(), Fresh(out), np.float32(2), np.int64(8)))
    module.launch("k_scale", (1,), (32,), (x, Fresh(out), np.float32(2), np.int64(8)))
    assert torch.equal(out, 2 * x)


@pytest.mark.parametrize(("grid", "block"), [((1,), (1025,)), ((1,), (0,)), ((1, 70000), (1,)), ((0,), (1,))])
def test_sizes_that_no_device_takes(module: Module, grid: tuple[int, ...], block: tuple[int, ...]) -> None:
    x, out = torch.arange(8.0), torch.empty(8)
    with pytest.raises(KernelError, match=r"a block of|a grid of"):
        module.launch("k_scale", grid, block, (x, out, np.float32(2), np.int64(8)))
