"""The engine without HTTP: tokens a second and how much of the machine's peak that is, and how cost grows.

    ./dev bench engine
    ./dev bench engine --rounds 1 --texts 64 --no-scaling

Model FLOP utilisation is tokens a second times operations a token (flops.py: linear layers and attention), over the
peak of all cores, measured in the same run (peaks.py). Contestants take turns, as in compare. Then one thing at a time
is changed: how many texts a call has, how long they are, how many tokens a batch may have; and where the CPU time of a
forward pass goes is told by a stopwatch around the native kernels.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# ./dev sets PYTHONSAFEPATH, which leaves a script's own folder out.
sys.path.extend(str(Path(__file__).resolve().parent.parent / room) for room in ("benchmarks", "loadtest"))

import peaks
from carpool.engine.hub import locate
from carpool.engine.llm import LLM
from carpool.engine.models.attention import witnessed
from carpool.engine.runner import ModelRunner
from carpool.kernels import native
from contestants import Contestant, Entry, Turn
from flops import Flops
from peaks import Peaks
from report import Spread, circumstances, cores, facts, noise_warning, table
from shapes import LONGEST, modernbert
from workload import LENGTHS, Workload, equal, natural

DTYPES = ("bfloat16", "float32", "int8")
SETTLE_SECONDS = 0.3
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # texts in a call
TOKENS_EACH = 64
LONG_LENGTHS = (128, 512, 2048, LONGEST)
LONG_LAYERS = 6  # two of them see everything
BATCHES = (256, 512, 1024, 2048, 4096, 8192)  # most tokens in one


@dataclass(slots=True)
class Line:
    """One row of a table: an engine with some texts, and its turns."""

    table: str
    name: str
    dtype: str
    texts: int
    tokens: int
    flop: int  # of all texts
    turns: list[Turn] = field(default_factory=list)

    def rate(self) -> Spread:
        """Tokens a second."""
        return Spread.of(self.tokens / turn.seconds for turn in self.turns)

    def gflops(self) -> float:
        return self.flop / Spread.of(turn.seconds for turn in self.turns).median / 1e9


def main() -> None:
    options = _options()
    where, bounds = circumstances(), peaks.measure()
    lines = list(_dtypes(options))
    bounds = bounds.or_higher(peaks.measure())
    if options.scaling:
        lines += [*_scaling(options), *_batches(options)]
        with tempfile.TemporaryDirectory() as folder:
            lines += _long(options, modernbert(Path(folder), LONG_LAYERS))
        bounds = bounds.or_higher(peaks.measure())
    stages = {name: _stages(options, name) for name in ("short", "mixed", "long")}
    stages["of 128 tokens"] = _stages_of(equal(128, options.texts // 4, locate("")))
    print(_markdown(where, bounds, lines, stages))
    if options.json:
        record = {
            "circumstances": where,
            "peaks": asdict(bounds),
            "lines": [asdict(line) for line in lines],
            "stages": stages,
        }
        options.json.write_text(json.dumps(record, indent=1))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--texts", type=int, default=512, help="in a turn (default: %(default)s)")
    parser.add_argument("--longest", type=int, default=256, help="most tokens in one (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each (default: %(default)s)")
    parser.add_argument("--no-scaling", dest="scaling", action="store_false", help="only dtypes and stages")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every measurement there")
    return parser.parse_args()


# ── what is timed ────────────────────────────────────────────────────────────────────────────────────────────────


def _dtypes(options: argparse.Namespace) -> Iterator[Line]:
    """Every dtype with short, mixed and long texts."""
    model = locate("")
    flops = Flops.of(model)
    with ExitStack() as stack:
        engines = [_engine(stack, model, Entry("carpool", dtype)) for dtype in DTYPES]
        for lengths in LENGTHS:
            workload = natural(lengths, options.texts, model, options.longest)
            yield from _turns(engines, "dtypes", f"{lengths} texts", workload, flops, options.rounds)


def _scaling(options: argparse.Namespace) -> Iterator[Line]:
    """How many texts a call has, and how long they are."""
    model = locate("")
    flops = Flops.of(model)
    with ExitStack() as stack:
        engines = [_engine(stack, model, Entry("carpool", "bfloat16"))]
        for count in COUNTS:
            yield from _turns(
                engines, "texts", str(count), equal(TOKENS_EACH, count, model), flops, options.rounds
            )
        for length in (8, 16, 32, 64, 128, 256):
            workload = equal(length, options.texts * 32 // length, model)
            yield from _turns(engines, "length", str(length), workload, flops, options.rounds)


def _batches(options: argparse.Namespace) -> Iterator[Line]:
    """Each engine once, since it is told at start."""
    model = locate("")
    workload = natural("mixed", options.texts, model, options.longest)
    flops = Flops.of(model)
    with ExitStack() as stack:
        for most in BATCHES:
            engine = _engine(stack, model, Entry("carpool", "bfloat16", most))
            yield from _turns([engine], "batch", str(most), workload, flops, options.rounds)


def _long(options: argparse.Namespace, model: Path) -> list[Line]:
    """A text a core, up to the longest that ModernBERT takes."""
    flops = Flops.of(model)
    with ExitStack() as stack:
        engines = [_engine(stack, model, Entry("carpool", dtype)) for dtype in ("bfloat16", "float32")]
        rounds = min(options.rounds, 3)
        return [
            line
            for length in LONG_LENGTHS
            for line in _turns(
                engines,
                "long",
                str(length),
                equal(length, cores() * LONGEST // length // 4 or cores(), model),
                flops,
                rounds,
            )
        ]


def _engine(stack: ExitStack, model: Path, entry: Entry) -> Contestant:
    """Raises SystemExit if it does not start."""
    engine = stack.enter_context(closing(Contestant(entry, str(model), cores())))
    if engine.absent:
        raise SystemExit(engine.absent)
    return engine


def _turns(
    engines: Sequence[Contestant], kind: str, name: str, workload: Workload, flops: Flops, rounds: int
) -> list[Line]:
    count = len(workload.texts)
    told = (count, workload.total_tokens, flops.of_texts(workload.tokens))
    lines = [Line(kind, name, engine.entry.dtype, *told) for engine in engines]
    for engine in engines:
        engine.embed(workload.texts)
    for _ in range(rounds):
        for engine, line in zip(engines, lines, strict=True):
            time.sleep(SETTLE_SECONDS)
            line.turns.append(engine.turn())
    return lines


# ── where the time of a forward pass goes ────────────────────────────────────────────────────────────────────────


class Stopwatch:
    """In the place of the native library: adds up the CPU seconds of each of its functions."""

    def __init__(self, library: Any) -> None:
        self._library = library
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            began = time.thread_time()
            try:
                return getattr(self._library, name)(*arguments)
            finally:
                self.seconds[name] += time.thread_time() - began

        return timed


def _stages(options: argparse.Namespace, lengths: str) -> dict[str, float]:
    """Shares of the CPU time of forward passes, by native function; one worker, bfloat16."""
    return _stages_of(natural(lengths, options.texts // 4, locate(""), options.longest))


def _stages_of(workload: Workload) -> dict[str, float]:
    with closing(LLM(dtype="bfloat16", cpu_workers=1)) as llm:
        llm.embed(workload.texts, use_tqdm=False)
        return _watched(lambda: llm.embed(workload.texts, use_tqdm=False))


def _watched(work: Callable[[], object]) -> dict[str, float]:
    watch, plain, whole = Stopwatch(native.library), ModelRunner.launch, 0.0

    def launch(runner: ModelRunner, batch: Any) -> Any:
        nonlocal whole
        began = time.thread_time()
        with witnessed():  # so that layers are gone through one by one, also where they are one native call
            landing = plain(runner, batch)
        whole += time.thread_time() - began
        return landing

    native.library, ModelRunner.launch = watch, launch  # type: ignore[assignment, method-assign]
    try:
        work()
    finally:
        native.library, ModelRunner.launch = watch._library, plain  # type: ignore[method-assign]
    return {
        name.removeprefix("carpool_"): seconds / whole
        for name, seconds in watch.seconds.items()
        if not name.startswith("carpool_crew")
    }


# ── what is printed ──────────────────────────────────────────────────────────────────────────────────────────────

_TITLES = {
    "dtypes": "MiniLM, {rounds} rounds of turns; tokens/s least – median – most:",
    "texts": f"How many texts a call has, of {TOKENS_EACH} tokens each, bfloat16:",
    "length": "How long texts are, as many as are equally many tokens, bfloat16:",
    "batch": "Most tokens in a batch (`--max-num-batched-tokens`), mixed texts, bfloat16:",
    "long": f"ModernBERT's shape, {LONG_LAYERS} layers, up to {LONGEST:,} tokens a text:",
}
_FIRST = {
    "dtypes": "texts",
    "texts": "texts in a call",
    "length": "tokens in a text",
    "batch": "tokens",
    "long": "tokens in a text",
}


def _markdown(
    where: dict[str, str], bounds: Peaks, lines: Sequence[Line], stages: dict[str, dict[str, float]]
) -> str:
    blocks = ["### The engine without HTTP", facts(where), bounds.text()]
    for kind, title in _TITLES.items():
        own = [line for line in lines if line.table == kind]
        if own:
            header = (_FIRST[kind], "dtype", "tokens/s", "ms a call", "GFLOP/s", "of peak (MFU)")
            blocks += [
                title.format(rounds=len(own[0].turns)),
                table(header, (_row(one, bounds) for one in own)),
            ]
    names = sorted({name for shares in stages.values() for name in shares})
    rows = [
        (
            lengths,
            *(f"{100 * shares.get(name, 0):.1f} %" for name in names),
            f"{100 * (1 - sum(shares.values())):.1f} %",
        )
        for lengths, shares in stages.items()
    ]
    blocks += [
        "Share of the CPU time of forward passes by native kernel, one worker, bfloat16, layers one by one:",
        table(("texts", *names, "the rest"), rows),
    ]
    noise = max(
        Spread.of(turn.others_cpu_seconds / turn.seconds for turn in line.turns).median for line in lines
    )
    return "\n\n".join([*blocks, *noise_warning(noise)])


def _row(line: Line, bounds: Peaks) -> tuple[str, ...]:
    gflops = line.gflops()
    milliseconds = 1e3 * Spread.of(turn.seconds for turn in line.turns).median
    rate = line.rate()
    told = rate.text() if line.table == "dtypes" else f"{rate.median:,.0f}"
    return (
        *(line.name, line.dtype, told, f"{milliseconds:,.1f}", f"{gflops:,.0f}"),
        bounds.fraction(line.dtype, gflops, everywhere=True),
    )


if __name__ == "__main__":
    main()
