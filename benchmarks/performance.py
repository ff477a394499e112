"""Runs the whole suite and writes docs/performance.md: tables and plots, with machine, commit and commands.

    ./dev bench peers && ./dev bench performance
    ./dev bench performance --quick
    ./dev bench performance --only kernels --quick

Each part is a benchmark of its own, and what it prints goes between its markers; its measurements stay in
.bench/results/, from which the plots are drawn. A part that fails leaves what was there, and the status is 1.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

# ./dev sets PYTHONSAFEPATH, which leaves a script's own folder out.
sys.path.extend(str(Path(__file__).resolve().parent.parent / room) for room in ("benchmarks", "loadtest"))

from peers import FOLDER, PLOTS, python_of
from report import ROOT

PAGE = ROOT / "docs" / "performance.md"
RESULTS = FOLDER / "results"
# A part: the arguments of ./dev bench, in full and quick.
PARTS: Mapping[str, tuple[str, str]] = {
    "kernels": ("cpu_kernels --rounds 9", "cpu_kernels --rounds 3"),
    "engine": ("engine --rounds 5 --texts 256", "engine --rounds 2 --texts 128"),
    "compare": (
        "compare --rounds 5 --texts 192 --lengths short mixed long",
        "compare --rounds 2 --texts 256 --lengths mixed",
    ),
    "http": ("http_load --rounds 5 --texts 256", "http_load --rounds 2 --texts 128 --starts 1"),
    "http-short": (
        "http_load --rounds 3 --texts 512 --lengths short --starts 1",
        "http_load --rounds 1 --texts 256 --lengths short --starts 1",
    ),
    "http-long": (
        "http_load --rounds 3 --texts 128 --lengths long --starts 1",
        "http_load --rounds 1 --texts 64 --lengths long --starts 1",
    ),
    "overload": ("overload --rounds 1", "overload --rounds 1 --seconds 10 --shares 0.5 0.9 2"),
    "rerank": ("rerank --rounds 3 --requests 16", "rerank --rounds 1 --requests 8"),
}


def main() -> None:
    options = _options()
    RESULTS.mkdir(parents=True, exist_ok=True)
    failed = [name for name in options.only or PARTS if not _run(name, options.quick)]
    if failed:
        sys.exit(f"Not measured: {', '.join(failed)}; their part of {PAGE.name} is as it was.")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds and texts")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="these parts")
    return parser.parse_args()


def _run(name: str, quick: bool) -> bool:
    """One part, and its text put into the page; whether it went well."""
    script, *arguments = PARTS[name][quick].split()
    command = [sys.executable, str(ROOT / "benchmarks" / f"{script}.py"), *arguments]
    print(f"{name}: {shlex.join([script, *arguments])}", file=sys.stderr, flush=True)
    began = time.monotonic()
    log = RESULTS / f"{name}.log"
    with log.open("w") as errors:
        done = subprocess.run(
            [*command, "--json", str(RESULTS / f"{name}.json")],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            check=False,
        )
    print(f"{name}: {time.monotonic() - began:.0f} s, status {done.returncode}", file=sys.stderr, flush=True)
    if done.returncode:
        print("".join(log.read_text().splitlines(keepends=True)[-3:]), file=sys.stderr)
        return False
    text = done.stdout.replace(f"{ROOT}/", "").strip()
    if (figure := _drawn(name)) is not None:
        text += f"\n\n![{name}]({figure.name})"
    PAGE.write_text(placed(PAGE.read_text(), name, text))
    return True


def placed(page: str, name: str, text: str) -> str:
    """The page with `text` between the markers of this name. Raises ValueError if it has none."""
    begin, end = f"<!-- measured: {name} -->", f"<!-- end: {name} -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if not pattern.search(page):
        raise ValueError(f"no place for {name} in the page: {begin} … {end}")
    return pattern.sub(lambda _: f"{begin}\n{text.strip()}\n{end}", page)


def _drawn(name: str) -> Path | None:
    """Its plot, if it has one, drawn by the Python that has matplotlib; says so where that is missing."""
    command = [python_of(PLOTS), "-P", str(ROOT / "benchmarks" / "plots.py"), str(RESULTS), str(PAGE.parent)]
    if subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode:
        print("No plots were drawn: ./dev bench peers plots installs matplotlib.", file=sys.stderr)
        return None
    figure = PAGE.with_name(f"performance-{name}.png")
    return figure if figure.is_file() else None


if __name__ == "__main__":
    main()
