"""Hashing: the names under which computed blocks of a prompt are found again."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Seq
from hashlib import blake2b

# What beside the tokens changes keys and values, or must not be shared: the adapter, a salt, where token types change.
Extra = tuple["int | str | bytes | Extra | None", ...]

_DIGEST_BYTES = 16
_ID_BYTES = array("i").itemsize


def block_hashes(token_ids: Seq[int], block_size: int, extra: Extra = ()) -> list[bytes]:
    """A hash of 16 bytes for each full block of `block_size` tokens, in order; none for what is left at the end.

    A block's is the hash of everything from `extra` to the block's last token: keys and values depend on all that lies
    before them, so equal hashes mean equal prefixes, and where two prompts differ once they differ from there on.
    """
    if block_size < 1:
        raise ValueError(f"a block holds at least one token, not {block_size}")
    state = blake2b(encoded(extra), digest_size=_DIGEST_BYTES)
    tokens = memoryview(array("i", token_ids)).cast("B")
    step = block_size * _ID_BYTES
    hashes = []
    for end in range(step, len(tokens) + 1, step):
        state.update(tokens[end - step : end])
        hashes.append(state.digest())
    return hashes


def encoded(value: int | str | bytes | Extra | None) -> bytes:
    """Kind, length, content: no two values give the same bytes, and none is the beginning of another's.

    So whatever tokens follow, what is hashed can be read in one way only.
    """
    match value:
        case None:
            kind, content = b"n", b""
        case int():
            kind, content = b"i", b"%d" % value
        case str():
            kind, content = b"s", value.encode("utf-8", "surrogatepass")  # JSON can hold half a pair
        case bytes():
            kind, content = b"b", value
        case tuple():
            kind, content = b"t", b"".join(map(encoded, value))
        case _:
            raise TypeError(f"prefixes are told apart by int, str, bytes, None and tuples, not {type(value)}")
    return kind + len(content).to_bytes(8, "little") + content
