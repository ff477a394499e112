"""All that needs a CUDA device, in one go: the tests marked `gpu`, then how fast the kernels and the engine are.

    ./dev bench gpu                       tests and timings, as Markdown
    ./dev bench gpu --no-tests            timings only
    ./dev bench gpu --device cpu          a rehearsal without a device: torch's twins beside themselves

The exit status is 1 if a test failed. Kernels are timed beside their twin in torch on the same device, in turns; what
is printed is the least, median and most of the rounds, in microseconds.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

# ./dev sets PYTHONSAFEPATH, which leaves a script's own folder out.
sys.path.extend(str(Path(__file__).resolve().parent.parent / room) for room in ("benchmarks", "loadtest"))

import torch
from torch import Tensor

from carpool.engine.hub import locate
from carpool.engine.llm import LLM
from carpool.kernels import launch, ops, reference
from report import ROOT, Spread, circumstances, facts, table
from workload import Workload, natural

TOKENS, LENGTH, COLUMNS = 16_384, 128, 1_024  # of the rows that kernels are timed on, bfloat16
HEADS, HEAD_SIZE = 16, 64
ROUNDS = 30
Work = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Contest:
    """One operation of `kernels.ops` and its twin in torch: arguments, and how many bytes must at least be moved."""

    name: str
    operation: str
    arguments: tuple[Any, ...]
    bytes: int
    options: Mapping[str, Any] = field(default_factory=dict)

    def ours(self) -> Any:
        return getattr(ops, self.operation)(*self.arguments, **self.options)

    def twin(self) -> Any:
        return getattr(reference, self.operation)(*self.arguments, **self.options)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 or, to rehearse, cpu")
    parser.add_argument("--no-tests", dest="tests", action="store_false")
    parser.add_argument("--texts", type=int, default=4096, help="for the engine; default 4096")
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"for the kernels; default {TOKENS}")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("torch finds no CUDA device here; --device cpu rehearses without one.")
    print(facts({**circumstances(), **_device(device)}), end="\n\n")
    failed = _tests() if args.tests else 0
    print(table(("kernel", "µs", "in torch, µs", "times as fast", "GB/s"), _kernels(device, args.tokens)))
    print()
    print(table(("engine, MiniLM", "tokens/s", "attention"), _engine(args.device, args.texts)))
    sys.exit(failed)


def _device(device: torch.device) -> dict[str, str]:
    """What there is, and whether our kernels can run on it."""
    if device.type != "cuda":
        return {"device": "none: a rehearsal on the CPU"}
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": f"{properties.name}, sm_{properties.major}{properties.minor}, "
        f"{properties.total_memory / 2**30:.0f} GiB, {properties.multi_processor_count} multiprocessors",
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda}",
        "CuPy": launch.fault() or _cupy_versions(),
    }


def _cupy_versions() -> str:
    import cupy

    compiler = ".".join(map(str, cupy.cuda.nvrtc.getVersion()))
    return f"{cupy.__version__}, NVRTC {compiler}, driver for CUDA {cupy.cuda.runtime.driverGetVersion() / 1000:g}"


def _tests() -> int:
    """Runs what is marked `gpu`; the status that pytest exits with, and 1 if nothing was there to run."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tests.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", f"--junitxml={path}", "tests"]
        status = subprocess.run(command, cwd=ROOT, stdout=sys.stderr, check=False).returncode
        cases = list(ElementTree.parse(path).iter("testcase"))
    outcomes = [(case, next(iter(case), None)) for case in cases]
    passed = sum(outcome is None for _, outcome in outcomes)
    print(f"Tests: {passed} of {len(cases)} passed.\n")
    told = [
        (f"{case.get('classname')}::{case.get('name')}", outcome.tag, (outcome.get("message") or "")[:150])
        for case, outcome in outcomes
        if outcome is not None
    ]
    if told:
        print(table(("test", "outcome", "why"), told), end="\n\n")
    return 1 if status or not passed else 0


