"""Parity: every family of models beside its float32 reference, as the table of docs/models.md.

    ./dev bench parity                    all families, on small random checkpoints in their published layout
    ./dev bench parity --write            the same, into docs/models.md
    ./dev bench parity --only nomic       those whose line has the word in it
    ./dev bench parity --model FOLDER     a checkpoint of yours beside transformers (and sentence-transformers)

A difference is the largest of any component, relative to the largest component or 1.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

# ./dev sets PYTHONSAFEPATH, which leaves a script's own folder out.
sys.path.extend(
    str(Path(__file__).resolve().parent.parent / room) for room in ("benchmarks", "tests/support")
)

import numpy as np
import torch

from carpool.engine.errors import ConfigError
from carpool.engine.llm import LLM
from report import ROOT, table
from zoo import MEMBERS, Member
from zoo.folder import compare_folder
from zoo.measure import TOLERANCE, Line, measure

HEADER = ("shaped like", "class", "tasks", "runs", "attention", "pooling", "alone", "in company", "notes")
BEGIN, END = "<!-- parity: begin (./dev bench parity --write) -->", "<!-- parity: end -->"
PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"quantization": "int8"},
}
PAGE = ROOT / "docs" / "models.md"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="a word that the line must have")
    parser.add_argument("--model", type=Path, help="compare this folder instead")
    parser.add_argument("--write", action="store_true", help="put the table into docs/models.md")
    args = parser.parse_args()
    if args.only and args.write:
        parser.error("--write takes all families: with --only it would leave the others out of the page")
    if args.only and not any(_has(member, args.only) for member in MEMBERS):
        parser.error(f"no family's line has {args.only!r} in it")
    torch.set_num_threads(1)
    if args.model:
        failed = _folder(args.model)
    else:
        lines = list(_measured(MEMBERS, args.only))
        text = table(HEADER, map(cells, lines)) + "\n\n" + _precision()
        print(text)
        if args.write:
            _write(text)
        failed = any(max(line.alone, line.company) > TOLERANCE for line in lines)
    sys.exit(failed)


def cells(line: Line) -> tuple[str, ...]:
    """The cells of a line of the table."""
    return (
        line.name,
        line.family,
        ", ".join(line.tasks),
        line.packing,
        line.attention,
        line.pooling,
        number(line.alone),
        number(line.company),
        line.note,
    )


def number(value: float) -> str:
    """3e-7 and not 3.14e-07: more digits than that differ from machine to machine."""
    return re.sub(r"e-0*(\d)", r"e-\1", f"{value:.0e}") if value else "0"


def _has(member: Member, word: str) -> bool:
    return word.lower() in f"{member.name} {member.family}".lower()


def _measured(members: Iterable[Member], only: str) -> Iterable[Line]:
    for member in members:
        if not _has(member, only):
            continue
        with tempfile.TemporaryDirectory() as folder:
            line = measure(member, Path(folder))
        print(" | ".join(cells(line)), file=sys.stderr, flush=True)
        yield line


def _precision() -> str:
    """all-MiniLM-L6-v2's real weights in every number format, beside sentence-transformers in float32."""
    golden = np.load(ROOT / "tests" / "golden" / "minilm.npz")
    truths, rows = golden["vectors"].astype(np.float64), []
    for name, options in PRECISIONS.items():
        with closing(LLM(**options)) as llm:
            outputs = llm.embed(golden["texts"].tolist(), truncate_prompt_tokens=-1, use_tqdm=False)
        vectors = np.array([output.outputs.embedding for output in outputs])
        cosines = (vectors * truths).sum(axis=1)
        rows.append((name, f"{cosines.min():.5f}", number(float(np.abs(vectors - truths).max()))))
    header = ("all-MiniLM-L6-v2, real weights", "least cosine to float32", "largest difference")
    return table(header, rows)


def _folder(folder: Path) -> bool:
    try:
        rows = list(compare_folder(folder))
    except ConfigError as refused:
        raise SystemExit(str(refused)) from None
    print(table(("beside", "alone", "in company"), [(what, number(a), number(b)) for what, a, b in rows]))
    return any(max(a, b) > TOLERANCE for _, a, b in rows)


def _write(text: str) -> None:
    page = PAGE.read_text(encoding="utf-8")
    before, found, rest = page.partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not (found and closed):
        raise SystemExit(f"{PAGE} has no lines {BEGIN} and {END} to write between.")
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
