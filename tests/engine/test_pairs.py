"""Pairs of texts as one prompt: the ids and token types that transformers' own tokenizer would give the model."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import AutoTokenizer

import tiny
from carpool.engine.errors import ConfigError, InputTooLong, InvalidInput, InvalidParameter
from carpool.engine.fast_tokenizer import load_fast
from carpool.engine.framed import Framed
from carpool.engine.params import TokenizationParams
from carpool.engine.tokenizer import Tokenizer

LONGEST = 64
QUERY = "where is the cat?"
DOCUMENTS = ["the cat sat on a mat", "a", "rain in spain falls on the mat, " * 4, "naïve Ünïcode 雨 ☂", ""]
words = st.lists(st.sampled_from(tiny.WORDS), max_size=12).map(" ".join)
anything = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


def _mistral(path: Path) -> None:
    """<s> before each text; the second, with its own, is of type 1, which the model does not know of."""
    backend = tiny.byte_bpe(before=["<s>"], after=["</s>"], pad="</s>")
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> <s>:1 $B:1 </s>:1",
        special_tokens=[(name, backend.token_to_id(name)) for name in ("<s>", "</s>")],
    )
    path.mkdir()
    tiny.write_json(path / "config.json", {"model_type": "mistral"})
    tiny.save_tokenizer(backend, path, pad="</s>", tokenizer_class="PreTrainedTokenizerFast")


FAMILIES = ("bert", "xlmr", "qwen2", "modernbert", "mistral_pairs")


@pytest.fixture(scope="module")
def both(
    checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Tokenizer, Any]]:
    """Ours and transformers' tokenizer of a family."""

    @cache
    def made(family: str) -> tuple[Tokenizer, Any]:
        if family == "mistral_pairs":
            path = tmp_path_factory.mktemp("pairs") / family
            _mistral(path)
        else:
            path = checkpoint(family)
        ours = Tokenizer.of(load_fast(path, trust_remote_code=False), max_model_len=LONGEST, vocab_size=10**6)
        return ours, AutoTokenizer.from_pretrained(path)

    return made


def prepared(
    tokenizer: Tokenizer, pairs: list[tuple[str, str]], **params: Any
) -> list[tuple[list[int], list[int]]]:
    """Ids and token types of each pair."""
    result = tokenizer.prepare(pairs, TokenizationParams(**params))
    assert result.type_starts is not None
    return [
        (ids, [int(start is not None and i >= start) for i in range(len(ids))])
        for ids, start in zip(result.token_ids, result.type_starts, strict=True)
    ]


def expected(theirs: Any, query: str, document: str, **options: Any) -> tuple[list[int], list[int]]:
    found = theirs(query, document, **options)
    ids = found["input_ids"]
    return ids, found.get("token_type_ids", [0] * len(ids))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("document", DOCUMENTS, ids=range(len(DOCUMENTS)))
def test_a_pair_is_what_transformers_makes_of_it(
    family: str, document: str, both: Callable[[str], tuple[Tokenizer, Any]]
) -> None:
    ours, theirs = both(family)
    (found,) = prepared(ours, [(QUERY, document)], truncate_prompt_tokens=-1)
    assert found == expected(theirs, QUERY, document, truncation=True, max_length=LONGEST)


