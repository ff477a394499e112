"""What may stand in the headers we read."""

from __future__ import annotations

import pytest

from carpool.server.headers import fresh_label, label
from serving import EMBEDDINGS, Served, assert_error


@pytest.mark.parametrize("value", ["a", "req-1", "x" * 128, "with space", '"quoted"'])
def test_a_printable_label_is_kept(value: str) -> None:
    assert label(value) == value


@pytest.mark.parametrize("value", [None, "", "x" * 129, "tab\t", "bell\x07", "line\nbreak", "é", "\ud800"])
def test_any_other_is_not(value: str | None) -> None:
    assert label(value) is None


def test_a_fresh_label_is_32_hex_and_new() -> None:
    assert len({fresh_label() for _ in range(100)}) == 100
    assert int(fresh_label(), 16) >= 0
    assert len(fresh_label()) == 32


@pytest.mark.parametrize("value", ["1", "0.5", "1e2", " 3 "])
async def test_a_timeout_is_passed_on(served: Served, value: str) -> None:
    assert (
        await served.post(EMBEDDINGS, {"input": "hi"}, headers={"X-Request-Timeout": value})
    ).status == 200
    assert served.engine.calls[0]["timeout"] == float(value)


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "soon", "", "1s"])
async def test_a_timeout_must_be_positive_and_finite(served: Served, value: str) -> None:
    answer = await served.post(EMBEDDINGS, {"input": "hi"}, headers={"X-Request-Timeout": value})
    assert_error(answer, 400, "BadRequestError", "X-Request-Timeout")
    assert served.engine.calls == []
