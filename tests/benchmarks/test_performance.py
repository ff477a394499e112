"""The page: every part has its place, and measuring writes nowhere else."""

import re

import pytest

from performance import PAGE, PARTS, placed

PLACE = "before\n<!-- measured: a -->\nold\n<!-- end: a -->\nafter <!-- measured: b -->x<!-- end: b -->"


def test_a_part_goes_between_its_markers_and_nowhere_else() -> None:
    page = placed(PLACE, "a", "| new \\1 |\n")
    assert page == PLACE.replace("old", "| new \\1 |")
    assert placed(page, "a", "old") == PLACE


def test_a_part_without_a_place_is_an_error() -> None:
    with pytest.raises(ValueError, match="no place for c"):
        placed(PLACE, "c", "text")


def test_every_part_has_its_place_and_its_script() -> None:
    assert re.findall(r"<!-- measured: (\S+) -->", PAGE.read_text()) != []
    assert set(re.findall(r"<!-- measured: (\S+) -->", PAGE.read_text())) == set(PARTS)
    for full, quick in PARTS.values():
        for command in (full, quick):
            assert (PAGE.parents[1] / "benchmarks" / f"{command.split()[0]}.py").is_file()
