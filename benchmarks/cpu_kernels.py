"""The native CPU kernels beside torch (oneDNN), taking turns: their rates, and the fraction of this core's peak.

    ./dev bench kernels
    ./dev bench kernels --rounds 3 --only attention --matching bfloat16

One thread on one core, timed by its own CPU clock; the peaks are measured in the same run (peaks.py). Each kernel's
result is compared with torch's before it is timed. Linear layers are made by what the engine makes them with, and the
column says what came of it; torch's side is oneDNN with its weights laid out beforehand, for int8 in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

# ./dev sets PYTHONSAFEPATH, which leaves a script's own folder out.
sys.path.extend(str(Path(__file__).resolve().parent.parent / room) for room in ("benchmarks", "loadtest"))

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peaks
from carpool.engine.models import quantize
from carpool.engine.models.surgery.native_linear import native as native_layer
from carpool.engine.models.surgery.packed_linear import packed
from carpool.kernels import native, native_rows, reference
from flops import pairs
from peaks import Peaks
from report import Spread, circumstances, facts, table

TOKENS = 2048  # of a batch, and of the rows that short texts make together
MOST_FLOP = 2e10  # of one call: long texts get as few heads as keep it under this
SLICE_SECONDS = 0.02  # of CPU for each side in one turn, calls repeated to fill it
Work = Callable[[], Tensor]

LENGTHS = (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
LAYERS = (
    ("MiniLM, query-key-value", 384, 1152, None),
    ("MiniLM, output", 384, 384, None),
    ("MiniLM, up and GELU", 384, 1536, "gelu"),
    ("MiniLM, down", 1536, 384, None),
    ("BERT-base, query-key-value", 768, 2304, None),
    ("BERT-base, up and GELU", 768, 3072, "gelu"),
    ("BERT-base, down", 3072, 768, None),
    ("ModernBERT, gate and up", 768, 2304, None),
    ("ModernBERT, down", 1152, 768, None),
)
WIDTH = 768  # of the rows that row kernels are timed on


@dataclass(frozen=True, slots=True)
class Contest:
    """One kernel at one shape. `amount` is what a call does: floating-point operations, or bytes read and written."""

    group: str  # attention, linear, rows
    name: str
    dtype: str
    amount: float
    by: str  # what serves
    ours: Work
    twin: Work | None  # None where the comparison would hold more than is worth it


@dataclass(frozen=True, slots=True)
class Result:
    group: str
    name: str
    dtype: str
    by: str
    rate: float  # 10^9 a second of CPU time, median of the rounds
    twin_rate: float | None
    ratio: float | None  # times as fast as torch, the median of the rounds' ratios


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    if native.library is None:
        sys.exit(
            "There are no native kernels here: they were not built, or this CPU has no instructions for them."
        )
    where, bounds = circumstances(), peaks.measure()
    results, group = [], ""
    for contest in _contests():
        if (options.only and contest.group not in options.only) or options.matching not in _line(contest):
            continue
        if group not in ("", contest.group):
            bounds = bounds.or_higher(peaks.measure())
        group = contest.group
        results.append(_measured(contest, options.rounds))
    bounds = bounds.or_higher(peaks.measure())
    print(_markdown(where, bounds, results))
    if options.json:
        record = {
            "circumstances": where,
            "peaks": asdict(bounds),
            "results": [asdict(one) for one in results],
        }
        options.json.write_text(json.dumps(record, indent=1))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9, help="turns of each (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=("attention", "linear", "rows"), help="of these groups")
    parser.add_argument("--matching", default="", metavar="TEXT", help="whose dtype and name has this")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every measurement there")
    return parser.parse_args()


def _line(contest: Contest) -> str:
    return f"{contest.dtype} {contest.name}"


# ── what is timed ────────────────────────────────────────────────────────────────────────────────────────────────


def _contests() -> Iterator[Contest]:
    """Made one by one: each holds tensors."""
    for dtype in (torch.bfloat16, torch.float32):
        for length in LENGTHS:
            yield _attention(dtype, length, 64)
        for size in (32, 128):
            yield _attention(dtype, 128, size)
            yield _attention(dtype, 2048, size)
        for length in (512, 4096):
            yield _attention(dtype, length, 64, causal=True)
            yield _attention(dtype, length, 64, window=65)  # ModernBERT's
    for name, inputs, outputs, activation in LAYERS:
        for kind in ("bfloat16", "float32", "int8"):
            yield _linear(name, inputs, outputs, activation, kind, TOKENS)
    for kind in ("bfloat16", "float32", "int8"):
        yield _linear("MiniLM, up and GELU", 384, 1536, "gelu", kind, 16)
    for dtype in (torch.bfloat16, torch.float32):
        yield from _rows(dtype)


def _normal(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _attention(
    dtype: torch.dtype, length: int, size: int, *, causal: bool = False, window: int | None = None
) -> Contest:
    """A batch's attention: short texts side by side, one head of a long one."""
    count = max(1, TOKENS // length)
    flop = 4 * size * pairs(length, window, causal) * count
    heads = max(1, min(12, int(MOST_FLOP / flop)))
    qkv = _normal(count * length, 3, heads, size, dtype=dtype)
    query, key, value = qkv.unbind(1)  # views of packed rows, as the engine has them
    ours = partial(
        native.varlen_attention, query, key, value, [(length, count)],
        scale=size**-0.5, causal=causal, window=window,
    )  # fmt: skip
    mask = None
    if window:
        places = torch.arange(length)
        mask = (places[:, None] - places).abs() < window
    # The layout in which torch is fastest, laid out before the clock runs.
    q, k, v = (
        x.reshape(count, length, heads, size).transpose(1, 2).contiguous() for x in (query, key, value)
    )

    def twin() -> Tensor:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return out.transpose(1, 2).reshape(count * length, heads, size)

    seen = ", causal" if causal else f", window {window}" if window else ""
    name = f"{length} tokens, heads of {size}{seen}"
    return Contest("attention", name, _name(dtype), flop * heads, native.LEVELS[native.level], ours, twin)


def _linear(name: str, inputs: int, outputs: int, activation: str | None, kind: str, tokens: int) -> Contest:
    """As the engine lays it out, beside oneDNN's."""
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    torch.manual_seed(1)
    layer = nn.Linear(inputs, outputs).to(dtype).requires_grad_(False)
    gelu = "gelu" if activation else None
    theirs = packed("", layer, gelu) or layer  # type: ignore[arg-type]
    own: nn.Module | None
    if kind == "int8":
        own = quantize._twin("", layer, gelu)  # type: ignore[arg-type]
    else:
        own = native_layer("", layer, gelu)  # type: ignore[arg-type]
    serving = own or theirs
    x = _normal(tokens, inputs, dtype=dtype)
    flop = 2 * tokens * inputs * outputs
    by = type(serving).__name__
    return Contest(
        "linear", f"{name}, {tokens} tokens", kind, flop, by, partial(serving, x), partial(theirs, x)
    )


def _rows(dtype: torch.dtype) -> Iterator[Contest]:
    """Bytes are those of each operand once."""
    x, residual = (_normal(TOKENS, WIDTH, dtype=dtype) for _ in range(2))
    weight, bias = (_normal(WIDTH, dtype=torch.float32) for _ in range(2))
    both = _normal(TOKENS, 2 * WIDTH, dtype=dtype)
    heads = _normal(TOKENS, 12, 64, dtype=dtype)
    cos, sin = (_normal(TOKENS, 64, dtype=torch.float32) for _ in range(2))
    size = x.numel() * x.element_size()
    name, by = _name(dtype), native.LEVELS[native.level]
    norm = x, residual, weight, bias, 1e-5
    plain = x, None, weight, None, 1e-6
    count = TOKENS // 128
    pooling = (
        x,
        torch.arange(0, TOKENS + 1, 128, dtype=torch.int32),
        torch.full((count,), reference.MEAN, dtype=torch.int8),
        torch.full((count,), WIDTH, dtype=torch.int32),
        torch.ones(count, dtype=torch.bool),
    )
    cases: tuple[tuple[str, float, Work, Work], ...] = (
        (
            "residual and LayerNorm",
            3 * size,
            lambda: native_rows.norm_rows(*norm, centred=True, keep_sum=False)[0],
            lambda: reference.norm_rows(*norm, centred=True, keep_sum=False)[0],
        ),
        (
            "RMSNorm",
            2 * size,
            lambda: native_rows.norm_rows(*plain, centred=False, keep_sum=False)[0],
            lambda: reference.norm_rows(*plain, centred=False, keep_sum=False)[0],
        ),
        (
            "SiLU-and-mul",
            3 * size,
            lambda: native_rows.gated(both, "silu"),
            lambda: reference.gated(both, "silu"),
        ),
        (
            "GELU-and-mul",
            3 * size,
            lambda: native_rows.gated(both, "gelu"),
            lambda: reference.gated(both, "gelu"),
        ),
        (
            "rotary positions",
            2 * size + 2 * cos.numel() * cos.element_size(),
            lambda: native_rows.rotary(heads, cos, sin),
            lambda: reference.rotary(heads, cos, sin),
        ),
        (
            "mean pooling, normalised",
            size,
            lambda: native_rows.pool_rows(*pooling)[0],
            lambda: reference.pool_rows(*pooling)[0],
        ),
    )
    for label, amount, ours, twin in cases:
        yield Contest("rows", f"{label}, [{TOKENS}, {WIDTH}]", name, amount, by, ours, twin)


# ── how it is timed ──────────────────────────────────────────────────────────────────────────────────────────────


@torch.inference_mode()
def _measured(contest: Contest, rounds: int) -> Result:
    """Raises SystemExit if the kernel and torch do not compute the same."""
    works = [contest.ours] if contest.twin is None else [contest.ours, contest.twin]
    _compare(contest)
    calls = [max(1, round(SLICE_SECONDS / _seconds(work, 1))) for work in works]
    turns = [[_seconds(work, n) for work, n in zip(works, calls, strict=True)] for _ in range(rounds)]
    own = Spread.of(turn[0] for turn in turns).median
    theirs = Spread.of(turn[-1] for turn in turns).median
    ratio = Spread.of(turn[-1] / turn[0] for turn in turns).median
    alone = contest.twin is None
    return Result(
        *(contest.group, contest.name, contest.dtype, contest.by, contest.amount / own / 1e9),
        None if alone else contest.amount / theirs / 1e9,
        None if alone else ratio,
    )


def _compare(contest: Contest) -> None:
    """Also the first call of both."""
    if contest.twin is None:
        contest.ours()
        return
    ours, twin = contest.ours().float(), contest.twin().float()
    apart = float((ours - twin).norm() / twin.norm())
    most = {"float32": 1e-4, "bfloat16": 2e-2, "int8": 3e-2}[contest.dtype]
    if not apart <= most:
        raise SystemExit(f"{_line(contest)}: {apart:.1e} from torch's result, at most {most:.0e} is rounding")


def _seconds(work: Work, calls: int) -> float:
    """CPU time of one call, this thread's."""
    began = time.thread_time()
    for _ in range(calls):
        work()
    return max((time.thread_time() - began) / calls, 1e-7)


# ── what is printed ──────────────────────────────────────────────────────────────────────────────────────────────

_TITLES = {
    "attention": ("Attention", "GFLOP/s"),
    "linear": ("Linear layers", "GFLOP/s"),
    "rows": ("Row kernels", "GB/s"),
}


def _markdown(where: dict[str, str], bounds: Peaks, results: Sequence[Result]) -> str:
    blocks = ["### Kernels, one core", facts(where), bounds.text()]
    for group, (title, unit) in _TITLES.items():
        rows = [_row(one, bounds) for one in results if one.group == group]
        if rows:
            header = (title, "dtype", "served by", unit, "of peak", f"torch, {unit}", "times as fast")
            blocks.append(table(header, rows))
    return "\n\n".join(blocks)


def _row(one: Result, bounds: Peaks) -> tuple[str, ...]:
    if one.group == "rows":
        copied = bounds.one.get("copy")
        fraction = f"{100 * one.rate / copied:.0f} %" if copied else ""
    else:
        fraction = bounds.fraction(one.dtype, one.rate)
    twin = "" if one.twin_rate is None else f"{one.twin_rate:,.0f}"
    ratio = "" if one.ratio is None else f"{one.ratio:.2f}"
    return one.name, one.dtype, one.by, f"{one.rate:,.0f}", fraction, twin, ratio


if __name__ == "__main__":
    main()
