"""What becomes of requests that come at fixed rates, up to twice what the server can answer.

    ./dev bench overload
    ./dev bench overload --seconds 3 --shares 0.5 2

First the peak is measured: the rate of a closed loop of one-text requests. Then requests arrive in an open loop, at
random times and at a share of that rate, whether others were answered or not; a request's time runs from when it was
due. What would wait too long (by the server's own bound, or longer than `--queue-seconds`) is to be refused at once,
with 503, and what is answered meanwhile is to be no less than at the peak.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

# ./dev sets PYTHONSAFEPATH, which leaves a script's own folder out.
sys.path.extend(str(Path(__file__).resolve().parent.parent / room) for room in ("benchmarks", "loadtest"))

from arrivals import poisson
from carpool.engine.hub import locate
from http_client import Job, Outcome, drive
from report import Spread, circumstances, facts, quantile, table
from server_process import ServerProcess
from workload import LENGTHS, Workload, natural

SETTLE_SECONDS = 0.3
MOST_CONNECTIONS = 4096
REFUSED = "status 503"


@dataclass(slots=True)
class Level:
    """Requests at one share of the peak; one outcome a round."""

    share: float
    rate: float  # requests a second that were due
    outcomes: list[Outcome] = field(default_factory=list)

    def goodput(self) -> Spread:
        """Good answers a second, until the last one was in."""
        return Spread.of(
            sum(one is not None for one in outcome.latencies) / outcome.seconds for outcome in self.outcomes
        )

    def errors(self) -> dict[str, int]:
        """Of all rounds, but for refusals."""
        total: dict[str, int] = {}
        for outcome in self.outcomes:
            for what, count in outcome.errors.items():
                if what != REFUSED:
                    total[what] = total.get(what, 0) + count
        return total


def main() -> None:
    options = _options()
    model = locate(options.model)
    where = circumstances()
    arguments = [*filter(None, [options.model]), "--dtype", options.dtype]
    texts = natural(options.lengths, options.texts, model, options.longest)
    limit = None if options.queue_seconds is None else _limit(options, arguments, texts)
    levels: list[Level] = []
    with ServerProcess(*arguments, *_queue(limit)) as server:
        _closed(server, texts, options.connections)
        peaks = []
        for number in range(options.rounds):
            peaks.append(len(texts.texts) / _closed(server, texts, options.connections).seconds)
            if not levels:
                levels = [Level(share, share * peaks[0]) for share in options.shares]
            for level in levels:
                time.sleep(SETTLE_SECONDS)
                level.outcomes.append(_open(server, options, model, level.rate, number))
    peak = Spread.of(peaks)
    print(_markdown(where, options, limit, peak, levels))
    if options.json:
        record = {
            "circumstances": where,
            "peak": asdict(peak),
            "max_queued_tokens": limit,
            "levels": [asdict(level) for level in levels],
        }
        options.json.write_text(json.dumps(record))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="", help="a model folder; by default the bundled MiniLM")
    parser.add_argument("--dtype", default="bfloat16", help="(default: %(default)s)")
    parser.add_argument("--lengths", default="mixed", choices=LENGTHS, help="(default: %(default)s)")
    parser.add_argument("--longest", type=int, default=256, help="most tokens in one (default: %(default)s)")
    parser.add_argument(
        "--connections", type=int, default=32, help="of the closed loop (default: %(default)s)"
    )
    parser.add_argument(
        "--texts", type=int, default=512, help="requests in a closed loop (default: %(default)s)"
    )
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.8, 0.9, 1.0, 2.0])
    parser.add_argument("--seconds", type=float, default=20.0, help="of arrivals (default: %(default)s)")
    parser.add_argument(
        "--queue-seconds", type=float, help="of work that may wait; by default the server's own bound"
    )
    parser.add_argument("--rounds", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every measurement there")
    return parser.parse_args()


def _limit(options: argparse.Namespace, arguments: Sequence[str], texts: Workload) -> int:
    """Tokens of `--queue-seconds`; at least what the closed loop has under way at once, which is not to be refused."""
    with ServerProcess(*arguments) as server:
        _closed(server, texts, options.connections)
        tokens = texts.total_tokens / _closed(server, texts, options.connections).seconds
    held: float = options.queue_seconds * tokens
    return max(round(held), int(options.connections) * max(texts.tokens))


def _queue(limit: int | None) -> tuple[str, ...]:
    return () if limit is None else ("--max-queued-tokens", str(limit))


def _bodies(texts: Workload) -> list[str]:
    return [json.dumps({"input": text, "encoding_format": "base64"}) for text in texts.texts]


def _closed(server: ServerProcess, texts: Workload, connections: int) -> Outcome:
    """Raises SystemExit if not all are answered: the peak would mean nothing."""
    outcome = drive(Job(server.host, server.port, "/v1/embeddings", _bodies(texts), connections))
    if outcome.errors:
        raise SystemExit(f"Not all requests of the closed loop were answered: {outcome.errors}")
    return outcome


def _open(server: ServerProcess, options: argparse.Namespace, model: Path, rate: float, seed: int) -> Outcome:
    due = poisson(rate, options.seconds, seed)
    texts = natural(options.lengths, len(due), model, options.longest, seed + 1)
    return drive(Job(server.host, server.port, "/v1/embeddings", _bodies(texts), MOST_CONNECTIONS, due=due))


def _markdown(
    where: dict[str, str],
    options: argparse.Namespace,
    limit: int | None,
    peak: Spread,
    levels: Sequence[Level],
) -> str:
    about = {
        **where,
        "peak": f"{peak.text(1)} requests/s, closed loop of {options.connections} connections",
        "queue": "as by default" if limit is None else f"{limit:,} tokens may wait",
        "arrivals": f"{options.lengths} texts, {options.seconds:g} s, {options.rounds} rounds",
    }
    header = (
        *("due, of the peak", "due/s", "answered/s", "of the peak", "p50, ms", "p99, ms"),
        *("refused", "refusal p50, ms", "p99, ms", "other errors", "sent late p99, ms"),
    )
    rows = [_row(level, peak) for level in levels]
    return "\n\n".join(["### HTTP at fixed rates, one text a request", facts(about), table(header, rows)])


def _row(level: Level, peak: Spread) -> tuple[str, ...]:
    good = [1e3 * one for outcome in level.outcomes for one in outcome.latencies if one is not None]
    refusals = [1e3 * one for outcome in level.outcomes for one in outcome.refusals]
    late = [1e3 * one for outcome in level.outcomes for one in outcome.late]
    refused = sum(outcome.errors.get(REFUSED, 0) for outcome in level.outcomes)
    due = sum(len(outcome.latencies) for outcome in level.outcomes)
    errors = ", ".join(f"{count} × {what}" for what, count in level.errors().items())
    goodput = level.goodput().median
    return (
        f"{100 * level.share:.0f} %",
        f"{level.rate:,.1f}",
        f"{goodput:,.1f}",
        f"{100 * goodput / peak.median:.0f} %",
        *(_quantile(good, share) for share in (0.5, 0.99)),
        f"{100 * refused / due:.0f} %",
        *(_quantile(refusals, share) for share in (0.5, 0.99)),
        errors or "0",
        _quantile(late, 0.99),
    )


def _quantile(milliseconds: Sequence[float], share: float) -> str:
    return f"{quantile(milliseconds, share):,.1f}" if milliseconds else ""


if __name__ == "__main__":
    main()
