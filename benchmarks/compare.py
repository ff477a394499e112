"""Offline tokens a second of carpool beside its peers, taking turns in one run.

    python benchmarks/compare.py
    python benchmarks/compare.py --texts 64 --rounds 1 carpool:bfloat16 sentence-transformers:bfloat16:128
    python benchmarks/compare.py --lengths short mixed long

Peers live in environments of their own, made by `./dev bench peers`; who has none is looked for in this one, and who is
not there either is printed as absent.

Every contestant sits in a process of its own and sleeps while another works. All embed the same passages; their
numbers must agree before anything is timed. A peer that pads in batches is entered with several batch sizes, and its
best one is what carpool is compared with. Ratios are taken within a round, so that what slows the machine for a
while slows both sides of them. Other work on the machine does not slow both alike, though: peers that run OpenMP wait
for the core that was taken at every operation. So it is measured, and the report says when it was too much.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from pathlib import Path

# ./dev sets PYTHONSAFEPATH, which leaves a script's own folder out.
sys.path.extend(str(Path(__file__).resolve().parent.parent / room) for room in ("benchmarks", "loadtest"))

from agreement import agreed_cosine
from carpool.engine.hub import locate
from contestants import Contestant, Entry, Turn, Vectors
from peers import python_of
from report import Spread, circumstances, cores, facts, noise_warning, table
from workload import LENGTHS, Workload, natural

SUBJECT = "carpool"
ENTRIES = (
    "carpool:bfloat16",
    "carpool:float32",
    "carpool:int8",
    "sentence-transformers:bfloat16:32",
    "sentence-transformers:float32:32",
    "sentence-transformers-openvino:bfloat16:32",
    "sentence-transformers-openvino:float32:32",
    "sentence-transformers-onnx:float32:32",
    "infinity-emb:float32:32",
)
SETTLE_SECONDS = 0.3  # OpenMP threads spin for a while after their last work


@dataclass(slots=True)
class Standing:
    """A contestant that takes part, and how it did with texts of one kind; one turn a round."""

    contestant: Contestant
    vectors: Vectors
    cosine: float = 0.0  # the lowest of all texts, to the reference
    turns: list[Turn] = field(default_factory=list)

    @property
    def entry(self) -> Entry:
        return self.contestant.entry

    @property
    def cores_busy(self) -> float:
        """With its own work; the median turn's."""
        return Spread.of(turn.cpu_seconds / turn.seconds for turn in self.turns).median

    @property
    def cores_busy_elsewhere(self) -> float:
        return Spread.of(turn.others_cpu_seconds / turn.seconds for turn in self.turns).median

    def rates(self, amount: int) -> Spread:
        """`amount` of something a second."""
        return Spread.of(amount / turn.seconds for turn in self.turns)

    def times_as_fast_as(self, other: Standing) -> Spread:
        pairs = zip(self.turns, other.turns, strict=True)
        return Spread.of(theirs.seconds / ours.seconds for ours, theirs in pairs)


