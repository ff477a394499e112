"""Errors in one line."""

from __future__ import annotations

import pytest

from carpool.engine.errors import first_line


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("no kernel for this.\nSee the manual.", "no kernel for this."),
        ("\n  late  \n", "late"),
        (
            "Validation error for 'layer_types':\n    ValueError: 2 and not 1\n  at",
            "Validation error for 'layer_types': ValueError: 2 and not 1",
        ),
        ("nothing follows:", "nothing follows:"),
        ("", "ValueError"),
    ],
)
def test_an_error_says_in_one_line_what_it_is(text: str, line: str) -> None:
    assert first_line(ValueError(text)) == line
