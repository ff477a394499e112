"""What is shipped: wheel and source archive hold the rooms, whole, and nothing else; and they work elsewhere."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tree import MODULES, ROOMS, ROOT, here, imports

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
JUNK = (".git", ".venv", "*.so", ".*_cache", ".hypothesis", "__pycache__", "*.egg-info", "build", "dist")


@pytest.fixture(scope="session")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with both archives; the wheel is made from the source archive, as an index's users get it."""
    # A copy, links as links: building leaves files in the tree, and a stale list of them would hide a loss.
    source = tmp_path_factory.mktemp("carpool") / "source"
    shutil.copytree(ROOT, source, symlinks=True, ignore=shutil.ignore_patterns(*JUNK))
    out = source.parent / "dist"
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source))
    return out


@pytest.fixture(scope="session")
def wheel(dist: Path) -> Path:
    [path] = dist.glob("*.whl")
    return path


@pytest.fixture(scope="session")
def elsewhere(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with carpool installed, far from the repository."""
    target = tmp_path_factory.mktemp("elsewhere")
    run(
        sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)
    )
    return target


def run(*command: str, path: Path | None = None, cwd: Path | None = None) -> str:
    """What the command prints; `path` is where Python finds carpool."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    env["PYTHONSAFEPATH"] = "1"
    if path:
        env["PYTHONPATH"] = str(path)
    done = subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def shipped() -> set[str]:
    """All that the package holds, by the names it has in the package."""
    own = {"carpool/__init__.py", "carpool/__main__.py", "carpool/py.typed"}
    rooms = {path for room in ROOMS for path in (ROOT / room).rglob("*") if path.is_file()}
    made = {path for path in rooms if "__pycache__" in path.parts or path.suffix == ".so"}
    return own | {f"carpool/{path.relative_to(ROOT)}" for path in rooms - made}


def test_the_wheel_holds_the_rooms_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {info.filename for info in archive.infolist()}

    native = {"carpool/kernels/_native.so"} if shutil.which("g++") else set()
    assert {name for name in names if ".dist-info/" not in name} == shipped() | native
    assert "-py3-none-linux_" in wheel.name


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_the_wheels_library_is_that_of_its_sources(elsewhere: Path, tmp_path: Path) -> None:
    """Else it would not be called, here or anywhere, and everyone would be served more slowly."""
    code = "import carpool.kernels.native as module; print(module.__file__, module.library)"
    printed = run(sys.executable, "-c", code, path=elsewhere, cwd=tmp_path)
    assert printed.startswith(str(elsewhere))
    assert "CDLL" in printed


def test_the_source_archive_holds_the_rooms_and_nothing_else(dist: Path) -> None:
    [path] = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        members = [member for member in archive.getmembers() if not member.isdir()]
    # Each name begins with a folder carpool-VERSION.
    names = {member.name.partition("/")[2] for member in members}
    package = {name.removeprefix("src/") for name in names if name.startswith("src/carpool/")}

    assert all(member.isfile() for member in members), "links lead nowhere once unpacked"
    assert package == shipped()
    assert {name for name in names if not name.startswith("src/")} == {
        "LICENSE",
        "MANIFEST.in",
        "PKG-INFO",
        "README.md",
        "pyproject.toml",
        "setup.cfg",
        "setup.py",
    }


def test_the_metadata_tells_licence_and_version(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        [metadata] = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        [_] = (name for name in archive.namelist() if name.endswith(".dist-info/licenses/LICENSE"))
        text = archive.read(metadata).decode()

    assert "\nLicense-Expression: Apache-2.0\n" in text
    assert f"\nVersion: {version()}\n" in text


def version() -> str:
    return run(sys.executable, "-c", "import carpool; print(carpool.__version__)", path=ROOT / "src").strip()


def test_an_installed_carpool_imports(elsewhere: Path, tmp_path: Path) -> None:
    code = "import carpool.engine.scheduler as module; print(module.__file__)"

    printed = run(sys.executable, "-c", code, path=elsewhere, cwd=tmp_path)

    assert Path(printed.strip()) == elsewhere / "carpool" / "engine" / "scheduler.py"


@pytest.mark.parametrize("flag", ["--version", "--help"])
def test_the_console_script_runs(elsewhere: Path, tmp_path: Path, flag: str) -> None:
    printed = run(str(elsewhere / "bin" / "carpool"), flag, path=elsewhere, cwd=tmp_path)

    assert (version() if flag == "--version" else "carpool serve") in printed


def test_the_module_runs_as_the_console_script_does(elsewhere: Path, tmp_path: Path) -> None:
    printed = run(sys.executable, "-m", "carpool", "--version", path=elsewhere, cwd=tmp_path)

    assert printed == f"carpool {version()}\n"


def test_every_module_has_one_identity() -> None:
    """A room imported by its bare name would be a second copy of every class in it."""
    code = f"""
import sys
from carpool import LLM, PoolingParams
import carpool.server.app
print(*({set(ROOMS)} & set(sys.modules)))
"""
    assert run(sys.executable, "-c", code, path=ROOT / "src", cwd=ROOT).strip() == ""


def test_importing_the_package_does_not_wait_for_torch() -> None:
    code = (
        "import sys, carpool; print('torch' in sys.modules, carpool.PoolingParams());"
        "print([name for name in carpool.__all__ if not hasattr(carpool, name)])"
    )

    printed = run(sys.executable, "-c", code, path=ROOT / "src")

    assert printed.startswith("False PoolingParams(")
    assert printed.endswith("\n[]\n")


def test_every_import_is_declared() -> None:
    """Nothing is imported that only happens to be installed, because another package asked for it."""
    lines = PROJECT["dependencies"] + [line for name in EXTRAS if name != "dev" for line in EXTRAS[name]]
    declared = {canonicalize_name(Requirement(line).name) for line in lines}
    # The second: what may not be installed here.
    providers = dict(packages_distributions()) | {
        "cupy": ["cupy-cuda12x"],
        "opentelemetry": ["opentelemetry-sdk"],
    }
    for path in MODULES:
        for package in {name.split(".")[0] for name in imports(path)} - sys.stdlib_module_names - {"carpool"}:
            names = {canonicalize_name(name) for name in providers.get(package, [package])}
            assert names & declared, f"{here(path)} imports {package}"


@pytest.mark.parametrize("line", [*PROJECT["dependencies"], *EXTRAS["demo"], *EXTRAS["dev"]])
def test_what_is_tested_is_pinned_within_bounds(line: str) -> None:
    text = (ROOT / "requirements" / "constraints.txt").read_text(encoding="utf-8")
    pins = {
        canonicalize_name(name): pin for name, pin in re.findall(r"^([\w.-]+)==(\S+)$", text, re.MULTILINE)
    }
    requirement = Requirement(line)

    assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)])
