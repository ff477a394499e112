"""The load test is no package: locust puts its folder on the path, and so must its tests."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "loadtest"))
