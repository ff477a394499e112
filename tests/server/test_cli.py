"""The `carpool` command from argv to exit status."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

import carpool
from carpool.engine.errors import ConfigError
from carpool.server import cli, logs
from carpool.server.options import OPTIONS


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "set_up", lambda level, format: None)


@pytest.mark.parametrize("flag", ["--version", "-V", "-v"])
def test_the_version_is_told(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([flag], {}) == 0
    assert capsys.readouterr().out == f"carpool {carpool.__version__}\n"


@pytest.mark.parametrize("flag", ["--help", "-h", "--help=all"])
def test_help_names_every_flag(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["serve", flag], {}) == 0
    text = capsys.readouterr().out
    for option in OPTIONS.values():
        assert option.flag in text
        assert option.help in text
    assert "--no-token-id-input" in text
    assert "the command line wins over the environment, and that over the file" in text


def test_without_a_command_the_usage_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([], {}) == 0
    assert "usage: carpool serve" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        (["sreve"], {}, "Unknown command sreve; did you mean serve?"),
        (["serve", "--prot", "1"], {}, "Unknown flag --prot; did you mean --port?"),
        (["serve"], {"CARPOOL_PROT": "1"}, "Unknown environment variable CARPOOL_PROT"),
        (["serve", "--port", "x"], {}, "--port must be an integer, got x."),
        (["serve", "--max-num-seqs", "0"], {}, "--max-num-seqs must be at least 1, got 0."),
        (["serve", "--api-key", " padded"], {}, "--api-key must not begin or end with a blank"),
        (["serve"], {"CARPOOL_API_KEY": '["padded\\n"]'}, "--api-key must not begin or end with a blank"),
        (
            ["serve", "--served-model-name", "a", "my/model"],
            {},
            "--served-model-name took my/model for one of its values, and no MODEL is given.",
        ),
        (["serve", "--pooler-config.poling_type", "CLS"], {}, "did you mean pooling_type?"),
    ],
)
def test_a_mistake_is_status_2_and_one_line(
    arguments: list[str], environment: dict[str, str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(arguments, environment) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_line_beats_environment_beats_file(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("port: 1\nhost: file\nlog_level: debug\nroot-path: /file\n")
    environment = {"CARPOOL_HOST": "environment", "CARPOOL_PORT": "2", "CARPOOL_CONFIG": str(path)}
    config, _ = cli.read_config(["--port", "3"], environment)
    assert (config.port, config.host, config.log_level, config.root_path) == (
        3,
        "environment",
        "debug",
        "/file",
    )
    other = tmp_path / "other.yaml"
    other.write_text("root-path: /other")
    config, _ = cli.read_config(["--config", str(other)], environment)
    assert (config.root_path, config.log_level) == ("/other", "info")


def test_several_names_are_clear_where_the_model_is_given_or_each_has_its_flag() -> None:
    for arguments, environment in (
        (["m", "--served-model-name", "a", "b"], {}),
        (["--served-model-name", "a", "b"], {"CARPOOL_MODEL": "m"}),
        (["--served-model-name", "a", "--served-model-name", "b"], {}),
    ):
        config, _ = cli.read_config(arguments, environment)
        assert config.served_model_name == ("a", "b")


def test_keys_of_the_environment_stand_apart_by_commas_or_in_json() -> None:
    for text, keys in (("a,b", ("a", "b")), (" a , b\n", ("a", "b")), ('["a,b"]', ("a,b",))):
        config, _ = cli.read_config([], {"CARPOOL_API_KEY": text})
        assert config.api_key == keys


@pytest.mark.parametrize(("asked_to_stop", "status"), [(True, 0), (False, 1)])
def test_the_status_says_how_it_ended(
    monkeypatch: pytest.MonkeyPatch, asked_to_stop: bool, status: int
) -> None:
    monkeypatch.setattr(cli, "_run", lambda config: asked_to_stop)
    assert cli.run(["serve"], {}) == status


def test_a_model_that_cannot_be_served_is_status_1_and_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(config: Any) -> bool:
        raise ConfigError("There is no model at /nowhere.")

    monkeypatch.setattr(cli, "_run", fail)
    assert cli.run(["serve", "/nowhere"], {}) == 1
    assert capsys.readouterr().err == "carpool: There is no model at /nowhere.\n"


def test_one_notice_lists_all_that_was_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_run", lambda config: True)
    with capture_logs() as lines:
        cli.run(["serve", "--enforce-eager", "--swap-space", "4", "--task", "embed"], {"CARPOOL_SEED": "1"})
    events = [(line["event"], line.get("options")) for line in lines]
    assert events == [
        ("--task is deprecated; use --runner and --convert.", None),
        ("options without meaning here were ignored", "--enforce-eager, --seed, --swap-space"),
    ]


def test_the_command_runs_without_loading_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; from carpool.server.cli import run; run(['serve', '--help'], {})"
    source = Path(carpool.__file__).resolve().parent.parent
    environment = {**os.environ, "PYTHONPATH": str(source), "PYTHONSAFEPATH": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True)


def test_standard_streams_that_were_closed_are_opened_before_a_socket_takes_their_place() -> None:
    """As by `2>&-`: what libraries print would go to a client."""
    code = (
        "import os, sys\n"
        "from carpool.server import cli\n"
        "sys.argv = ['carpool', '--version']\n"
        "try:\n    cli.main()\n"
        "finally:\n    print('unheard', file=sys.stderr)\n    os.write(9, os.readlink('/proc/self/fd/2').encode())\n"
    )
    reader, writer = os.pipe()
    command = f'exec "$0" -c "$1" 9>&{writer} 0<&- 1>&- 2>&-'
    done = subprocess.run(["bash", "-c", command, sys.executable, code], pass_fds=[writer], timeout=60)
    os.close(writer)
    with open(reader) as said:
        assert (done.returncode, said.read()) == (0, "/dev/null")


@pytest.mark.parametrize(("asked_to_stop", "status"), [(True, 0), (False, 1)])
def test_a_thread_that_never_ends_does_not_keep_the_process(asked_to_stop: bool, status: int) -> None:
    code = f"""if True:
        import asyncio, sys, threading, types
        from carpool.server import cli
        async def serve(*_):
            asyncio.get_running_loop().run_in_executor(None, threading.Event().wait)
            return {asked_to_stop}
        for name, face in (("engine.async_engine", "AsyncEngine"), ("server.lifespan", "serve")):
            sys.modules["carpool." + name] = types.SimpleNamespace(**{{face: serve}})
        cli.LEAVE_SECONDS = 0.1
        sys.modules["carpool.engine.async_engine"].AsyncEngine = lambda config: None
        sys.exit(cli.run(["serve"], {{}}))
    """
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == status


def test_an_impatient_ctrl_c_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run", interrupted)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 130
