"""What may be asked of the parity table."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import parity


def asked(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["parity.py", *arguments])
    parity.main()


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A page of three lines: one before the table, an old table, one behind it."""
    page = tmp_path / "models.md"
    page.write_text(f"before\n{parity.BEGIN}\nold\n{parity.END}\nafter\n")
    monkeypatch.setattr(parity, "PAGE", page)
    return page


def test_a_part_of_the_table_is_not_written_in_place_of_the_whole(
    page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        asked(monkeypatch, "--only", "bert", "--write")
    assert "would leave the others out" in capsys.readouterr().err
    assert "old" in page.read_text()


def test_a_word_that_no_line_has_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        asked(monkeypatch, "--only", "no such family")
    assert "no family's line has 'no such family'" in capsys.readouterr().err


def test_a_folder_that_is_none_is_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="no model folder"):
        asked(monkeypatch, "--model", "/nowhere")


def test_the_table_alone_is_written_anew(page: Path) -> None:
    parity._write("| new |")
    assert page.read_text() == f"before\n{parity.BEGIN}\n| new |\n{parity.END}\nafter\n"