# ── kernels ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _kernels(device: torch.device, tokens: int) -> Iterator[tuple[str, ...]]:
    for contest in _contests(device, tokens):
        ours, twin = _in_turns(device, contest.ours, contest.twin)
        rate = contest.bytes / ours.median / 1e3
        yield (
            contest.name,
            ours.text(1),
            twin.text(1),
            f"{twin.median / ours.median:.2f}",
            f"{rate:,.0f}" if contest.bytes else "",
        )


def _contests(device: torch.device, tokens: int) -> Iterator[Contest]:
    generator = torch.Generator(device).manual_seed(1)

    def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    def int32(values: Any) -> Tensor:
        return torch.as_tensor(values, dtype=torch.int32, device=device)

    count = tokens // LENGTH
    hidden = normal(tokens, COLUMNS)
    bounds = int32(range(0, tokens + 1, LENGTH))
    unit = torch.ones(tokens, dtype=torch.bool, device=device)
    widths = int32([COLUMNS] * tokens)
    for name, mode, read in (("mean", reference.MEAN, tokens), ("last", reference.LAST, count)):
        modes = torch.full((count,), mode, dtype=torch.int8, device=device)
        plan = hidden, bounds, modes, widths[:count], unit[:count], "float32", LENGTH
        yield Contest(f"pool_rows, {name}", "pool_rows", plan, 2 * COLUMNS * read + 4 * COLUMNS * count)
    each = hidden, None, widths, unit, "float16"
    yield Contest("gather_rows, all", "gather_rows", each, 4 * COLUMNS * tokens)
    weight, bias, residual = normal(COLUMNS).float(), normal(COLUMNS).float(), normal(tokens, COLUMNS)
    norm = hidden, residual, weight, bias, 1e-5
    yield Contest(
        "norm_rows, residual and LayerNorm", "norm_rows", norm, 8 * COLUMNS * tokens, {"centred": True}
    )
    heads = normal(tokens, HEADS, HEAD_SIZE)
    cos, sin = normal(tokens, HEAD_SIZE), normal(tokens, HEAD_SIZE)
    yield Contest("rotary", "rotary", (heads, cos, sin), 4 * heads.numel() + 4 * cos.numel())
    both = normal(tokens, 2 * COLUMNS)
    yield Contest("gated, SiLU", "gated", (both, "silu"), 6 * COLUMNS * tokens)
    late = (
        normal(LENGTH, 128),
        int32([0, LENGTH]),
        normal(tokens, 128),
        bounds,
        int32([0] * count),
        int32(range(count)),
    )
    yield Contest("maxsim", "maxsim", late, 2 * 128 * tokens)


def _in_turns(device: torch.device, *works: Work) -> list[Spread]:
    """Microseconds of each, one after the other in every round, warm."""
    seconds: list[list[float]] = [[] for _ in works]
    for work in works:
        work()
    for _ in range(ROUNDS):
        for work, mine in zip(works, seconds, strict=True):
            mine.append(_timed(device, work))
    return [Spread.of(second * 1e6 for second in mine) for mine in seconds]


def _timed(device: torch.device, work: Work) -> float:
    """Seconds, on the device's own clock where it has one."""
    if device.type != "cuda":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


# ── the engine ───────────────────────────────────────────────────────────────────────────────────────────────────


def _engine(device: str, count: int) -> Iterator[tuple[str, ...]]:
    workload = natural("mixed", count, locate(""), 256)
    for dtype in ("float32", "float16", "bfloat16"):
        yield _rate(workload, device, dtype)


def _rate(workload: Workload, device: str, dtype: str) -> tuple[str, ...]:
    with closing(LLM(device=device, dtype=dtype)) as llm:
        rates = []
        for _ in range(4):
            start = time.perf_counter()
            llm.embed(workload.texts, use_tqdm=False)
            rates.append(workload.total_tokens / (time.perf_counter() - start))
        return dtype, Spread.of(rates[1:]).text(), llm.model_info.attention


if __name__ == "__main__":
    main()
