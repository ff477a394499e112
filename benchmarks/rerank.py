"""One query and a hundred documents a request, over HTTP: requests and documents a second.

    ./dev bench rerank
    ./dev bench rerank --requests 4 --rounds 1

The model is a cross-encoder of MiniLM's shape with random weights, unless one is named; a pair is about a hundred
tokens. Every request has a query and documents of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

# ./dev sets PYTHONSAFEPATH, which leaves a script's own folder out.
sys.path.extend(str(Path(__file__).resolve().parent.parent / room) for room in ("benchmarks", "loadtest"))

from carpool.engine.hub import locate
from corpus import MIXED, SHORT, passages
from http_client import Job, Outcome, drive
from report import Spread, circumstances, facts, quantile, table
from server_process import ServerProcess
from shapes import reranker

SETTLE_SECONDS = 0.3


def main() -> None:
    options = _options()
    where = circumstances()
    bodies = _bodies(options.requests, options.documents)
    passes: dict[int, list[Outcome]] = {count: [] for count in options.connections}
    with tempfile.TemporaryDirectory() as folder:
        model = locate(options.model) if options.model else reranker(Path(folder))
        with ServerProcess(str(model), "--dtype", options.dtype) as server:
            job = Job(
                *(server.host, server.port, "/rerank", bodies, 1),
                mark='"relevance_score":',
                marks=options.documents,
            )
            drive(job)
            for _ in range(options.rounds):
                for count, outcomes in passes.items():
                    time.sleep(SETTLE_SECONDS)
                    outcomes.append(drive(Job(**{**asdict(job), "connections": count})))
    rows = [_row(count, outcomes, options.documents) for count, outcomes in passes.items()]
    header = ("connections", "requests/s", "documents/s", "p50, ms", "p99, ms", "errors")
    title = f"### Rerank over HTTP, one query and {options.documents} documents a request"
    print(title, facts(where), table(header, rows), sep="\n\n")
    if options.json:
        record = {str(count): [asdict(one) for one in outcomes] for count, outcomes in passes.items()}
        options.json.write_text(json.dumps({"circumstances": where, "passes": record}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="", help="a cross-encoder's folder; by default random weights")
    parser.add_argument("--dtype", default="bfloat16", help="(default: %(default)s)")
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 8], metavar="N")
    parser.add_argument("--documents", type=int, default=100, help="in a request (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=16, help="in a pass (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="passes of each (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every measurement there")
    return parser.parse_args()


def _bodies(requests: int, documents: int) -> list[str]:
    texts = [" ".join(text.split()[:150]) for text in passages(requests * documents, MIXED)]
    queries = passages(requests, SHORT)
    return [
        json.dumps({"query": query, "documents": texts[start : start + documents]})
        for query, start in zip(queries, range(0, len(texts), documents), strict=True)
    ]


def _row(connections: int, outcomes: list[Outcome], documents: int) -> tuple[str, ...]:
    good = [[one for one in outcome.latencies if one is not None] for outcome in outcomes]
    rate = Spread.of(len(some) / outcome.seconds for some, outcome in zip(good, outcomes, strict=True))
    latencies = [1e3 * one for some in good for one in some]
    errors = sum(sum(outcome.errors.values()) for outcome in outcomes)
    times = [f"{quantile(latencies, share):,.0f}" if latencies else "" for share in (0.5, 0.99)]
    return (
        *(str(connections), rate.text(2), f"{documents * rate.median:,.0f}"),
        *(*times, str(errors)),
    )


if __name__ == "__main__":
    main()
