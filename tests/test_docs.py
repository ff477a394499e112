"""The docs and the code say the same."""

from __future__ import annotations

import re

import pytest

from carpool.engine import errors as engine_errors
from carpool.engine.stats import CacheStats, ResultStats
from carpool.server import errors as server_errors
from carpool.server.app import ROUTES
from carpool.server.metrics import Metrics
from carpool.server.options import OPTIONS
from fakes import FakeEngine
from tree import ROOT, here

DOCS = sorted([*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "CHANGELOG.md"])
API = (ROOT / "docs/api.md").read_text()


def test_every_route_is_documented() -> None:
    missing = [route.path for route in ROUTES if f"`{route.path}`" not in API]
    assert not missing


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_every_option_is_documented(name: str) -> None:
    assert f"| `--{name.replace('_', '-')}` |" in (ROOT / "docs/configuration.md").read_text()


def test_every_metric_is_documented() -> None:
    text = (ROOT / "docs/operations.md").read_text()
    engine = FakeEngine()
    engine.cache_stats = CacheStats(0, 0, 1, 0)
    engine.result_stats = ResultStats(0, 0, 0, 1)
    exposed = Metrics("m", engine).text(()).decode()  # type: ignore[arg-type]  # the same face
    names = set(re.findall(r"^# TYPE (carpool_\w+)", exposed, re.MULTILINE))
    assert len(names) >= 13
    assert not [name for name in names if f"`{name}" not in text]


def test_every_error_type_is_documented() -> None:
    for status, kind in set(server_errors.STATUS.values()):
        assert f"| {status} | `{kind}` |" in API


def test_the_generated_parts_are_up_to_date() -> None:
    namespace: dict[str, object] = {"__file__": str(ROOT / "docs/generate.py"), "__name__": "generate"}
    exec(compile((ROOT / "docs/generate.py").read_text(), "docs/generate.py", "exec"), namespace)
    generate = namespace["generate"]
    assert callable(generate)
    for path in (ROOT / "docs").glob("*.md"):
        text = path.read_text()
        assert generate(text) == text, f"{path.name} is out of date: run ./dev docs"


@pytest.mark.parametrize("path", DOCS, ids=here)
def test_links_lead_somewhere(path: object) -> None:
    assert isinstance(path, type(ROOT))
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", path.read_text()):
        if not target.startswith(("http:", "https:")):
            assert (path.parent / target).exists(), f"{here(path)} links to {target}"


def test_the_engines_family_is_drawn_in_full() -> None:
    """The tree in the docstring of engine/errors.py has every class of the file."""
    classes = [name for name, value in vars(engine_errors).items() if isinstance(value, type)]
    assert engine_errors.__doc__
    assert not [name for name in classes if name not in engine_errors.__doc__]