@pytest.mark.parametrize("family", FAMILIES)
def test_many_pairs_are_each_what_they_are_alone(
    family: str, both: Callable[[str], tuple[Tokenizer, Any]]
) -> None:
    ours, _ = both(family)
    pairs = [(query, document) for query in (QUERY, "a") for document in DOCUMENTS]
    together = prepared(ours, pairs, truncate_prompt_tokens=-1)
    assert together == [prepared(ours, [pair], truncate_prompt_tokens=-1)[0] for pair in pairs]


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=40, deadline=None)
@given(query=words, document=words, limit=st.integers(5, LONGEST))
def test_the_longer_side_is_cut_first_as_transformers_does(
    family: str, query: str, document: str, limit: int, both: Callable[[str], tuple[Tokenizer, Any]]
) -> None:
    ours, theirs = both(family)
    reference = expected(theirs, query, document, truncation="longest_first", max_length=limit)
    if reference[0]:
        (found,) = prepared(ours, [(query, document)], truncate_prompt_tokens=limit)
        assert found == reference


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=25, deadline=None)
@given(query=words, document=words, limit=st.integers(5, LONGEST))
def test_where_documents_have_a_limit_only_they_are_cut_as_transformers_does(
    family: str, query: str, document: str, limit: int, both: Callable[[str], tuple[Tokenizer, Any]]
) -> None:
    ours, theirs = both(family)
    asked: dict[str, Any] = {"truncate_prompt_tokens": limit, "max_tokens_per_doc": 50}
    whole = expected(theirs, query, document)
    alone = len(theirs(query, add_special_tokens=False)["input_ids"])
    around = theirs.num_special_tokens_to_add(pair=bool(document))
    if alone + around < limit or len(whole[0]) <= limit:
        reference = expected(theirs, query, document, truncation="only_second", max_length=limit)
        if reference[0]:
            assert prepared(ours, [(query, document)], **asked) == [reference]
    elif around <= limit:  # nothing would be left of the document
        with pytest.raises(InvalidParameter, match=f"the query alone has at least {alone}\\."):
            prepared(ours, [(query, document)], **asked)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=25, deadline=None)
@given(query=anything, document=anything)
def test_any_two_texts_make_the_pair_that_transformers_makes(
    family: str, query: str, document: str, both: Callable[[str], tuple[Tokenizer, Any]]
) -> None:
    ours, theirs = both(family)
    reference = expected(theirs, query, document)
    if 0 < len(reference[0]) <= LONGEST:
        assert prepared(ours, [(query, document)]) == [reference]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("limit", [1, 3, 9, 14, 60])
def test_a_side_that_is_named_is_cut_blindly_and_the_types_stay_with_their_tokens(
    side: str, limit: int, both: Callable[[str], tuple[Tokenizer, Any]]
) -> None:
    ours, theirs = both("bert")
    document = "the cat sat on a mat"
    ids, types = expected(theirs, QUERY, document)
    (found,) = prepared(ours, [(QUERY, document)], truncate_prompt_tokens=limit, truncation_side=side)
    keep = slice(0, limit) if side == "right" else slice(max(0, len(ids) - limit), None)
    assert found == (ids[keep], types[keep])


def test_a_limit_below_the_special_tokens_still_gives_so_many_ids(
    both: Callable[[str], tuple[Tokenizer, Any]],
) -> None:
    ours, _ = both("bert")
    for limit in (1, 2):
        ((ids, _types),) = prepared(ours, [("the cat", "the mat")], truncate_prompt_tokens=limit)
        assert len(ids) == limit


def test_a_pair_that_is_too_long_is_refused_and_named(both: Callable[[str], tuple[Tokenizer, Any]]) -> None:
    ours, _ = both("bert")
    with pytest.raises(InputTooLong, match=f"maximum context length is {LONGEST} tokens") as refused:
        prepared(ours, [("a", "b"), ("cat " * 40, "mat " * 40)])
    assert refused.value.param == "input[1]"


def test_text_that_is_no_text_is_refused(both: Callable[[str], tuple[Tokenizer, Any]]) -> None:
    with pytest.raises(InvalidInput, match="lone surrogate"):
        prepared(both("bert")[0], [("a", "\ud800")])


def test_models_without_a_second_type_never_see_one(checkpoint: Callable[[str], Path]) -> None:
    """As RoBERTas with a tokenizer that types its texts: the table of types has one row."""
    path = checkpoint("bert")
    ours = Tokenizer.of(
        load_fast(path, trust_remote_code=False), max_model_len=LONGEST, vocab_size=100, token_types=False
    )
    ((_ids, types),) = prepared(ours, [("the cat", "the mat")])
    assert not any(types)


