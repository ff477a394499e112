"""Scribes: a query and a document as the token ids that their model was trained on."""

from __future__ import annotations

import pytest

from carpool.engine.errors import ConfigError
from carpool.engine.late_interaction import Expansion, RoleText, Writing
from carpool.engine.params import TokenizationParams
from carpool.engine.roles import Scribe
from carpool.engine.tokenizer import Tokenizer
from tiny import wordpiece

VOCABULARY = {"[Q]": 50, "[D] ": 51, ",": 60, ".": 61}
MASK = 4


def scribe(writing: Writing, mask: int | None = MASK) -> Scribe:
    return Scribe.of(writing, VOCABULARY.get, mask)


def test_the_marker_stands_behind_the_first_token() -> None:
    assert scribe(Writing(("[Q] ", "[Q]"))).write([2, 10, 11, 3], 100) == ([2, 50, 10, 11, 3], None)
    assert scribe(Writing(("[D] ", "[D]"))).write([2, 3], 100) == ([2, 51, 3], None)


def test_a_marker_that_is_no_word_is_spelled_if_the_files_name_it() -> None:
    known, unknown = Writing(("[Q]",), "[Q] ", "find: "), Writing(("[X]",), "[X] ", "find: ")
    assert (scribe(known).marker, scribe(known).prompt) == (50, "find: ")
    assert (scribe(unknown).marker, scribe(unknown).prompt) == (None, "[X] find: ")
    assert scribe(Writing(("[X]",))).prompt == ""


@pytest.mark.parametrize(("attends", "unseen"), [(False, 4), (True, None)])
def test_a_query_is_filled_up(attends: bool, unseen: int | None) -> None:
    written = scribe(Writing(("[Q]",), length=8, expansion=Expansion(8, attends)))
    assert written.write([2, 10, 3], 100) == ([2, 50, 10, 3, MASK, MASK, MASK, MASK], unseen)
    assert written.write([2, 10, 3], 6) == ([2, 50, 10, 3, MASK, MASK], unseen)
    assert written.write([2, *range(10, 15), 3], 100) == ([2, 50, *range(10, 15), 3], None)


def test_what_fills_it_is_the_files_word_or_the_mask() -> None:
    assert scribe(Writing(expansion=Expansion(3, token=","))).filler == 60
    with pytest.raises(ConfigError, match=r"expanded by \[X\], which the vocabulary lacks"):
        scribe(Writing(expansion=Expansion(3, token="[X]")))
    with pytest.raises(ConfigError, match="expanded by a mask token"):
        scribe(Writing(expansion=Expansion(3)), mask=None)


def test_words_that_take_no_part_are_those_of_the_vocabulary() -> None:
    assert scribe(Writing(skipped=(",", ".", ";"))).skipped == {60, 61}


@pytest.mark.parametrize(
    ("length", "limit", "room"), [(None, None, None), (9, None, 8), (None, 5, 4), (9, 5, 4), (1, 9, 1)]
)
def test_the_marker_has_its_place_in_the_length(
    length: int | None, limit: int | None, room: int | None
) -> None:
    assert scribe(Writing(("[Q]",), length=length)).room(limit) == room


def tokenizer(**scribes: Writing) -> Tokenizer:
    backend = wordpiece()
    made = {role: Scribe.of(writing, backend.token_to_id, MASK) for role, writing in scribes.items()}
    return Tokenizer(backend, max_model_len=16, vocab_size=1000, scribes=made)  # type: ignore[arg-type]


def test_the_tokenizer_writes_each_text_in_its_role() -> None:
    texts = [RoleText("document", "cat mat cat mat"), RoleText("query", "cat"), RoleText("document", "cat")]
    own = tokenizer(
        query=Writing(("[UNK]",), expansion=Expansion(6)), document=Writing(prompt="a ", length=5)
    )
    cat, mat, a, cls, sep, unk = own.ids_of(["cat", "mat", "a", "[CLS]", "[SEP]", "[UNK]"])
    prepared = own.prepare(texts, TokenizationParams())
    assert prepared.token_ids == [
        [cls, a, cat, mat, sep],
        [cls, unk, cat, sep, MASK, MASK],
        [cls, a, cat, sep],
    ]
    assert prepared.unseen == [None, 4, None]


def test_without_scribes_roles_are_texts() -> None:
    own = tokenizer()
    prepared = own.prepare([RoleText("query", "cat"), RoleText("document", "cat")], TokenizationParams())
    assert prepared.token_ids == own.encode(["cat", "cat"])
