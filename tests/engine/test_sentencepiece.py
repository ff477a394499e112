"""tokenizer.model: byte pairs as sentencepiece itself has them, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer

import spm
from carpool.engine import sentencepiece
from carpool.engine.errors import ConfigError
from carpool.engine.fast_tokenizer import load_fast
from zoo.decoders_translated import internlm2_reward

ADDED = {1: AddedToken("<s>", special=True), 3: AddedToken("<|im_end|>", special=True)}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    spm.write_model(tmp_path / "tokenizer.model", spm.pieces())
    return tmp_path / "tokenizer.model"


def tokens(tokenizer: Tokenizer, text: str) -> list[str]:
    return list(tokenizer.encode(text).tokens)


def test_pieces_are_merged_by_score(model: Path) -> None:
    tokenizer = sentencepiece.read(model, ADDED)
    assert tokens(tokenizer, "the cat") == ["▁the", "▁cat"]
    assert tokens(tokenizer, "a  b") == ["▁a", "▁▁", "b"]  # two blanks come before a letter and a blank


def test_what_has_no_piece_is_bytes(model: Path) -> None:
    tokenizer = sentencepiece.read(model, ADDED)
    assert tokens(tokenizer, "ï") == ["▁", "<0xC3>", "<0xAF>"]
    assert tokenizer.decode(tokenizer.encode("naïve 雨").ids) == "naïve 雨"


@pytest.mark.parametrize(("dummy", "first"), [(True, "▁the"), (False, "t")])
def test_a_blank_before_the_text_where_the_file_wants_one(dummy: bool, first: str, tmp_path: Path) -> None:
    spm.write_model(tmp_path / "m", spm.pieces(), dummy_prefix=dummy)
    tokenizer = sentencepiece.read(tmp_path / "m", ADDED)
    assert tokens(tokenizer, "the")[0] == first
    assert tokenizer.decode(tokenizer.encode("the").ids) == "the"


def test_an_added_token_takes_the_place_of_a_piece(model: Path) -> None:
    tokenizer = sentencepiece.read(model, ADDED)
    assert tokenizer.token_to_id("<|im_end|>") == 3
    assert tokens(tokenizer, "a<|im_end|>a") == ["▁a", "<|im_end|>", "▁a"]


def test_an_added_token_that_would_land_elsewhere_is_refused(model: Path) -> None:
    with pytest.raises(ValueError, match="do not follow"):
        sentencepiece.read(model, {10**6: AddedToken("<far>", special=True)})


def test_a_unigram_model_is_refused(tmp_path: Path) -> None:
    spm.write_model(tmp_path / "m", spm.pieces(), model_type=spm.UNIGRAM)
    with pytest.raises(ValueError, match="not a byte-pair model"):
        sentencepiece.read(tmp_path / "m", {})


def test_a_folder_s_tokenizer_is_made_of_it(tmp_path: Path) -> None:
    """InternLM2's: <s> in front, nothing behind, its chat template and special tokens in place."""
    internlm2_reward(tmp_path)
    fast = load_fast(tmp_path, trust_remote_code=False)
    assert fast.convert_ids_to_tokens(fast("a cat<|im_end|>").input_ids) == ["<s>", "a", "▁cat", "<|im_end|>"]
    assert (fast.eos_token_id, fast.pad_token_id, fast.unk_token_id) == (2, 2, 0)
    assert fast.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "a<|im_end|>"


def test_a_folder_with_a_model_that_is_none_is_refused_in_a_sentence(tmp_path: Path) -> None:
    internlm2_reward(tmp_path)
    spm.write_model(tmp_path / "tokenizer.model", spm.pieces(), model_type=spm.UNIGRAM)
    with pytest.raises(ConfigError, match=r"tokenizer\.model is not a byte-pair model"):
        load_fast(tmp_path, trust_remote_code=False)
