"""The benchmarks are scripts that put their folders on the path, and so must their tests."""

import sys
from pathlib import Path

sys.path.extend(str(Path(__file__).resolve().parents[2] / room) for room in ("benchmarks", "loadtest"))
