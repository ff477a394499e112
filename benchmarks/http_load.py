"""One-text requests over HTTP beside the offline rate of the same engine, taking turns in one run.

    python benchmarks/http_load.py
    python benchmarks/http_load.py --texts 64 --rounds 1 --connections 1 32

A fresh `carpool serve` and an offline `LLM` sit side by side and sleep while the other works. A round is one offline
pass over the texts and one pass over HTTP for each number of connections: a closed loop, driven by a process of its
own (`http_client.py`), whose CPU seconds are printed, for on few cores they are missing elsewhere. All answers are
checked against the offline vectors before anything is timed.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

# ./dev sets PYTHONSAFEPATH, which leaves a script's own folder out.
sys.path.extend(str(Path(__file__).resolve().parent.parent / room) for room in ("benchmarks", "loadtest"))

from agreement import agreed_cosine
from carpool.engine.hub import locate
from contestants import Contestant, Entry, Turn, Vectors, machine_cpu_seconds
from http_client import Job, Outcome, drive
from report import Spread, circumstances, cores, facts, noise_warning, quantile, table
from server_process import ServerProcess
from workload import LENGTHS, Workload, natural

STAGES = ("tokenize", "queue", "forward", "encode")  # as the server names them in Server-Timing
SETTLE_SECONDS = 0.3


@dataclass(frozen=True, slots=True)
class Pass:
    """All texts once over HTTP."""

    outcome: Outcome
    tokens: int  # of the texts that got a good answer
    server_cpu_seconds: float
    others_cores: float  # that were busy with neither server nor client

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.outcome.seconds


@dataclass(slots=True)
class Level:
    """One number of connections, and its passes, one a round."""

    connections: int
    passes: list[Pass] = field(default_factory=list)

    def latencies(self) -> list[float]:
        """Of all good answers, milliseconds."""
        return [1000 * one for passed in self.passes for one in passed.outcome.latencies if one is not None]

    def stage(self, name: str) -> list[float]:
        """What the server says it spent on `name`, in the order of `latencies`, milliseconds."""
        columns = [passed.outcome.stages.get(name, []) for passed in self.passes]
        return [one for column in columns for one in column if one is not None]

    def beyond(self, *stages: str) -> list[float]:
        """Response times without the stages named, milliseconds. Empty if the server names no stages."""
        columns = [self.stage(name) for name in stages]
        if not all(columns):
            return []
        return [latency - sum(spent) for latency, *spent in zip(self.latencies(), *columns, strict=True)]

    def errors(self) -> Counter[str]:
        return sum((Counter(passed.outcome.errors) for passed in self.passes), Counter())


def main() -> None:
    options = _options()
    model = locate(options.model)
    workload = natural(options.lengths, options.texts, model, options.longest)
    where = circumstances()  # before there is any load of ours
    arguments = [*filter(None, [options.model]), "--dtype", options.dtype]
    starts = [_start_and_stop(arguments) for _ in range(options.starts - 1)]
    levels = [Level(connections) for connections in options.connections]
    offline: list[Turn] = []
    with (
        ServerProcess(*arguments) as server,
        closing(Contestant(Entry("carpool", options.dtype), str(model), cores())) as engine,
    ):
        starts.append(server.ready_seconds)
        resident = [server.resident_bytes()]
        cosine = _check(server, options, workload, engine.embed(workload.texts))
        for _ in range(options.rounds):
            time.sleep(SETTLE_SECONDS)
            offline.append(engine.turn())
            for level in levels:
                time.sleep(SETTLE_SECONDS)
                level.passes.append(_pass(server, options.encoding, workload, level.connections))
        resident.append(server.resident_bytes())
    about = {
        **where,
        "versions": ", ".join(f"{name} {version}" for name, version in engine.versions.items()),
        "texts": str(workload),
        "start to ready": f"{Spread.of(starts).text(1)} s in {len(starts)} starts",
        "resident memory": f"{resident[0] / 1e6:.0f} MB when ready, {resident[1] / 1e6:.0f} MB after the last pass",
        "lowest cosine": f"{cosine:.6f}, HTTP to offline",
    }
    print(_markdown(about, options.lengths, workload, offline, levels))
    if options.json:
        record = {
            "circumstances": where,
            "texts": len(workload.texts),
            "tokens": workload.tokens,
            "ready_seconds": starts,
            "resident_bytes": resident,
            "lowest_cosine": cosine,
            "offline": [asdict(turn) for turn in offline],
            "levels": [asdict(level) for level in levels],
        }
        options.json.write_text(json.dumps(record))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="", help="a model folder; by default the bundled MiniLM")
    parser.add_argument("--dtype", default="bfloat16", help="(default: %(default)s)")
    parser.add_argument(
        "--encoding", default="base64", choices=("base64", "float"), help="(default: %(default)s)"
    )
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 8, 32, 128], metavar="N")
    parser.add_argument(
        "--lengths", default="mixed", choices=LENGTHS, help="of the texts (default: %(default)s)"
    )
    parser.add_argument("--texts", type=int, default=512, help="requests in a pass (default: %(default)s)")
    parser.add_argument("--longest", type=int, default=256, help="most tokens in one (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="passes of each (default: %(default)s)")
    parser.add_argument("--starts", type=int, default=3, help="of the server, timed (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every measurement there")
    return parser.parse_args()


def _start_and_stop(arguments: Sequence[str]) -> float:
    """Seconds until ready."""
    with ServerProcess(*arguments) as server:
        return server.ready_seconds


def _check(
    server: ServerProcess, options: argparse.Namespace, workload: Workload, reference: Vectors
) -> float:
    """Every answer is its own text's, and counts its tokens. Returns the lowest cosine; raises SystemExit."""
    outcome = _drive(server, options.encoding, workload, 8, keep=True)
    if outcome.errors:
        raise SystemExit(f"Not all requests were answered: {outcome.errors}")
    answers = [json.loads(answer) for answer in outcome.answers]
    if [answer["usage"]["prompt_tokens"] for answer in answers] != workload.tokens:
        raise SystemExit("The server counts other tokens than the tokenizer does.")
    vectors = np.stack([_vector(answer["data"][0]["embedding"]) for answer in answers])
    return agreed_cosine("the server", options.dtype, vectors, reference)


