"""The house rules, checked: who may import whom, and what may not exist."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tree import MODULES, ROOMS, ROOT, here, imports, packages

MAY_IMPORT = {"server": {"server", "engine"}, "engine": {"engine", "kernels"}, "kernels": {"kernels"}}
# All that the server sees of the engine.
ENGINE_FRONT = {
    "async_engine",
    "changes",
    "config",
    "errors",
    "fair_queue",
    "gate",
    "model_info",
    "outputs",
    "params",
    "parcel",
    "reference_options",
    "remote",
    "stats",
    "terms",
}

# Logic that can be read like a card game: no tensors, no threads, no clock; what time it is comes as an argument.
PURE = (
    "batch",
    "cache.blocks",
    "cache.hashing",
    "cache.prefixes",
    "config",
    "errors",
    "fair_queue",
    "outputs",
    "params",
    "scheduler",
    "sequence",
    "stats",
)
IMPURE = {
    "aiohttp",
    "asyncio",
    "concurrent",
    "cupy",
    "logging",
    "numpy",
    "structlog",
    "threading",
    "time",
    "torch",
}

# A file is dissolved in one of these at most ...
SOLVENTS = {
    "asyncio": "asyncio",
    "concurrent": "threads",
    "queue": "threads",
    "threading": "threads",
    "torch": "torch",
    "transformers": "torch",
    "cupy": "cupy",
}
# ... but for those whose whole purpose is to join two.
BRIDGES = {
    "engine/loop_thread.py": {"asyncio", "threads"},  # a loop in a thread, for callers who have none
    "kernels/launch.py": {"cupy", "torch"},  # torch's pointers and stream, as CuPy takes them
}


def each(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=here)


SERVER = [path for path in MODULES if here(path).startswith("server/")]


@each(MODULES)
def test_dependencies_point_down(path: Path) -> None:
    room = here(path).split("/")[0]
    for name in imports(path):
        head, _, rest = name.partition(".")
        assert head not in ROOMS, f"bare `import {name}`: write carpool.{name}"
        # What is no room is a public name of the package itself.
        if head == "carpool" and (other := rest.split(".")[0]) in ROOMS:
            assert other in MAY_IMPORT[room], f"{room} imports {name}"


@each(SERVER)
def test_the_server_sees_only_the_front_of_the_engine(path: Path) -> None:
    for name in imports(path):
        match name.split("."):
            case ["carpool", "engine", file, *_]:
                assert file in ENGINE_FRONT, f"the server reaches into {name}"


@each(SERVER)
def test_the_server_knows_no_tensors(path: Path) -> None:
    assert not packages(path) & {"cupy", "torch", "transformers"}


@each(MODULES)
def test_one_solvent_per_file(path: Path) -> None:
    found = {SOLVENTS[package] for package in packages(path) & SOLVENTS.keys()}
    assert len(found) <= 1 or found == BRIDGES.get(here(path)), f"dissolved in {sorted(found)}"


@each([path for path in MODULES if here(path) != "kernels/launch.py"])
def test_only_the_launcher_imports_cupy(path: Path) -> None:
    assert "cupy" not in packages(path)


@pytest.mark.parametrize("name", PURE)
def test_pure_files_name_nothing_impure(name: str) -> None:
    assert not packages(ROOT / "engine" / f"{name.replace('.', '/')}.py") & IMPURE


@pytest.mark.parametrize("name", PURE)
def test_pure_files_load_without_the_impure(name: str) -> None:
    """What they import is as pure as they are: they load with all of that made unimportable."""
    code = f"import sys; sys.modules.update(dict.fromkeys({sorted(IMPURE)})); import carpool.engine.{name}"
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "PYTHONSAFEPATH": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)


@each(sorted((ROOT / "loadtest").rglob("*.py")))
def test_the_load_test_is_a_stranger(path: Path) -> None:
    assert not packages(path) & {"carpool", *ROOMS}


def test_the_kernels_room_imports_nothing_at_its_door() -> None:
    """transformers imports whatever it finds under the name `kernels`; where that is us, it must do no harm."""
    assert not list(imports(ROOT / "kernels" / "__init__.py"))


def test_no_drawer_modules() -> None:
    assert not [path for path in MODULES if path.stem in {"utils", "helpers", "common", "misc"}]


def files_listed() -> set[str]:
    """What docs/architecture.md lists: files as `engine/scheduler`, and folders as `engine/dialects/`."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    listed, room = set(), ""
    for line in text.split("## Files")[1].split("```")[1].strip().splitlines():
        if not line.startswith(" "):
            room, line = line.split(maxsplit=1)
        files = re.split(r" {2,}", line.strip())[0]  # what they are for stands apart
        for word in files.split():
            before, _, names = word.rstrip("}").rpartition("{")
            listed |= {room + before + name for name in names.split(",")}
    return listed


LISTED = files_listed()


@each([path for path in MODULES if not path.stem.startswith("__")])
def test_every_file_has_its_place_in_the_list(path: Path) -> None:
    name = here(path).removesuffix(".py")
    folders = [name[: slash.end()] for slash in re.finditer("/", name)]
    assert LISTED.intersection([name, *folders]), "docs/architecture.md, Files"


def test_the_list_names_nothing_that_is_gone() -> None:
    files = {here(path).removesuffix(".py") for path in MODULES}
    assert not [name for name in LISTED - files if not (name.endswith("/") and (ROOT / name).is_dir())]


@pytest.mark.parametrize("room", ROOMS)
def test_the_package_links_to_the_room(room: str) -> None:
    link = ROOT / "src" / "carpool" / room

    assert link.is_symlink()
    assert link.readlink() == Path("../..") / room, "relative, so that it holds wherever the tree is"
    assert link.resolve() == ROOT / room
