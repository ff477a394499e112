"""A small `tokenizer.model`: a byte-pair model in sentencepiece's format, written by hand."""

from __future__ import annotations

import struct
from collections.abc import Sequence as Seq
from pathlib import Path

import tiny

CONTROL, UNKNOWN, NORMAL, BYTE = 3, 2, 1, 6
BPE, UNIGRAM = 2, 1


def pieces() -> list[tuple[str, float, int]]:
    """<unk> 0, <s> 1, </s> 2, an unused one, all bytes, single characters, and words letter by letter."""
    made = [
        ("<unk>", 0.0, UNKNOWN),
        ("<s>", 0.0, CONTROL),
        ("</s>", 0.0, CONTROL),
        ("[UNUSED_TOKEN_1]", 0.0, NORMAL),
    ]
    made += [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    pairs = ["▁▁", "▁▁▁▁"]
    for word in tiny.WORDS:
        pairs += ["▁" + word[: i + 1] for i in range(len(word))]
    made += [(pair, -float(rank), NORMAL) for rank, pair in enumerate(dict.fromkeys(pairs))]
    return made + [(letter, -1000.0 - rank, NORMAL) for rank, letter in enumerate("▁" + tiny.LETTERS)]


def write_model(
    path: Path,
    entries: Seq[tuple[str, float, int]],
    *,
    model_type: int = BPE,
    dummy_prefix: bool = True,
) -> None:
    """ModelProto: pieces (1), trainer_spec (2) with model_type (3), normalizer_spec (3) with add_dummy_prefix (3)."""
    message = b""
    for text, score, kind in entries:
        inner = _bytes(1, text.encode()) + _key(2, 5) + struct.pack("<f", score) + _number(3, kind)
        message += _bytes(1, inner)
    message += _bytes(2, _number(3, model_type) + _number(4, 70000))
    message += _bytes(3, _bytes(1, b"identity") + _number(3, int(dummy_prefix)))
    path.write_bytes(message)


def _key(field: int, wire: int) -> bytes:
    return _varint(field << 3 | wire)


def _number(field: int, value: int) -> bytes:
    return _key(field, 0) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _key(field, 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])
