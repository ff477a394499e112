"""SentencePiece: a byte-pair `tokenizer.model` as a fast tokenizer, for folders that have no tokenizer.json.

InternLM2's repositories ship the model file and Python code to read it; what that code makes of it is made here.
The file is a protocol buffer of which four fields matter.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE

_SPACE = "▁"  # what sentencepiece writes for a blank
_BPE = 2  # TrainerSpec.model_type; 1 would be a unigram model


def read(path: Path, added: Mapping[int, AddedToken]) -> Tokenizer:
    """The tokenizer in `path`; `added` are tokens that stand at the places of some of its pieces, or behind them.

    Raises ValueError for a file that holds something else than byte pairs.
    """
    pieces: list[tuple[str, float]] = []
    kind, dummy_prefix = 1, True  # as the protocol has it where a file does not say
    for field, value in _fields(path.read_bytes()):
        if field == 1:
            pieces.append(_piece(value))
        elif field == 2:
            kind = _number(value, 3, kind)
        elif field == 3:
            dummy_prefix = bool(_number(value, 3, dummy_prefix))
    if kind != _BPE or not pieces:
        raise ValueError(f"{path.name} is not a byte-pair model; save a tokenizer.json with it")
    names = [added[i].content if i in added else piece for i, (piece, _) in enumerate(pieces)]
    vocabulary = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(
        BPE(
            vocabulary,
            _merges(dict(pieces), vocabulary),
            unk_token=names[0],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    blank = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.Prepend(_SPACE), blank]) if dummy_prefix else blank
    )
    strip = [decoders.Strip(" ", 1, 0)] if dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    tokenizer.add_special_tokens([token for _, token in sorted(added.items())])
    astray = [token.content for i, token in added.items() if tokenizer.token_to_id(token.content) != i]
    if astray:
        raise ValueError(f"the added tokens {astray} do not follow the pieces of {path.name}")
    return tokenizer


def _merges(scores: Mapping[str, float], vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    """Two pieces become one wherever their sum is a piece, those of the highest score first."""
    ranked: list[tuple[float, str, str]] = []
    for piece, score in scores.items():
        halves = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        ranked += [(score, *half) for half in halves if half[0] in vocabulary and half[1] in vocabulary]
    ranked = [row for row in ranked if row[1] + row[2] in vocabulary]
    ranked.sort(key=lambda row: row[0], reverse=True)
    return [(left, right) for _, left, right in ranked]


def _piece(message: bytes) -> tuple[str, float]:
    """SentencePiece: its text and its score."""
    fields = dict(_fields(message))
    (score,) = struct.unpack("<f", fields.get(2, bytes(4)))
    return fields[1].decode(), score


def _number(message: bytes, field: int, otherwise: int) -> int:
    return next((int.from_bytes(value, "big") for at, value in _fields(message) if at == field), otherwise)


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Each field of a protocol buffer message: which it is, and its value; of a whole number, its 10 bytes."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        field, wire = key >> 3, key & 7
        if wire == 0:
            number, at = _varint(message, at)
            yield field, number.to_bytes(10, "big")
        elif wire in (1, 2, 5):
            length = 8 if wire == 1 else 4
            if wire == 2:
                length, at = _varint(message, at)
            yield field, message[at : at + length]
            at += length
        else:
            raise ValueError("this is not a sentencepiece model")


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """The number that begins at `at`, seven bits a byte, and where it ends."""
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
