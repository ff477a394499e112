"""SentencePiece: its model files (`tokenizer.model`, `spiece.model` …), for folders that have no tokenizer.json.

transformers makes fast tokenizers of them if two packages more are installed, which read the file: a protocol buffer
of which a dozen fields matter. They are read here instead (`read_by_transformers`). InternLM2's repositories ship the
file with Python code of their own; what that makes of it is made here (`read`).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from threading import Lock

from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE

_SPACE = "▁"  # what sentencepiece writes for a blank
_BPE = 2  # TrainerSpec.model_type; 1 would be a unigram model
_reading = Lock()  # two that exchange what is transformers' at once would not both put back what was there


@dataclass(frozen=True, slots=True)
class Piece:
    """An entry of the vocabulary. `type` is 1 of most; 2 unknown, 3 control, 4 defined by the user, 6 a byte."""

    piece: str
    score: float
    type: int


@dataclass(frozen=True, slots=True)
class TrainerSpec:
    """As the protocol has it where a file does not say; a negative id is of a token that there is not."""

    model_type: int = 1
    byte_fallback: bool = False
    unk_id: int = 0
    bos_id: int = 1
    eos_id: int = 2
    unk_piece: str = "<unk>"
    bos_piece: str = "<s>"
    eos_piece: str = "</s>"


@dataclass(frozen=True, slots=True)
class NormalizerSpec:
    """`precompiled_charsmap` replaces characters; `add_dummy_prefix`: a text begins with a blank."""

    precompiled_charsmap: bytes = b""
    add_dummy_prefix: bool = True


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A model file, its names those of the protocol, by which transformers asks for them."""

    pieces: tuple[Piece, ...]
    trainer_spec: TrainerSpec
    normalizer_spec: NormalizerSpec

    @classmethod
    def parse(cls, path: Path) -> ModelFile:
        """Raises ValueError for a file that holds something else."""
        pieces: list[Piece] = []
        trainer, normalizer = TrainerSpec(), NormalizerSpec()
        try:
            for field, value in _fields(path.read_bytes()):
                if field == 1:
                    pieces.append(_piece(value))
                elif field == 2:
                    trainer = _trainer(value)
                elif field == 3:
                    own = dict(_fields(value))
                    normalizer = NormalizerSpec(own.get(2, b""), bool(_number(own, 3, 1)))
        except (IndexError, KeyError, struct.error, UnicodeDecodeError) as error:
            raise ValueError(f"{path.name} is not a sentencepiece model") from error
        if not pieces:
            raise ValueError(f"{path.name} is not a sentencepiece model")
        return cls(tuple(pieces), trainer, normalizer)


@contextmanager
def read_by_transformers() -> Iterator[None]:
    """Within this block transformers reads model files as this module does, whatever else is installed."""
    # By its full name: transformers' own attribute of that name may be the function in it.
    converter = import_module("transformers.convert_slow_tokenizer")
    with _reading:
        published = converter.SentencePieceExtractor

        class Extractor(published):  # type: ignore[misc, valid-type]
            def __init__(self, model: str) -> None:
                self.proto = ModelFile.parse(Path(model))

        converter.SentencePieceExtractor = Extractor  # type: ignore[attr-defined]
        try:
            yield
        finally:
            converter.SentencePieceExtractor = published  # type: ignore[attr-defined]


def read(path: Path, added: Mapping[int, AddedToken]) -> Tokenizer:
    """The tokenizer in `path`; `added` are tokens that stand at the places of some of its pieces, or behind them.

    Raises ValueError for a file that holds something else than byte pairs.
    """
    model = ModelFile.parse(path)
    pieces = [(piece.piece, piece.score) for piece in model.pieces]
    dummy_prefix = model.normalizer_spec.add_dummy_prefix
    if model.trainer_spec.model_type != _BPE:
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


def _piece(message: bytes) -> Piece:
    fields = dict(_fields(message))
    (score,) = struct.unpack("<f", fields.get(2, bytes(4)))
    return Piece(fields[1].decode(), score, _number(fields, 3, 1))


def _trainer(message: bytes) -> TrainerSpec:
    fields = dict(_fields(message))
    return TrainerSpec(
        model_type=_number(fields, 3, 1),
        byte_fallback=bool(_number(fields, 35, 0)),
        unk_id=_number(fields, 40, 0),
        bos_id=_number(fields, 41, 1),
        eos_id=_number(fields, 42, 2),
        unk_piece=fields.get(45, b"<unk>").decode(),
        bos_piece=fields.get(46, b"<s>").decode(),
        eos_piece=fields.get(47, b"</s>").decode(),
    )


def _number(fields: Mapping[int, bytes], field: int, otherwise: int) -> int:
    """A whole number, which the protocol has in 64 bits of two's complement."""
    if field not in fields:
        return otherwise
    value = int.from_bytes(fields[field], "big")
    return value - 2**64 if value >= 2**63 else value


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
            if at + length > len(message):
                raise ValueError("this is not a sentencepiece model")
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
