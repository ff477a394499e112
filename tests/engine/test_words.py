"""Words: the ids are the library's, or there are none; and what is kept has an end."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.normalizers import BertNormalizer

import tiny
from carpool.engine import words
from carpool.engine.hub import locate
from carpool.engine.words import Words


def cased() -> tokenizers.Tokenizer:
    backend = tiny.wordpiece()
    backend.normalizer = BertNormalizer(lowercase=False, clean_text=False)
    return backend


def bundled() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer.from_file(str(locate("") / "tokenizer.json"))
    backend.no_truncation()
    backend.no_padding()
    return backend


def of(backend: tokenizers.Tokenizer) -> Words:
    return Words(backend, backend.get_vocab(with_added_tokens=True))


def by_library(backend: tokenizers.Tokenizer, text: str) -> list[int]:
    ids: list[int] = backend.encode(text, add_special_tokens=False).ids
    return ids


ENGLISH = st.lists(
    st.sampled_from(["The", "cat", "sat", "unable", "playing", "x86", "3.14", "don't", "e-mail", "UTF_8"])
    | st.sampled_from(
        ["don’t", "“Quoted,”", "em—dash", "x[0]", "café", "Łódź", "ſtraße", "10\u00a0km", "co\u00adop"]
    )
    | st.text("abcXYZ019 \t\n\r-.'_~[]’“–…éÅßı\u00a0\u00ad", max_size=6),
    max_size=12,
).map(" ".join)
ANYTHING = st.text(max_size=30) | st.text(st.characters(max_codepoint=0x17F), max_size=30)


@pytest.mark.parametrize("make", [tiny.wordpiece, cased, bundled])
def test_ids_are_those_of_the_library(make: Callable[[], tokenizers.Tokenizer]) -> None:
    backend = make()
    kept = of(backend)

    @settings(deadline=None, max_examples=300)
    @given(ENGLISH | ANYTHING)
    def holds(text: str) -> None:
        for _ in range(2):  # the second time words are known that were new
            ids = kept.encode(text)
            assert ids is None or ids == by_library(backend, text)

    holds()


def test_plain_english_needs_the_library_for_no_more_than_its_new_words() -> None:
    kept = of(bundled())
    text = "Rivers of the northern hemisphere, by length: 6650 km (the Nile) & 6400 km."
    assert kept.encode(text) == by_library(bundled(), text)
    kept._backend = None  # type: ignore[assignment]
    assert kept.encode(text) == by_library(bundled(), text)
    assert kept.encode("") == []


@pytest.mark.parametrize(
    "text", ["nai\u0308ve", "a\x00b", "a\x7fb", "a\x0bb", "a [MASK] b", "a\u200bb", "\u4e2d", "\u0130stanbul"]
)
def test_what_has_more_rules_is_left_to_the_library(text: str) -> None:
    assert of(bundled()).encode(text) is None


def test_european_print_needs_the_library_for_no_more_than_its_new_words() -> None:
    kept = of(bundled())
    text = "“Don’t,” she said – a naïve façade; 10\u00a0°C … in [1] Łódź."
    assert kept.encode(text) is None  # of so many new words a part is learnt
    for _ in range(2):
        kept.encode(text)
    kept._backend = None  # type: ignore[assignment]
    assert kept.encode(text) == by_library(bundled(), text)


def test_a_text_that_may_hold_an_added_token_is_left_to_the_library() -> None:
    backend = bundled()
    backend.add_tokens(["Qux", "two words"])
    kept = of(backend)
    for text in ("a qux b", "a Qux b", "equxb", "[sep]", "Two\nwords"):
        assert kept.encode(text) is None
    for text in ("a b", "[Q]", "two  words"):
        assert kept.encode(text) == by_library(backend, text)


def test_where_added_tokens_are_looked_for_in_cleaned_text_accents_are_left_to_the_library() -> None:
    backend = bundled()
    backend.add_tokens([tokenizers.AddedToken("caféteria", normalized=True)])
    kept = of(backend)
    assert (
        by_library(backend, "Caf\u00e9teria")
        == by_library(backend, "cafeteria")
        == [backend.get_vocab_size() - 1]
    )
    assert kept.encode("Caf\u00e9teria") is None
    assert kept.encode("a cafeteria") is None


def test_of_many_new_words_a_few_are_learnt_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = bundled()
    kept = of(backend)
    text = " ".join(f"zyx{i}q" for i in range(2 * words._NEW_WORDS))
    assert kept.encode(text) is None
    assert kept.encode(text) == by_library(backend, text)


def test_what_is_kept_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = bundled()
    kept = of(backend)
    most = len(kept._known) + 20
    monkeypatch.setattr(words, "_MOST_WORDS", most)
    for i in range(100):
        text = f"the zyx{i}q"
        assert kept.encode(text) == by_library(backend, text)
        assert len(kept._known) <= most + words._NEW_WORDS
    assert kept.encode("q" * 33) is None
    assert "q" * 33 not in kept._known
    assert kept.encode("the " * words._LONGEST_TEXT) is None


def test_only_tokenizers_made_like_berts_have_words() -> None:
    assert Words.fits(tiny.wordpiece())
    assert not Words.fits(tiny.unigram())
    assert not Words.fits(tiny.byte_bpe())
    for part in ("normalizer", "pre_tokenizer"):
        backend = tiny.wordpiece()
        setattr(backend, part, None)
        assert not Words.fits(backend)


def test_they_travel_to_other_processes() -> None:
    kept = pickle.loads(pickle.dumps(of(bundled())))
    assert kept.encode("The cat sat.") == by_library(bundled(), "The cat sat.")
