"""The tokenizer: what is kept of a long text, what is refused, and that nothing of it is ever changed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

import tiny
from carpool.engine.errors import (
    ConfigError,
    EmptyInput,
    InputTooLong,
    InvalidInput,
    InvalidParameter,
    TokenOutOfVocabulary,
)
from carpool.engine.fast_tokenizer import end_notice, load_fast
from carpool.engine.framed import Framed
from carpool.engine.params import Side, TokenizationParams
from carpool.engine.tokenizer import Tokenizer

VOCABULARY = 1000
KINDS: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "bert": tiny.wordpiece,
    "xlmr": tiny.unigram,
    "eos": lambda: tiny.byte_bpe(after=["</s>"]),
    "bos": lambda: tiny.byte_bpe(before=["<s>"]),
    "bare": tiny.byte_bpe,
}
AFFIXES = {"bert": ((2,), (3,)), "xlmr": ((0,), (2,)), "eos": ((), (1,)), "bos": ((1,), ()), "bare": ((), ())}


def make(kind: str, max_model_len: int = 8, added: Seq[str] = (), **options: object) -> Tokenizer:
    settings = {"vocab_size": VOCABULARY, "max_model_len": max_model_len, **options}
    backend = KINDS[kind]()
    backend.add_tokens(list(added))
    return Tokenizer(backend, **settings)  # type: ignore[arg-type]


def cut(k: int | None = -1, side: Side | None = None, *, specials: bool = True) -> TokenizationParams:
    return TokenizationParams(truncate_prompt_tokens=k, truncation_side=side, add_special_tokens=specials)


# ── special tokens ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokens_around_a_text_are_found(kind: str) -> None:
    affixes = make(kind)._affixes
    assert (affixes.prefix, affixes.suffix) == AFFIXES[kind]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("limit", range(9))
def test_cut_by_default_as_the_library_itself_would(kind: str, side: Side, limit: int) -> None:
    """Special tokens stay, the text's own go from the tokenizer's side; exactly `limit` tokens."""
    text = "the cat sat on a mat in spain"
    tokenizer = make(kind, truncation_side=side)
    around = sum(map(len, AFFIXES[kind]))
    if limit == 0:
        with pytest.raises(EmptyInput):
            tokenizer.prepare([text], cut(0))
        return
    (ids,) = tokenizer.prepare([text], cut(limit)).token_ids
    assert len(ids) == limit
    if limit > around:
        library = KINDS[kind]()
        library.enable_truncation(limit, direction=side)
        assert ids == library.encode(text).ids


@pytest.mark.parametrize(("side", "expected"), [("right", slice(0, 4)), ("left", slice(-4, None))])
def test_an_explicit_side_slices_blindly(side: Side, expected: slice) -> None:
    tokenizer = make("bert")
    (full,) = tokenizer.encode(["the cat sat on a mat"])
    assert tokenizer.prepare(["the cat sat on a mat"], cut(4, side)).token_ids == [full[expected]]


@pytest.mark.parametrize("side", ["left", "right", None])
def test_without_special_tokens_only_the_text_is_cut(side: Side | None) -> None:
    tokenizer = make("bert")
    (full,) = tokenizer.encode(["the cat sat"], add_special_tokens=False)
    kept = full[-2:] if side == "left" else full[:2]
    assert tokenizer.prepare(["the cat sat"], cut(2, side, specials=False)).token_ids == [kept]


def test_what_fits_is_not_touched() -> None:
    tokenizer = make("bert")
    assert tokenizer.prepare(["the cat"], cut(4)).token_ids == tokenizer.encode(["the cat"])


def test_minus_one_cuts_at_the_models_maximum() -> None:
    (ids,) = make("bert", max_model_len=5).prepare(["the cat sat on a mat"], cut(-1)).token_ids
    assert (len(ids), ids[0], ids[-1]) == (5, 2, 3)


def test_more_than_the_maximum_cannot_be_asked_for() -> None:
    with pytest.raises(InvalidParameter) as refused:
        make("bert").prepare(["a"], cut(9))
    assert str(refused.value) == (
        "truncate_prompt_tokens value is greater than max_model_len. Please request a smaller truncation size."
    )
    assert refused.value.param == "truncate_prompt_tokens"


@pytest.mark.parametrize("params", [cut(None), cut(8)])
def test_an_empty_text_is_its_special_tokens(params: TokenizationParams) -> None:
    assert make("bert").prepare([""], params).token_ids == [[2, 3]]


@pytest.mark.parametrize(("kind", "specials"), [("bare", True), ("bert", False)])
def test_an_empty_text_without_special_tokens_is_refused(kind: str, specials: bool) -> None:
    with pytest.raises(EmptyInput) as refused:
        make(kind).prepare(["a", ""], cut(None, specials=specials))
    assert refused.value.param == "input[1]"


# ── token ids ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("bad", [-1, VOCABULARY, 2**31, 2**63, 2**64, -(2**70)])
def test_an_id_outside_the_vocabulary_is_refused(bad: int) -> None:
    with pytest.raises(TokenOutOfVocabulary, match=f"^Token id {bad} is out of vocabulary") as refused:
        make("bert").prepare([[1], [5, bad]], cut(None))
    assert refused.value.param == "input[1]"


def test_every_id_of_the_vocabulary_is_taken_and_gets_no_company() -> None:
    assert make("bert").prepare([[0, VOCABULARY - 1]], cut(None)).token_ids == [[0, VOCABULARY - 1]]


@pytest.mark.parametrize(("side", "kept"), [(None, [1, 2, 3]), ("right", [1, 2, 3]), ("left", [3, 4, 5])])
def test_ids_are_sliced(side: Side | None, kept: list[int]) -> None:
    assert make("bert").prepare([[1, 2, 3, 4, 5]], cut(3, side)).token_ids == [kept]


def test_ids_of_the_caller_are_not_changed() -> None:
    ids = [[1, 2, 3, 4]]
    make("bert").prepare(ids, TokenizationParams(truncate_prompt_tokens=2, padding="max_length"))
    assert ids == [[1, 2, 3, 4]]


def test_a_text_cannot_bring_an_id_that_the_model_has_no_row_for() -> None:
    """A tokenizer may know tokens that were added after the model was made."""
    whole = make("bert").encode(["the cat"])
    tokenizer = make("bert", vocab_size=max(whole[0]))
    with pytest.raises(TokenOutOfVocabulary, match=f"^Token id {max(whole[0])} ") as refused:
        tokenizer.prepare(["a", "the cat"], cut(None))
    assert refused.value.param == "input[1]"
    assert make("bert", vocab_size=max(whole[0]) + 1).prepare(["the cat"], cut(None)).token_ids == whole


# ── lengths ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("prompts", [["a a a a a a a"], [[1] * 9]])
def test_too_long_names_both_numbers(prompts: list[str] | list[list[int]]) -> None:
    with pytest.raises(InputTooLong, match=r"\b8 tokens.*\b9 tokens") as refused:
        make("bert").prepare(prompts, cut(None))
    assert refused.value.param == "input"


def test_of_several_prompts_the_one_to_blame_is_named() -> None:
    with pytest.raises(InputTooLong) as refused:
        make("bert").prepare(["a", "a", "a " * 20], cut(None))
    assert refused.value.param == "input[2]"


def test_exactly_the_maximum_is_taken() -> None:
    assert len(make("bert").prepare(["a a a a a a"], cut(None)).token_ids[0]) == 8


def test_no_prompts_are_refused() -> None:
    with pytest.raises(EmptyInput, match="at least one prompt"):
        make("bert").prepare([], cut(None))


def test_padding_appends_the_pad_token_up_to_the_maximum() -> None:
    tokenizer = make("xlmr", max_model_len=6, pad_id=1)
    padded = TokenizationParams(padding="max_length")
    assert tokenizer.prepare([[0, 2], [0, 5, 5, 5, 5, 2]], padded).token_ids == [
        [0, 2, 1, 1, 1, 1],
        [0, 5, 5, 5, 5, 2],
    ]
    assert len(tokenizer.prepare(["a"], padded).token_ids[0]) == 6
    with pytest.raises(InputTooLong):
        tokenizer.prepare([[1] * 7], padded)


# ── what is not text ─────────────────────────────────────────────────────────────────────────────────────────

SURROGATE = "a \ud83d b"


@pytest.mark.parametrize(
    ("texts", "blamed"),
    [([SURROGATE], "input"), (["a", SURROGATE], "input[1]"), (["a " * 2000, SURROGATE], "input[1]")],
)
def test_a_lone_surrogate_is_not_text(texts: list[str], blamed: str) -> None:
    with pytest.raises(InvalidInput, match="lone surrogate") as refused:
        make("bert").prepare(texts, cut(-1))
    assert refused.value.param == blamed


@pytest.mark.parametrize("tail", ["a " * 5000 + SURROGATE, " " * 5000 + SURROGATE])
def test_a_lone_surrogate_is_found_behind_what_would_be_cut_off(tail: str) -> None:
    with pytest.raises(InvalidInput, match="lone surrogate") as refused:
        make("bert").prepare(["a", tail], cut(-1))
    assert refused.value.param == "input[1]"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["\x00", "😀", "\u202e", "a\u0301", "\ufeff", "\U0010ffff", "雨"])
def test_odd_text_is_still_text(kind: str, text: str) -> None:
    make(kind, max_model_len=64).prepare(["a" + text], cut(None))


# ── the short cut for long texts ─────────────────────────────────────────────────────────────────────────────

# Cut at one of its blanks, this is no token of its own, but a hundred bytes and more.
_ADDED = "<the " + "☂ " * 40 + ">"
_PIECES = st.sampled_from(
    ["the ", "cat ", "a", " ", "   ", "\n", "\n\n\n", "\t", "\u3000", "\xa0", "x" * 150 + " ", "é", "雨", ". ",
     "\u0301", "[SEP]", "<s>", "night\n", " " * 97, "\n" * 97, "zq-" * 40, _ADDED, "e \u0301\u0301", "İ", "ΑΣ ", "ΑΣ",
     "\U0001f469\u200d\U0001f469 \ufe0f", "\U0001f1e9\U0001f1ea ", "\u1100\u1161 \u11a8", "The Rain "]
)  # fmt: skip
_LONG = st.lists(st.tuples(_PIECES, st.integers(1, 60)), min_size=1, max_size=14).map(
    lambda pieces: "".join(piece * times for piece, times in pieces)
)


def thorough(tokenizer: Tokenizer) -> Tokenizer:
    """The same, to whom no text is long."""
    tokenizer._begun = lambda texts, _, read: (texts, read(texts))  # type: ignore[method-assign, assignment]
    return tokenizer


def outcome(tokenizer: Tokenizer, prompts: Any, params: TokenizationParams) -> object:
    """Ids and where type 1 begins, or what is wrong; "at least" so many tokens may be fewer."""
    try:
        prepared = tokenizer.prepare(prompts, params)
    except InvalidInput as error:
        return type(error), error.param
    return prepared.token_ids, prepared.type_starts


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    text=_LONG,
    limit=st.integers(1, 8) | st.just(-1),
    side=st.sampled_from([None, "left", "right"]),
    own_side=st.sampled_from(["left", "right"]),
    specials=st.booleans(),
    lowercase=st.booleans(),
)
@example("bare", _ADDED * 20, -1, None, "right", False, False)
def test_a_long_text_is_cut_as_if_it_had_been_read_to_the_end(
    kind: str, text: str, limit: int, side: Side | None, own_side: Side, specials: bool, lowercase: bool
) -> None:
    options: dict[str, Any] = {"added": [_ADDED], "truncation_side": own_side, "lowercase": lowercase}
    params = cut(limit, side, specials=specials)
    quick, whole = make(kind, **options), thorough(make(kind, **options))
    assert outcome(quick, [text, "a"], params) == outcome(whole, [text, "a"], params)


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    texts=st.lists(_LONG | st.sampled_from(["", "the cat"]), min_size=2, max_size=3),
    limit=st.integers(0, 30) | st.sampled_from([-1, None]),
    side=st.sampled_from([None, "left", "right"]),
    own_side=st.sampled_from(["left", "right", "right"]),
    lowercase=st.booleans(),
    only_documents=st.booleans(),
)
def test_a_pair_of_long_texts_is_cut_as_if_both_had_been_read_to_the_end(
    kind: str,
    texts: list[str],
    limit: int | None,
    side: Side | None,
    own_side: Side,
    lowercase: bool,
    only_documents: bool,
) -> None:
    options: dict[str, Any] = {"added": [_ADDED], "truncation_side": own_side, "lowercase": lowercase}
    quick, whole = make(kind, 30, **options), thorough(make(kind, 30, **options))
    params = replace(cut(limit, side), max_tokens_per_doc=int(only_documents))
    pairs = [(query, document) for query in texts for document in texts]
    for prompts in (pairs, *([pair] for pair in pairs)):
        assert outcome(quick, prompts, params) == outcome(whole, prompts, params)


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    query=_LONG | st.just("the cat"),
    document=_LONG,
    limit=st.integers(0, 30) | st.sampled_from([-1, None]),
    side=st.sampled_from([None, "left", "right"]),
    tail=_LONG | st.sampled_from(["", "? the end"]),
    specials=st.booleans(),
)
def test_a_prompt_of_long_parts_is_cut_as_if_they_had_been_read_to_the_end(
    kind: str, query: str, document: str, limit: int | None, side: Side | None, tail: str, specials: bool
) -> None:
    quick, whole = make(kind, 30, [_ADDED]), thorough(make(kind, 30, [_ADDED]))
    for prompt in (
        Framed(("a ", query, " is ", document, "?"), (3, 1), specials=specials),
        Framed((f"a {query} is {document}{tail}",), (0,), tail, specials=specials),
        Framed((query, document + tail), (1, 0), tail, specials=specials),
        Framed((query, document), (0,), specials=specials),
    ):
        params = cut(limit, side)
        assert outcome(quick, [prompt], params) == outcome(whole, [prompt], params)


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    texts=st.lists(_LONG | st.just("the cat"), min_size=1, max_size=3),
    limit=st.integers(1, 30),
    lowercase=st.booleans(),
)
@example("bare", [_ADDED * 20], 8, False)
def test_a_long_text_is_shortened_as_if_it_had_been_read_to_the_end(
    kind: str, texts: list[str], limit: int, lowercase: bool
) -> None:
    quick, whole = (make(kind, added=[_ADDED], lowercase=lowercase) for _ in range(2))
    assert quick.shorten(texts, limit) == thorough(whole).shorten(texts, limit)


@pytest.mark.parametrize("more", [-1, 0, 1])
@pytest.mark.parametrize(
    ("query", "document"), [("a ", "the "), ("the ", "a "), ("cat ", "cat "), ("a ", "a")]
)
@pytest.mark.parametrize("limit", [24, 25])
def test_of_two_long_sides_the_longer_keeps_the_odd_token_as_in_the_library(
    query: str, document: str, more: int, limit: int
) -> None:
    """Also where the one of more tokens has fewer characters, or all that it has beyond the other stands at its end."""
    library = KINDS["bert"]()
    library.enable_truncation(limit, strategy="longest_first")
    pair = (query * 400, document + " the" * (399 + more))
    assert make("bert", 30).prepare([pair], cut(limit)).token_ids == [library.encode(*pair).ids]


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(sorted(KINDS)), text=_LONG)
def test_a_long_text_is_refused_or_taken_as_if_it_had_been_read_to_the_end(kind: str, text: str) -> None:
    tokenizer = make(kind)
    fits = len(tokenizer.encode([text])[0]) <= 8
    if fits and tokenizer.encode([text])[0]:
        assert tokenizer.prepare([text], cut(None)).token_ids == tokenizer.encode([text])
    else:
        with pytest.raises((InputTooLong, EmptyInput)):
            tokenizer.prepare([text], cut(None))


@pytest.mark.parametrize("length", range(101, 402, 12))
def test_a_long_text_is_never_cut_within_a_word(length: int) -> None:
    """BERT makes one unknown token of a word beyond 100 letters, and many of half of it."""
    text = ("x" * length + " ") * 30
    tokenizer = make("bert")
    for limit in (3, 5, 8):
        (full,) = tokenizer.encode([text])
        assert tokenizer.prepare([text], cut(limit)).token_ids == [[*full[: limit - 1], 3]]


@pytest.fixture
def reading(monkeypatch: pytest.MonkeyPatch) -> Callable[[Tokenizer], list[str]]:
    """Makes a tokenizer note all texts that it reads."""

    class Backend:
        def __init__(self, backend: tokenizers.Tokenizer, read: list[str]) -> None:
            self._backend, self._read = backend, read

        def __getattr__(self, name: str) -> Any:
            method = getattr(self._backend, name)

            def noted(texts: str | list[str], *args: object, **options: object) -> object:
                self._read.extend([texts] if isinstance(texts, str) else texts)
                return method(texts, *args, **options)

            return noted if name.startswith("encode") else method

    def noting(tokenizer: Tokenizer) -> list[str]:
        read: list[str] = []
        monkeypatch.setattr(tokenizer, "_words", None)
        monkeypatch.setattr(tokenizer, "_backend", Backend(tokenizer._backend, read))
        return read

    return noting


_HUGE = "the cat " * 100_000


@pytest.mark.parametrize("limit", [None, -1, 5, 6, 7, 8])
@pytest.mark.parametrize(
    "prompt",
    [
        _HUGE,
        ("a", _HUGE),
        (_HUGE, "a"),
        ("the cat sat on a mat", _HUGE),
        ("mat " * 1000, _HUGE),
        (_HUGE, "mat " * 1000),
        Framed(("a", _HUGE, "?"), (1,), specials=True),
        Framed((_HUGE, "a"), (0,), "?"),
        "x" * 150 + " " + _HUGE,
        " " * 1000 + _HUGE,
    ],
    ids=repeat(""),
)
def test_a_hopelessly_long_text_is_not_read_to_the_end(
    prompt: Any, limit: int | None, reading: Callable[[Tokenizer], list[str]]
) -> None:
    tokenizer = make("bert")
    read = reading(tokenizer)
    if limit is None:
        with pytest.raises(InputTooLong):
            tokenizer.prepare([prompt], cut(None))
    else:
        tokenizer.prepare([prompt], cut(limit))
    assert sum(map(len, read)) < 20_000


def test_a_long_query_is_compared_with_many_documents_at_the_cost_of_one(
    reading: Callable[[Tokenizer], list[str]],
) -> None:
    tokenizer = make("bert")
    read = reading(tokenizer)
    query, documents = "mat " * 5000, ["the cat " * 10_000 + f"{i}" for i in range(50)]
    tokenizer.prepare([(query, document) for document in documents], cut(8))
    assert read.count(query) == 1
    assert max(map(len, read)) < 60_000


def test_a_hopelessly_long_text_is_shortened_by_its_beginning(
    reading: Callable[[Tokenizer], list[str]],
) -> None:
    tokenizer = make("bert", lowercase=True)
    read = reading(tokenizer)
    assert tokenizer.shorten([_HUGE.upper()], 3) == ["the cat the"]
    assert sum(map(len, read)) < 5000


def test_a_text_in_capitals_is_shortened_as_in_small_letters_where_the_model_lowers_it() -> None:
    tokenizer = make("bare", 64, lowercase=True)
    texts = ["THE CAT SAT ON A MAT IN SPAIN", "the cat sat on a mat in spain", "ΑΣΑΣ the İ cat is here"]
    for limit in range(1, 14):
        short = tokenizer.shorten(texts, limit)
        big, small, other = tokenizer.encode(short, False)
        assert big == small == tokenizer.encode(texts[:1], False)[0][:limit]
        assert len(other) <= limit
        assert all(text.lower().startswith(own.lower()) for text, own in zip(texts, short, strict=True))


# ── loading ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_long_text_leaves_python_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's `encode` keeps Python's lock until it is done: seconds, in which nobody else is served."""

    class Backend:
        def __init__(self, backend: tokenizers.Tokenizer) -> None:
            self._backend = backend

        def __getattr__(self, name: str) -> object:
            assert name != "encode"
            return getattr(self._backend, name)

    tokenizer = make("bert", max_model_len=10_000)
    text = "cat " * 2_000
    ids, (whole, places) = tokenizer.encode([text]), tokenizer.offsets(text)
    monkeypatch.setattr(tokenizer, "_words", None)
    monkeypatch.setattr(tokenizer, "_backend", Backend(tokenizer._backend))
    assert tokenizer.encode([text]) == ids == [whole]
    assert tokenizer.offsets(text) == (whole, places)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_saved_truncation_and_padding_are_cleared(family: str, checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint(family)
    tokenizer = Tokenizer.of(
        load_fast(folder, trust_remote_code=False), max_model_len=100, vocab_size=VOCABULARY
    )
    plain = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert plain.truncation is not None, "this test needs a file that asks for them"
    assert plain.padding is not None
    plain.no_truncation()
    plain.no_padding()
    for texts in (["a"], tiny.TEXTS):
        assert tokenizer.encode(texts) == [plain.encode(text).ids for text in texts]


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_tokenizers_own_side_is_read_from_its_files(side: Side, fresh: Callable[[str], Path]) -> None:
    folder = fresh("bert")
    tiny.edit_json(folder / "tokenizer_config.json", truncation_side=side)
    tokenizer = Tokenizer.of(
        load_fast(folder, trust_remote_code=False), max_model_len=8, vocab_size=VOCABULARY
    )
    cat, mat = (tokenizer.encode([word], False)[0][0] for word in ("cat", "mat"))
    assert tokenizer.prepare(["cat sat mat"], cut(3)).token_ids == [[2, mat if side == "left" else cat, 3]]


def test_the_pad_id_is_read_from_its_files(checkpoint: Callable[[str], Path]) -> None:
    tokenizer = Tokenizer.of(
        load_fast(checkpoint("xlmr"), trust_remote_code=False), max_model_len=4, vocab_size=VOCABULARY
    )
    assert tokenizer.prepare([[0]], TokenizationParams(padding="max_length")).token_ids == [[0, 1, 1, 1]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("specials", [True, False])
@settings(deadline=None)
@given(st.lists(st.text(max_size=20), min_size=2, max_size=4))
def test_a_text_alone_has_the_ids_it_has_in_company(kind: str, specials: bool, texts: list[str]) -> None:
    tokenizer = make(kind)
    alone = [tokenizer.encode([text], specials) for text in texts]
    assert alone == [[ids] for ids in tokenizer.encode(texts, specials)]


def test_text_is_lowered_if_the_model_wants_it() -> None:
    kept, lowered = (make("xlmr", max_model_len=64, lowercase=lower) for lower in (False, True))
    assert lowered.encode(["The CAT"]) == kept.encode(["the cat"]) != kept.encode(["The CAT"])


@pytest.mark.parametrize("damage", ["missing", "not json", "empty"])
def test_a_tokenizer_that_cannot_be_loaded_says_so(damage: str, fresh: Callable[[str], Path]) -> None:
    folder = fresh("qwen3")
    if damage == "missing":
        (folder / "tokenizer.json").unlink()
    else:
        (folder / "tokenizer.json").write_text("{" if damage == "not json" else "")
    with pytest.raises(ConfigError, match="tokenizer"):
        Tokenizer.of(load_fast(folder, trust_remote_code=False), max_model_len=8, vocab_size=VOCABULARY)


# ── threads ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_threads_do_not_disturb_each_other() -> None:
    tokenizer = make("bert", max_model_len=64)
    jobs = [
        (["the cat sat on a mat in spain " * (1 + i % 5), "a"][: 1 + i % 2], cut(1 + i % 12, side))
        for i in range(120)
        for side in (None, "left", "right")
    ]
    expected = [tokenizer.prepare(texts, params).token_ids for texts, params in jobs]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            assert list(pool.map(lambda job: tokenizer.prepare(*job).token_ids, jobs)) == expected


# ── back to text ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("unknown", [-1, 5000, 2**40])
def test_unknown_ids_are_skipped_on_the_way_back(unknown: int) -> None:
    tokenizer = make("bert")
    (ids,) = tokenizer.encode(["the cat"])
    assert tokenizer.decode([*ids, unknown]) == "[CLS] the cat [SEP]"
    assert tokenizer.tokens([ids[1], unknown]) == ["the", ""]


@pytest.mark.parametrize("kind", ["eos", "bare"])
@settings(max_examples=50, deadline=None)
@given(text=st.text(min_size=1, max_size=30).filter(lambda text: text.isprintable()))
def test_byte_level_tokens_give_the_text_back(kind: str, text: str) -> None:
    tokenizer = make(kind)
    assert tokenizer.decode(tokenizer.encode([text], add_special_tokens=False)[0]) == text


def test_a_text_ends_as_tokenizer_config_has_it_and_a_contradiction_is_told_of(
    fresh: Callable[[str], Path],
) -> None:
    """As in e5-mistral's files: tokenizer.json lacks the token that tokenizer_config.json wants at the end."""
    for family, says, told in (
        ("qwen3", {"add_eos_token": True}, False),
        ("gemma2", {"add_eos_token": True}, True),
        ("gemma2", {"add_eos_token": False}, False),
        ("gemma2", {}, False),
    ):
        folder = fresh(family)
        tiny.edit_json(folder / "tokenizer_config.json", **says)
        fast = load_fast(folder, trust_remote_code=False)
        assert (fast("a")["input_ids"][-1] == fast.eos_token_id) is (family == "qwen3" or told)
        notice = end_notice(folder, fast)
        assert (notice is not None) is told
        assert not told or "<pad> behind every text" in str(notice)
        shutil.rmtree(folder)


# ── where tokens stand ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("specials", [True, False])
def test_each_piece_is_what_stands_at_its_place(kind: str, specials: bool) -> None:
    tokenizer = make(kind)
    texts = ["the cat sat", "", "rain é in spain"]
    before, after = AFFIXES[kind] if specials else ((), ())
    encoded = tokenizer.encode(texts, specials)
    for text, ids, pieces in zip(texts, encoded, tokenizer.pieces(texts, specials), strict=True):
        assert [piece.token for piece in pieces] == ids
        outer = [*pieces[: len(before)], *pieces[len(pieces) - len(after) :]]
        assert [piece.text for piece in outer] == tokenizer.tokens([*before, *after])
        assert all(piece.start is piece.stop is None for piece in outer)
        for piece in pieces[len(before) : len(pieces) - len(after)]:
            assert piece.text == text[piece.start : piece.stop]


def test_pieces_are_of_text_only() -> None:
    with pytest.raises(InvalidInput):
        make("bert").pieces(["a", "\ud800"])


def test_special_tokens_can_be_left_out_on_the_way_back() -> None:
    tokenizer = make("bert")
    (ids,) = tokenizer.encode(["the cat"])
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the cat"
    assert tokenizer.decode(ids) == "[CLS] the cat [SEP]"