def main() -> None:
    options = _options()
    model = locate(options.model)
    where = circumstances()  # before there is any load of ours
    records = {}
    with ExitStack() as stack:
        contestants, absent = _enter(options, model, stack)
        for lengths in options.lengths:
            workload = natural(lengths, options.texts, model, options.longest)
            standings = [Standing(one, one.embed(workload.texts)) for one in contestants]
            reference = _check(standings)
            for _ in range(options.rounds):
                for standing in standings:
                    time.sleep(SETTLE_SECONDS)
                    standing.turns.append(standing.contestant.turn())
            print(_markdown(where, lengths, workload, standings, absent, reference), end="\n\n")
            records[lengths] = _record(where, workload, standings, absent)
    if options.json:
        options.json.write_text(json.dumps(records, indent=1))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "entries", nargs="*", type=Entry.parse, metavar="KIND:DTYPE[:BATCH]", help="who takes part"
    )
    parser.add_argument("--model", default="", help="a model folder; by default the bundled MiniLM")
    parser.add_argument(
        "--lengths", nargs="+", default=["mixed"], choices=LENGTHS, help="of the texts (default: mixed)"
    )
    parser.add_argument("--texts", type=int, default=512, help="passages in a turn (default: %(default)s)")
    parser.add_argument("--longest", type=int, default=256, help="most tokens in one (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each (default: %(default)s)")
    parser.add_argument(
        "--python", action="append", default=[], metavar="KIND=FILE", help="whose Python runs a kind"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every measurement there")
    options = parser.parse_args()
    options.entries = options.entries or [Entry.parse(text) for text in ENTRIES]
    return options


def _enter(
    options: argparse.Namespace, model: Path, stack: ExitStack
) -> tuple[list[Contestant], dict[Entry, str]]:
    """Start everyone, one after the other."""
    pythons = dict(pair.split("=", 1) for pair in options.python)
    contestants, absent = [], {}
    for entry in options.entries:
        python = pythons.get(entry.kind) or python_of(entry.kind)
        try:
            contestant = stack.enter_context(closing(Contestant(entry, str(model), cores(), python)))
        except RuntimeError as error:
            if entry.kind == SUBJECT:
                raise
            absent[entry] = str(error)
            continue
        if contestant.absent:
            absent[entry] = contestant.absent
        else:
            contestants.append(contestant)
    return contestants, absent


def _check(standings: Sequence[Standing]) -> Standing:
    """All must mean the same vectors. Returns whom they were compared with: a float32 peer where there is one."""
    if not standings:
        sys.exit("Nobody takes part.")
    reference = max(standings, key=lambda one: (one.entry.dtype == "float32", one.entry.kind != SUBJECT))
    for standing in standings:
        who = str(standing.entry)
        standing.cosine = agreed_cosine(who, standing.entry.dtype, standing.vectors, reference.vectors)
    return reference


def _best_peers(standings: Iterable[Standing]) -> list[Standing]:
    """Of each peer and dtype the entry with the highest median rate."""
    best: dict[tuple[str, str], Standing] = {}
    for standing in standings:
        name = (standing.entry.kind, standing.entry.dtype)
        if standing.entry.kind != SUBJECT and (
            name not in best or standing.rates(1).median > best[name].rates(1).median
        ):
            best[name] = standing
    return list(best.values())


def _markdown(
    where: dict[str, str],
    lengths: str,
    workload: Workload,
    standings: Sequence[Standing],
    absent: dict[Entry, str],
    reference: Standing,
) -> str:
    rates: list[tuple[str, ...]] = [
        (
            str(standing.entry),
            standing.rates(workload.total_tokens).text(),
            standing.rates(len(workload.texts)).text(),
            f"{standing.cores_busy:.2f}",
            f"{standing.cores_busy_elsewhere:.2f}",
            f"{standing.cosine:.6f}",
        )
        for standing in standings
    ]
    peers = _best_peers(standings)
    ours = [standing for standing in standings if standing.entry.kind == SUBJECT]
    ratios = [
        (str(peer.entry), *(standing.times_as_fast_as(peer).text(2) for standing in ours)) for peer in peers
    ]
    blocks = [
        f"### Offline, {lengths} texts, {len(standings[0].turns)} rounds of turns",
        facts({**where, "versions": _versions(standings), "texts": str(workload)}),
        f"Rates, least – median – most; cosines are to {reference.entry}:",
        table(
            ("contestant", "tokens/s", "texts/s", "cores busy", "elsewhere", "lowest cosine"),
            [*rates, *((str(entry), f"absent: {why}") for entry, why in absent.items())],
        ),
    ]
    if peers:
        blocks += [
            "How many times as fast as each peer at its best batch size above, by rounds, least – median – most:",
            table(("as fast as", *(str(standing.entry) for standing in ours)), ratios),
        ]
    blocks += noise_warning(max(standing.cores_busy_elsewhere for standing in standings))
    return "\n\n".join(blocks)


def _versions(standings: Iterable[Standing]) -> str:
    """Each contestant's own, as they may live in different environments."""
    kinds = {standing.entry.kind: standing.contestant.versions for standing in standings}
    return "; ".join(
        f"{kind} ran {', '.join(f'{name} {version}' for name, version in versions.items())}"
        for kind, versions in kinds.items()
    )


def _record(
    where: dict[str, str], workload: Workload, standings: Iterable[Standing], absent: dict[Entry, str]
) -> dict[str, object]:
    """All that was measured, for a machine to read."""
    return {
        "circumstances": where,
        "texts": len(workload.texts),
        "tokens": workload.total_tokens,
        "contestants": [
            {
                **asdict(standing.entry),
                "versions": dict(standing.contestant.versions),
                "lowest_cosine": standing.cosine,
                "turns": [asdict(turn) for turn in standing.turns],
            }
            for standing in standings
        ],
        "absent": [{**asdict(entry), "why": why} for entry, why in absent.items()],
    }


if __name__ == "__main__":
    main()