def _vector(embedding: str | list[float]) -> Vectors:
    """float32 [D] from either encoding."""
    if isinstance(embedding, str):
        return np.frombuffer(base64.b64decode(embedding), np.float32)
    return np.asarray(embedding, np.float32)


def _pass(server: ServerProcess, encoding: str, workload: Workload, connections: int) -> Pass:
    began = (time.perf_counter(), machine_cpu_seconds(), server.cpu_seconds(), _our_cpu_seconds())
    outcome = _drive(server, encoding, workload, connections)
    ended = (time.perf_counter(), machine_cpu_seconds(), server.cpu_seconds(), _our_cpu_seconds())
    seconds, machine, served, ours = (after - before for before, after in zip(began, ended, strict=True))
    answered = zip(workload.tokens, outcome.latencies, strict=True)
    return Pass(
        outcome,
        tokens=sum(tokens for tokens, latency in answered if latency is not None),
        server_cpu_seconds=served,
        others_cores=max(0.0, machine - served - ours) / seconds,
    )


def _our_cpu_seconds() -> float:
    """Of this process and of the clients that have ended."""
    return sum(os.times()[:4])


def _drive(
    server: ServerProcess, encoding: str, workload: Workload, connections: int, keep: bool = False
) -> Outcome:
    bodies = [json.dumps({"input": text, "encoding_format": encoding}) for text in workload.texts]
    return drive(Job(server.host, server.port, "/v1/embeddings", bodies, connections, keep))


def _markdown(
    about: dict[str, str],
    lengths: str,
    workload: Workload,
    offline: Sequence[Turn],
    levels: Sequence[Level],
) -> str:
    alone = [_quantile(level.beyond("forward"), 0.5) for level in levels if level.connections == 1]
    overhead = "".join(f"{one} ms at one connection, p50 of response time minus forward" for one in alone)
    header = ("connections", "tokens/s", "% of offline", "texts/s", "cores busy", "client CPU s", "elsewhere")
    rates = [_offline_rates(offline, workload), *(_rates(level, offline, workload) for level in levels)]
    blocks = [
        f"### HTTP, one {lengths} text a request, {len(offline)} rounds of turns",
        facts({**about, "overhead": overhead or "not measured"}),
        "Rates, least – median – most; the rest is of the median pass:",
        table(header, rates),
        "Response times in milliseconds, of all rounds:",
        table(("connections", "p50", "p90", "p99", "errors"), map(_response_times, levels)),
        "Where they went, p50 in milliseconds:",
        table(("connections", *STAGES, "the rest", "all but forward"), map(_stages, levels)),
    ]
    noise = [Spread.of(turn.others_cpu_seconds / turn.seconds for turn in offline)]
    noise += [Spread.of(passed.others_cores for passed in level.passes) for level in levels]
    return "\n\n".join([*blocks, *noise_warning(max(one.median for one in noise))])


def _offline_rates(offline: Sequence[Turn], workload: Workload) -> tuple[str, ...]:
    seconds = Spread.of(turn.seconds for turn in offline)
    return (
        "offline",
        Spread.of(workload.total_tokens / turn.seconds for turn in offline).text(),
        "",
        f"{len(workload.texts) / seconds.median:,.1f}",
        _median(turn.cpu_seconds / turn.seconds for turn in offline),
        "",
        _median(turn.others_cpu_seconds / turn.seconds for turn in offline),
    )


def _rates(level: Level, offline: Sequence[Turn], workload: Workload) -> tuple[str, ...]:
    passes = level.passes
    shares = (
        100 * passed.rate * turn.seconds / workload.total_tokens
        for passed, turn in zip(passes, offline, strict=True)
    )
    answered = (len(workload.texts) - sum(passed.outcome.errors.values()) for passed in passes)
    return (
        str(level.connections),
        Spread.of(passed.rate for passed in passes).text(),
        Spread.of(shares).text(),
        _median((count / passed.outcome.seconds for count, passed in zip(answered, passes, strict=True)), 1),
        _median(passed.server_cpu_seconds / passed.outcome.seconds for passed in passes),
        _median(passed.outcome.cpu_seconds for passed in passes),
        _median(passed.others_cores for passed in passes),
    )


def _response_times(level: Level) -> tuple[str, ...]:
    latencies = level.latencies()
    errors = ", ".join(f"{count} × {what}" for what, count in level.errors().items())
    return (
        str(level.connections),
        *(_quantile(latencies, share) for share in (0.5, 0.9, 0.99)),
        errors or "0",
    )


def _stages(level: Level) -> tuple[str, ...]:
    columns = [*(level.stage(name) for name in STAGES), level.beyond(*STAGES), level.beyond("forward")]
    return (str(level.connections), *(_quantile(column, 0.5) for column in columns))


def _median(values: Iterable[float], digits: int = 2) -> str:
    return f"{Spread.of(values).median:,.{digits}f}"


def _quantile(milliseconds: Sequence[float], share: float) -> str:
    return f"{quantile(milliseconds, share):,.2f}" if milliseconds else "unknown"


if __name__ == "__main__":
    main()
