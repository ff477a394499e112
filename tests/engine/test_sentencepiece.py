"""Model files of sentencepiece: byte pairs as that has them, and what transformers makes of the rest."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from threading import Event, Thread

import pytest
from tokenizers import AddedToken, Tokenizer

import spm
import tiny
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


WORDS = [("▁", -3.0, spm.NORMAL), *((letter, -6.0, spm.NORMAL) for letter in tiny.LETTERS)]
WORDS += [("▁" + word, -4.0, spm.NORMAL) for word in tiny.WORDS]


def controls(*names: str, unknown: str) -> list[tuple[str, float, int]]:
    return [(name, 0.0, spm.UNKNOWN if name == unknown else spm.CONTROL) for name in names]


@pytest.mark.parametrize(
    ("model_type", "file", "specials", "expected"),
    [
        (
            "xlm-roberta",
            "sentencepiece.bpe.model",
            controls("<unk>", "<s>", "</s>", unknown="<unk>"),
            [("<s>", 0), ("▁the", 47), ("▁cat", 48), ("▁", 4), ("<unk>", 3), ("</s>", 2)],
        ),
        (
            "deberta-v2",
            "spm.model",
            controls("[PAD]", "[CLS]", "[SEP]", "[UNK]", unknown="[UNK]"),
            [("[CLS]", 1), ("▁the", 47), ("▁cat", 48), ("▁", 4), ("[UNK]", 3), ("[SEP]", 2)],
        ),
        (
            "t5",
            "spiece.model",
            controls("<pad>", "</s>", "<unk>", unknown="<unk>"),
            [("▁the", 46), ("▁cat", 47), ("▁", 3), ("<unk>", 2), ("</s>", 1)],
        ),
    ],
)
def test_a_folder_whose_only_tokenizer_is_a_unigram_model_is_read_as_its_family_does(
    model_type: str, file: str, specials: list[tuple[str, float, int]], expected: list[object], tmp_path: Path
) -> None:
    """By transformers, without the packages that it wants for that."""
    spm.write_model(tmp_path / file, specials + WORDS, model_type=spm.UNIGRAM)
    tiny.write_json(tmp_path / "config.json", {"model_type": model_type})
    fast = load_fast(tmp_path, trust_remote_code=False)
    ids = fast("the cat 雨").input_ids
    assert list(zip(fast.convert_ids_to_tokens(ids), ids, strict=True)) == expected


def test_a_folder_whose_only_tokenizer_is_llamas_model_is_read_as_its_family_does(tmp_path: Path) -> None:
    spm.write_model(tmp_path / "tokenizer.model", spm.pieces())
    tiny.write_json(tmp_path / "config.json", {"model_type": "llama"})
    tiny.write_json(
        tmp_path / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
    )
    fast = load_fast(tmp_path, trust_remote_code=False)
    assert fast.convert_ids_to_tokens(fast("the cat ï").input_ids) == [
        "<s>",
        "▁the",
        "▁cat",
        "▁",
        "<0xC3>",
        "<0xAF>",
    ]


def test_what_a_file_does_not_say_is_as_the_protocol_has_it(tmp_path: Path) -> None:
    spm.write_model(tmp_path / "m", controls("<unk>", unknown="<unk>"), model_type=spm.UNIGRAM)
    read = sentencepiece.ModelFile.parse(tmp_path / "m")
    assert (read.trainer_spec.unk_id, read.trainer_spec.bos_id, read.trainer_spec.eos_id) == (0, 1, 2)
    assert (read.trainer_spec.unk_piece, read.trainer_spec.byte_fallback) == ("<unk>", False)
    assert read.pieces == (sentencepiece.Piece("<unk>", 0.0, spm.UNKNOWN),)
    assert read.normalizer_spec.precompiled_charsmap == b""


@pytest.mark.parametrize("content", [b"", b"IQ== 0\nIg== 1\nIw== 2\n", b"\x0a\xff\x01ab", b"\x0a"])
def test_a_file_of_another_kind_is_none(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(content)
    with pytest.raises(ValueError, match="not a sentencepiece model"):
        sentencepiece.ModelFile.parse(tmp_path / "m")


def test_two_that_read_at_once_leave_transformers_as_it_was() -> None:
    converter = import_module("transformers.convert_slow_tokenizer")
    published = converter.SentencePieceExtractor
    one_in, one_out, other_in = Event(), Event(), Event()

    def one() -> None:
        with sentencepiece.read_by_transformers():
            one_in.set()
            other_in.wait(0.1)  # it may not come in
        one_out.set()

    def other() -> None:
        assert one_in.wait(20)
        with sentencepiece.read_by_transformers():
            other_in.set()
            assert one_out.wait(20)

    threads = [Thread(target=one), Thread(target=other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert converter.SentencePieceExtractor is published