def test_a_tokenizer_that_keeps_types_to_itself_gives_none(fresh: Callable[[str], Path]) -> None:
    path = fresh("bert")
    tiny.edit_json(path / "tokenizer_config.json", model_input_names=["input_ids", "attention_mask"])
    ours = Tokenizer.of(load_fast(path, trust_remote_code=False), max_model_len=LONGEST, vocab_size=100)
    ((ids, types),) = prepared(ours, [("the cat", "the mat")])
    assert (ids, types) == expected(AutoTokenizer.from_pretrained(path), "the cat", "the mat")
    assert not any(types)


# ── pairs in a prompt ────────────────────────────────────────────────────────────────────────────────────────


def framed(tokenizer: Tokenizer, *prompts: Framed, **params: Any) -> list[list[int]]:
    return tokenizer.prepare(list(prompts), TokenizationParams(**params)).token_ids


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=25, deadline=None)
@given(parts=st.lists(st.one_of(words, anything), min_size=1, max_size=4), specials=st.booleans())
def test_parts_are_tokenised_one_by_one(
    family: str, parts: list[str], specials: bool, both: Callable[[str], tuple[Tokenizer, Any]]
) -> None:
    ours, theirs = both(family)
    inner = [token for part in parts for token in theirs(part, add_special_tokens=False)["input_ids"]]
    before, after = _around(theirs) if specials else ([], [])
    if 0 < len(before + inner + after) <= LONGEST:
        assert framed(ours, Framed(tuple(parts), (0,), specials=specials)) == [before + inner + after]


def _around(theirs: Any) -> tuple[list[int], list[int]]:
    (bare,), (full,) = theirs(["cat"], add_special_tokens=False)["input_ids"], theirs(["cat"])["input_ids"]
    at = next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)
    return full[:at], full[at + len(bare) :]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("specials", [True, False])
@settings(max_examples=40, deadline=None)
@given(query=words, document=words, limit=st.integers(14, LONGEST), side=st.sampled_from([None, "right"]))
def test_parts_give_way_in_their_order_and_the_rest_stays(
    family: str,
    specials: bool,
    query: str,
    document: str,
    limit: int,
    side: str | None,
    both: Callable[[str], tuple[Tokenizer, Any]],
) -> None:
    ours, theirs = both(family)

    def of(text: str) -> list[int]:
        ids: list[int] = theirs(text, add_special_tokens=False)["input_ids"]
        return ids

    before, after = _around(theirs) if specials else ([], [])
    start, middle, end = of("a"), of("is"), of("?")
    room = limit - len(before + after + start + middle + end)
    kept = of(document)[: max(0, room - len(of(query)))]
    asked = of(query)[: room - len(kept)]
    prompt = Framed(("a", query, "is", document, "?"), (3, 1), specials=specials)
    (found,) = framed(ours, prompt, truncate_prompt_tokens=limit, truncation_side=side)
    assert found == [*before, *start, *asked, *middle, *kept, *end, *after]


@settings(max_examples=40, deadline=None)
@given(document=words, limit=st.integers(8, LONGEST))
def test_a_tail_stays_behind_what_is_cut(
    document: str, limit: int, both: Callable[[str], tuple[Tokenizer, Any]]
) -> None:
    ours, theirs = both("bert")
    text = f"the cat {document} ? and peace"
    tail = theirs("? and peace", add_special_tokens=False)["input_ids"]
    whole = theirs(text)["input_ids"]
    expected = whole if len(whole) <= limit else [*whole[: limit - len(tail) - 1], *tail, whole[-1]]
    prompt = Framed((text,), (0,), "? and peace", specials=True)
    assert framed(ours, prompt, truncate_prompt_tokens=limit) == [expected]


def test_a_limit_below_what_must_stay_is_refused(both: Callable[[str], tuple[Tokenizer, Any]]) -> None:
    ours, _ = both("bert")
    prompt = Framed(("the", "cat", "sat on a mat"), (1,), specials=True)
    assert len(framed(ours, prompt, truncate_prompt_tokens=7)[0]) == 7
    with pytest.raises(InvalidParameter, match=r"6 leaves no room .* alone has at least 7 tokens") as refused:
        framed(ours, prompt, truncate_prompt_tokens=6)
    assert refused.value.param == "truncate_prompt_tokens"


