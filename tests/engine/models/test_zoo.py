"""Every family of the zoo equals its float32 reference, alone and in company, and stands in docs/models.md as it is."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tree import ROOT
from zoo import MEMBERS, Member
from zoo.measure import TOLERANCE, Line, measure

PAGE = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module", params=MEMBERS, ids=lambda member: member.name)
def line(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Line:
    member: Member = request.param
    return measure(member, tmp_path_factory.mktemp("member"))


def test_equals_its_reference_alone(line: Line) -> None:
    assert line.alone <= TOLERANCE


def test_equals_its_reference_in_company(line: Line) -> None:
    assert line.company <= TOLERANCE


def test_stands_in_the_table_as_it_is(line: Line) -> None:
    """`./dev bench parity --write` makes the table; its numbers may differ from machine to machine, its words not."""
    rows = [row.strip("| ").split(" | ") for row in PAGE.splitlines() if row.startswith("| ")]
    (row,) = [row for row in rows if row[:2] == [line.name, line.family]]
    assert row[2:6] == [", ".join(line.tasks), line.packing, line.attention, line.pooling]
    assert row[8:] == ([line.note] if line.note else [])
    for told, measured in zip(row[6:8], (line.alone, line.company), strict=True):
        assert measured <= 10 * max(float(told), 1e-7)


def test_nothing_stands_in_the_table_beside_the_members() -> None:
    table = PAGE.partition("<!-- parity: begin")[2].partition("\n\n")[0].splitlines()[3:]
    named = [tuple(row.strip("| ").split(" | ")[:2]) for row in table]
    assert named == [(member.name, member.family) for member in MEMBERS]


def test_no_two_members_are_of_one_name() -> None:
    assert max(Counter(member.name for member in MEMBERS).values()) == 1


def test_a_wrong_reference_is_seen(tmp_path: Path) -> None:
    """Planted: a reference that answers with something else."""
    member = MEMBERS[0]

    def make(folder: Path) -> object:
        truth = member.make(folder)
        return lambda *ask: truth(*ask) + 0.001

    wrong = Member(member.name, member.family, make, member.tasks)  # type: ignore[arg-type]
    line = measure(wrong, tmp_path)
    assert min(line.alone, line.company) > TOLERANCE
