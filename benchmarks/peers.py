"""Peers: whom carpool is compared with, each in an environment of its own under .bench/, made by

    ./dev bench peers                       # all of them, and the one that draws plots; minutes each
    ./dev bench peers infinity-emb --anew

and a table of what could be had, and of what not and why. torch comes first, in the version that carpool is tested
with, so that no peer brings another one and all multiply with the same oneDNN.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

# ./dev sets PYTHONSAFEPATH, which leaves a script's own folder out.
sys.path.extend(str(Path(__file__).resolve().parent.parent / room) for room in ("benchmarks", "loadtest"))

from report import ROOT, table

FOLDER = ROOT / ".bench"
PLOTS = "plots"  # the environment that has matplotlib


@dataclass(frozen=True, slots=True)
class Peer:
    """What pip is asked for; what it must leave behind; and what to say if it can be imported."""

    requirements: tuple[str, ...]
    module: str
    torch: bool = True
    without: tuple[str, ...] = ()


PEERS = {
    "sentence-transformers": Peer(("sentence-transformers>=6",), "sentence_transformers"),
    # optimum asks for torchvision, which models of text have no use for and whose other builds refuse torch's CPU one.
    "sentence-transformers-openvino": Peer(
        ("sentence-transformers[openvino]>=6",), "optimum.intel.openvino", without=("torchvision",)
    ),
    "sentence-transformers-onnx": Peer(
        ("sentence-transformers[onnx]",), "optimum.onnxruntime", without=("torchvision",)
    ),
    "infinity-emb": Peer(
        ("infinity-emb[torch]", "optimum<2", "transformers<4.49"), "infinity_emb", without=("torchvision",)
    ),
    PLOTS: Peer(("matplotlib>=3.9",), "matplotlib", torch=False),
}


def python_of(kind: str) -> str:
    """The Python that has this peer: its own environment's, else the one that runs now."""
    own = FOLDER / kind / "bin" / "python"
    return str(own) if own.exists() else sys.executable


def main() -> None:
    options = _options()
    rows = []
    for name in options.peers or PEERS:
        if options.anew:
            shutil.rmtree(FOLDER / name, ignore_errors=True)
        rows.append((name, _made(name, PEERS[name])))
        print(f"{name}: {rows[-1][1]}", file=sys.stderr)
    print(table(("peer", "there is"), rows))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("peers", nargs="*", choices=[*PEERS, []], metavar="PEER", help=", ".join(PEERS))
    parser.add_argument("--anew", action="store_true", help="remove what there is first")
    return parser.parse_args()


def _made(name: str, peer: Peer) -> str:
    """Make the environment, or bring it up to date; which version there is, or why none."""
    python = FOLDER / name / "bin" / "python"
    if not python.exists():
        FOLDER.mkdir(exist_ok=True)
        subprocess.run([sys.executable, "-m", "venv", str(FOLDER / name)], check=True)
    torch = [f"torch=={_tested_torch()}"] if peer.torch else []
    for asked in filter(None, (torch, [*torch, *peer.requirements])):
        if why := _failed(python, "-m", "pip", "install", *asked):
            return f"absent: {why}"
    for unwanted in peer.without:
        _failed(python, "-m", "pip", "uninstall", "--yes", unwanted)
    if why := _failed(python, "-P", "-c", f"import {peer.module}"):
        return f"absent: {why}"
    return _version(python, peer.requirements[0])


def _failed(python: Path, *arguments: str) -> str:
    """Run it; its last words if it failed."""
    done = subprocess.run([str(python), *arguments], capture_output=True, text=True, check=False)
    if not done.returncode:
        return ""
    return (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]


def _version(python: Path, requirement: str) -> str:
    name = re.split(r"[\[<>=]", requirement)[0]
    shown = subprocess.check_output([str(python), "-m", "pip", "show", name], text=True)
    return f"{name} {re.search(r'^Version: (.*)$', shown, re.MULTILINE)[1]}"  # type: ignore[index]


def _tested_torch() -> str:
    """From requirements/constraints.txt."""
    pins = (ROOT / "requirements" / "constraints.txt").read_text()
    found = re.search(r"^torch==(\S+)$", pins, re.MULTILINE)
    assert found, "torch is pinned"
    return found[1]


if __name__ == "__main__":
    main()