def test_a_left_side_is_cut_blindly(both: Callable[[str], tuple[Tokenizer, Any]]) -> None:
    ours, _ = both("bert")
    prompt = Framed(("the cat", "sat on a mat"), (0,), specials=True)
    (whole,) = framed(ours, prompt)
    for limit in (1, 3, 20):
        assert framed(ours, prompt, truncate_prompt_tokens=limit, truncation_side="left") == [whole[-limit:]]


def test_a_prompt_that_is_too_long_is_refused_and_named(both: Callable[[str], tuple[Tokenizer, Any]]) -> None:
    ours, _ = both("bert")
    with pytest.raises(InputTooLong, match=f"maximum context length is {LONGEST} tokens") as refused:
        framed(ours, Framed(("a",), (0,)), Framed(("cat " * 70,), (0,)))
    assert refused.value.param == "input[1]"
    with pytest.raises(InvalidInput, match="lone surrogate"):
        framed(ours, Framed(("a", "\ud800"), (0,)))


# ── max_tokens_per_query, max_tokens_per_doc ─────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=60, deadline=None)
@given(text=st.one_of(words, anything), limit=st.integers(1, 12))
def test_a_shortened_text_is_a_beginning_of_at_most_so_many_tokens(
    family: str, text: str, limit: int, both: Callable[[str], tuple[Tokenizer, Any]]
) -> None:
    ours, _ = both(family)
    (short,) = ours.shorten([text], limit)
    (before,), (after,) = ours.encode([text], False), ours.encode([short], False)
    assert text.startswith(short)
    assert len(after) <= limit
    if len(before) <= limit:
        assert short == text


@pytest.mark.parametrize("family", FAMILIES)
def test_words_are_shortened_to_exactly_so_many_tokens(
    family: str, both: Callable[[str], tuple[Tokenizer, Any]]
) -> None:
    ours, _ = both(family)
    (short,) = ours.shorten([" the cat sat on the mat in spain" * 3], 10)
    assert len(ours.encode([short], False)[0]) == 10


def test_a_character_of_several_tokens_is_kept_whole_or_not_at_all(
    both: Callable[[str], tuple[Tokenizer, Any]],
) -> None:
    ours, _ = both("qwen2")
    assert [len(ours.encode(["☂"], False)[0]), ours.shorten(["☂☂"], 4), ours.shorten(["☂☂"], 2)] == [
        3,
        ["☂"],
        [""],
    ]


def test_words_for_a_scorer_are_single_tokens(checkpoint: Callable[[str], Path]) -> None:
    path = checkpoint("qwen3_lm")
    ours = Tokenizer.of(load_fast(path, trust_remote_code=False), max_model_len=LONGEST, vocab_size=500)
    assert ours.ids_of(("no", "yes")) == AutoTokenizer.from_pretrained(path).convert_tokens_to_ids(
        ["no", "yes"]
    )
    with pytest.raises(ConfigError, match="'perhaps' is not one token"):
        ours.ids_of(("yes", "perhaps"))


# ── truncate_prompt_tokens ───────────────────────────────────────────────────────────────────────────────────


def test_truncation_below_minus_one_means_nothing(both: Callable[[str], tuple[Tokenizer, Any]]) -> None:
    with pytest.raises(InvalidParameter, match="must be -1 or more") as refused:
        prepared(both("bert")[0], [("a", "b")], truncate_prompt_tokens=-2)
    assert refused.value.param == "truncate_prompt_tokens"


def test_where_texts_may_be_of_any_length_so_may_truncation(
    both: Callable[[str], tuple[Tokenizer, Any]],
) -> None:
    ours, _ = both("bert")
    text = ["cat " * 300]
    for truncate, length in ((200, 200), (-1, 302), (None, 302)):
        found = ours.prepare(text, TokenizationParams(truncate_prompt_tokens=truncate), None)
        assert list(map(len, found.token_ids)) == [length]
    with pytest.raises(InvalidParameter, match="greater than max_model_len"):
        ours.prepare(text, TokenizationParams(truncate_prompt_tokens=201), 200)
