"""Groups: prompts go together as far as they may, and an error finds its way back to the caller's own count."""

from __future__ import annotations

from typing import cast

import pytest

from carpool.engine.async_engine import AsyncEngine
from carpool.engine.errors import InputTooLong
from carpool.engine.llm_groups import grouped
from carpool.engine.params import PoolingParams, TokenizationParams
from carpool.engine.terms import Terms
from fakes import FakeEngine

PLAIN, SHORT = PoolingParams(), PoolingParams(truncate_prompt_tokens=2)
NO_TERMS, SALTED = Terms(), Terms(cache_salt="a")
WHOLE = TokenizationParams()


def test_only_what_has_all_in_common_goes_together() -> None:
    prompts: list[str | list[int]] = ["a", [5], "b", "c", "d", "e"]
    params = [PLAIN, PLAIN, PoolingParams(), SHORT, PLAIN, PLAIN]
    terms = [NO_TERMS, NO_TERMS, Terms(), NO_TERMS, SALTED, Terms(adapter="x")]
    groups = grouped(prompts, params, terms, WHOLE)
    assert [group.places for group in groups] == [[0, 2], [1], [3], [4], [5]]
    assert [group.prompts for group in groups] == [["a", "b"], [[5]], ["c"], ["d"], ["e"]]
    assert [group.tokenization.truncate_prompt_tokens for group in groups] == [None, None, 2, None, None]
    assert [group.terms.cache_salt for group in groups] == [None, None, None, "a", None]
    assert grouped([], [], [], WHOLE) == []


@pytest.mark.parametrize(("prompts", "param"), [(["a", "b" * 300], "input[1]"), (["b" * 300], "input")])
async def test_an_error_names_the_prompt_by_its_place_among_all(prompts: list[str], param: str) -> None:
    *_, group = grouped(prompts, [PLAIN] * len(prompts), [NO_TERMS, SALTED][: len(prompts)], WHOLE)
    with pytest.raises(InputTooLong) as refused:
        await group.run(cast("AsyncEngine", FakeEngine()), ("embed",), lambda _: None)
    assert refused.value.param == param


async def test_the_engine_hears_of_the_terms_and_whom_to_tell_of_progress() -> None:
    engine, told = FakeEngine(), lambda _: None
    (group,) = grouped(["a"], [SHORT], [SALTED], WHOLE)
    result = await group.run(cast("AsyncEngine", engine), ("embed",), told)
    assert (engine.calls[0]["cache_salt"], engine.calls[0]["on_progress"]) == ("a", told)
    answers = group.answers(cast("AsyncEngine", engine), ("embed",), result, ["7"])
    assert (answers[0].request_id, len(answers[0].prompt_token_ids)) == ("7", 2)
