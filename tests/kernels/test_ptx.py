"""What NVRTC makes of the CUDA kernels, run on a CPU instruction by instruction: the compiler's fused multiply-adds,
conversions, predicates and unrolled loops compute the right thing too. Nothing here has run on a device.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from carpool.kernels import cuda_table, launch
from emu import build, nvrtc
from emu.backend import Emulated
from emu.cases import CASES
from emu.choose import Drawn, Seeded
from emu.ptx import UnknownPTX
from emu.translate import translate

MISSING = build.MISSING or nvrtc.MISSING
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

# The oldest architecture with all types, fast; the commonest of servers, watched, for the commonest type alone.
BF16 = ("__nv_bfloat16",)
RUNS = {
    "compute_75": Emulated(arch=75),
    "compute_90, checked": Emulated(arch=90, check=True, only=lambda each: each.types[:1] in ((), BF16)),
}


@pytest.fixture(scope="module", params=RUNS)
def emulated(request: pytest.FixtureRequest) -> Emulated:
    backend = RUNS[request.param]
    backend.prepare(cuda_table.KERNELS)
    return backend


@pytest.mark.parametrize("case", CASES)
@given(data=st.data())
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
def test_equals_float64(emulated: Emulated, case: str, data: st.DataObject) -> None:
    choose = Drawn(data, (torch.bfloat16,)) if emulated.check else Drawn(data)
    emulated.begin(choose.whole(0, 999), order=choose.whole(0, 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "backend", emulated)
        CASES[case](choose)


def test_every_kernel_runs_in_a_case(emulated: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    """By seeds, and not by what hypothesis happened to draw above."""
    monkeypatch.setattr(launch, "backend", emulated)
    emulated.ran.clear()
    for case in CASES.values():
        for seed in range(6):
            case(Seeded(seed, (torch.bfloat16,)))
    assert emulated.ran == {kernel.name for kernel in cuda_table.KERNELS}


def test_the_two_compilers_agree_on_what_a_kernel_takes() -> None:
    """Signatures read from NVRTC's names are those that the table says."""
    kernels = [kernel.instances[-1] for kernel in cuda_table.KERNELS]
    _, names = nvrtc.ptx(cuda_table.source(), [each.expression for each in kernels], 90)
    for each in kernels:
        said = "".join(
            f"{'C' if p.const else 'P' if p.pointer else 'F' if p.element == 'float' else 'I'}"
            f"{p.element_size if p.pointer else p.size:02d}"
            for p in each.parameters
        )
        assert nvrtc.signature(names[each.expression]) == said, each.expression


@pytest.mark.parametrize(
    "statement",
    ["mma.sync.aligned.m16n8k8.row.col.f32.f32.f32.f32 %r1, %r2, %r3, %r4;", "add.f64 %r1, %r2, %r3;",
     "ld.volatile.global.u32 %r1, [%rd1];", "shl.b32 %r1, %clock, 3;"],
)  # fmt: skip
def test_unknown_instructions_are_errors(statement: str) -> None:
    registers = "\t.reg .b32 %r<9>;\n\t.reg .b64 %rd<9>;\n"
    text = f".visible .entry k(\n\t.param .u64 k_param_0\n)\n{{\n{registers}{statement}\n\tret;\n\n}}\n"
    with pytest.raises(UnknownPTX):
        translate(text)
    assert "r_r1" in translate(text.replace(statement, "add.s32 %r1, %r2, %r3;"))[0]
