"""The Dockerfile agrees with the tree, as far as can be seen without a Docker daemon.

The stages are replayed on folders: COPY copies what .dockerignore lets through, and the commands that need neither
root nor the network are run.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tree import ROOMS, ROOT

INSTRUCTIONS = {"FROM", "ARG", "ENV", "WORKDIR", "COPY", "RUN", "USER", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT"}


@dataclass
class Stage:
    base: str
    name: str | None
    steps: list[tuple[str, str]] = field(default_factory=list)

    def all(self, instruction: str) -> list[str]:
        return [arguments for kind, arguments in self.steps if kind == instruction]

    def one(self, instruction: str) -> str:
        [arguments] = self.all(instruction)
        return arguments


def stages() -> list[Stage]:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", "")
    found: list[Stage] = []
    for line in filter(None, text.splitlines()):
        instruction, _, arguments = line.partition(" ")
        assert instruction in INSTRUCTIONS, line
        if instruction == "FROM":
            base, _, name = arguments.partition(" AS ")
            found.append(Stage(base, name or None))
        elif found:
            found[-1].steps.append((instruction, arguments.strip()))
    return found


BUILD, FINAL = stages()


def sources_of(copy: str) -> list[str]:
    """What a COPY from the repository names, without where it goes."""
    return shlex.split(copy)[:-1]


def is_ignored(name: str) -> bool:
    """Whether .dockerignore keeps a top-level name out; the last line that fits decides."""
    ignored = False
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        pattern = line.removeprefix("!")
        if line and not line.startswith("#") and fnmatch(name, pattern):
            ignored = not line.startswith("!")
    return ignored


@pytest.fixture(scope="module")
def build_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first stage's folder after its COPY lines."""
    folder = tmp_path_factory.mktemp("build")
    for copy in BUILD.all("COPY"):
        *names, target = shlex.split(copy)
        for name in names:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, folder / target, symlinks=True)
            else:
                shutil.copy(ROOT / name, folder / target)
    return folder


def test_every_source_exists_and_is_not_ignored() -> None:
    copies = [
        copy for stage in (BUILD, FINAL) for copy in stage.all("COPY") if not copy.startswith("--from=")
    ]
    for copy in copies:
        for name in sources_of(copy):
            assert (ROOT / name).exists(), name
            assert not is_ignored(name.split("/")[0]), name


def test_what_is_not_needed_stays_out() -> None:
    for name in (".git", ".venv", "benchmarks", "docs", "loadtest", "tests"):
        assert is_ignored(name)


def test_the_links_survive_and_lead_to_the_rooms(build_folder: Path) -> None:
    for room in ROOMS:
        link = build_folder / "src" / "carpool" / room
        assert link.is_symlink()
        assert link.resolve() == build_folder / room
        assert {path.name for path in link.iterdir()} == {path.name for path in (ROOT / room).iterdir()}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, set()),
        ({"CUDA": "12"}, {"cupy-cuda12x"}),
        ({"CUDA": "13"}, {"cupy-cuda13x"}),
    ],
)
def test_requirements_are_read_from_the_project(
    build_folder: Path, arguments: dict[str, str], expected: set[str]
) -> None:
    [command] = (run for run in BUILD.all("RUN") if "requirements.txt" in run)

    given = {"CUDA": "", **arguments}
    subprocess.run(["sh", "-c", command], check=True, cwd=build_folder, env={"PATH": _path(), **given})

    lines = (build_folder / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert any(line.startswith("torch>=") for line in lines)
    names = {line.partition(">=")[0] for line in lines}
    assert names & {"cupy-cuda12x", "cupy-cuda13x"} == expected


@pytest.mark.parametrize(
    ("asked", "torch", "passes"),
    [
        ("", "None", True),
        ("", "'13.0'", True),
        ("13", "'13.0'", True),
        ("12", "'13.0'", False),
        ("12", "None", False),
    ],
)
def test_a_torch_for_another_cuda_than_was_asked_for_ends_the_build(
    tmp_path: Path, asked: str, torch: str, passes: bool
) -> None:
    (tmp_path / "torch.py").write_text(f"__version__ = '2.x'\nclass version:\n    cuda = {torch}\n")
    [command] = (run for run in FINAL.all("RUN") if "torch.version.cuda" in run)

    environment = {"PATH": _path(), "PYTHONPATH": str(tmp_path), "CUDA": asked}
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, env=environment)

    assert (done.returncode == 0) == passes
    assert ("TORCH_INDEX_URL" in done.stderr) != passes


def _path() -> str:
    """A PATH on which `python` is the one that runs the tests."""
    return f"{Path(sys.executable).parent}:/usr/bin:/bin"


def test_the_final_stage_takes_only_what_the_first_one_made() -> None:
    """Nothing of the repository but the pins."""
    from_repository = [copy for copy in FINAL.all("COPY") if not copy.startswith("--from=build ")]
    from_build = [shlex.split(copy)[1] for copy in FINAL.all("COPY") if copy.startswith("--from=build ")]

    assert [sources_of(copy) for copy in from_repository] == [["requirements/constraints.txt"]]
    assert from_build == ["/build/requirements.txt", "/build/wheels"]
    assert BUILD.name == "build"
    assert BUILD.one("WORKDIR") == "/build"


def test_every_install_from_an_index_is_pinned() -> None:
    installs = [run for run in FINAL.all("RUN") if "pip install" in run and ".whl" not in run]

    assert installs
    assert all("-c /install/constraints.txt" in run for run in installs)


def test_it_runs_as_nobody_special_and_says_how_it_is() -> None:
    assert FINAL.one("USER").isdecimal()
    assert int(FINAL.one("USER")) > 0
    assert FINAL.steps.index(("USER", FINAL.one("USER"))) > max(
        index for index, (kind, _) in enumerate(FINAL.steps) if kind == "RUN"
    )
    assert json.loads(FINAL.one("ENTRYPOINT")) == ["carpool", "serve"], (
        "an option here would hide its variable"
    )
    assert FINAL.one("EXPOSE") == "8000"
    assert "PYTHONSAFEPATH=1" in FINAL.one("ENV")
    check = json.loads(FINAL.one("HEALTHCHECK").partition(" CMD ")[2])
    assert check[0] == "python"
    assert "/health/live" in check[2], "the only one that is not about what a restart would not help"


@pytest.mark.parametrize(("status", "well"), [(200, True), (503, False)])
def test_the_health_check_asks_the_server_itself(status: int, well: bool) -> None:
    """And no proxy, whatever the environment says of one."""
    asked = []

    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Not to the tests' output."""

    command = json.loads(FINAL.one("HEALTHCHECK").partition(" CMD ")[2])
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever).start()
        environment = {
            "PATH": _path(),
            "CARPOOL_PORT": str(server.server_port),
            "http_proxy": "http://127.0.0.1:9",
        }
        done = subprocess.run(command, capture_output=True, env=environment)
        server.shutdown()

    assert (done.returncode == 0) == well
    assert asked == ["/health/live"]
