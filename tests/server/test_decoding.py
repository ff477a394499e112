"""Bytes in, struct or one sentence out; the strict decoder and the lax rules agree."""

from __future__ import annotations

import json
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from carpool.server.app import ROUTES
from carpool.server.decoding import RequestDecoder, parse
from carpool.server.errors import InvalidRequest
from carpool.server.lax import read_struct
from carpool.server.protocol import EmbeddingRequest, decode_embedding_request

GOOD = b'{"model": "m", "input": "hi"}'


def with_extra(value: bytes) -> bytes:
    return GOOD[:-1] + b', "extra": ' + value + b"}"


@pytest.mark.parametrize(
    "body",
    [
        GOOD,
        with_extra(b"NaN"),
        with_extra(b"-Infinity"),
        with_extra(b"1e999"),
        with_extra(b'"\\ud800"'),
        with_extra(b"[" * 100 + b"]" * 100),
        with_extra(b'"' + b"7" * 5000 + b'"'),
        with_extra('"é"'.encode()),
        b"\xef\xbb\xbf" + GOOD,
        GOOD.decode().encode("utf-16"),
        GOOD.decode().encode("utf-32"),
        b'{"model": "nope", "input": 7, ' + GOOD[1:],
        b" \n" + GOOD + b"\r\n ",
    ],
)
def test_what_python_reads_is_read(body: bytes) -> None:
    assert decode_embedding_request(body) == EmbeddingRequest(model="m", input="hi")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "empty"),
        (b"   ", "empty"),
        (b"null", "object, got null"),
        (b"[]", "object, got a list"),
        (b'"hi"', 'object, got "hi"'),
        (b"7", "object, got 7"),
        (GOOD[:-2], "not valid JSON"),
        (GOOD[:-1] + b",}", "not valid JSON"),
        (b"{'a': 1}", "not valid JSON"),
        (GOOD + GOOD, "not valid JSON"),
        (b"/* hi */" + GOOD, "not valid JSON"),
        (b'{"input": "a\x01b"}', "not valid JSON"),
        (b"\x00\xff\xfe", "not valid JSON"),
        (GOOD[:-1] + b', "user": "\xff\xfe"}', "not UTF-8"),
        (with_extra(b'"\xff\xfe"'), "not UTF-8"),
        (with_extra(b"[" * 5000 + b"]" * 5000), "nested too deeply"),
        (with_extra(b"[" * 500_000), "nested too deeply"),
        (with_extra(b"9" * 5000), "more than 4300 digits"),
        (b'{"input": "a\\ud800b"}', "surrogate"),
        (b'{"input": ["ok", "a\xed\xa0\x80b"]}', "surrogate"),
    ],
)
def test_what_it_does_not_is_refused_in_a_sentence(body: bytes, words: str) -> None:
    with pytest.raises(InvalidRequest, match=r"\.$") as caught:
        decode_embedding_request(body)
    assert words in str(caught.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
likely = st.sampled_from(
    [
        *("float", "base64", "left", "Left", "max_length", "float16", "big", "NONE", "a", True, 0, -1, 5),
        *(
            ["a"],
            [1],
            [[1]],
            ["float"],
            [["a", "b"]],
            {"a": 1},
            [{"role": "a"}],
            [[{"role": "a"}]],
            ["a", {}],
        ),
    ]
)
KINDS = sorted(
    {kind for route in ROUTES if route.request for kind in get_args(route.request) or (route.request,)},
    key=lambda kind: str(kind.__name__),
)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_what_the_strict_decoder_accepts_the_lax_rules_read_alike(kind: Any, data: st.DataObject) -> None:
    names = st.sampled_from([*(field.name for field in msgspec.structs.fields(kind)), "x"])
    document = data.draw(st.dictionaries(names, json_values | likely, max_size=6))
    body = json.dumps(document).encode()
    try:
        strict = msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeError):
        return
    values = (getattr(strict, name, None) for name in ("input", "inputs", "ids"))
    if any(isinstance(value, list) and is_mixed(value) for value in values):
        return  # refused later, by `prompts` and `conversations`
    assert read_struct(kind, parse(body)) == strict


def is_mixed(items: list[Any]) -> bool:
    inner = [item for each in items if isinstance(each, list) for item in each]
    return len(set(map(type, items))) > 1 or len(set(map(type, inner))) > 1


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_mutated_bodies_are_read_or_refused_and_nothing_else(data: st.DataObject) -> None:
    body = bytearray(
        b'{"input": ["a", "b\\u00e9"], "dimensions": 3, "encoding_format": "base64", "user": "\xc3\xa9"}'
    )
    for _ in range(data.draw(st.integers(1, 5))):
        place = data.draw(st.integers(0, len(body) - 1))
        match data.draw(st.sampled_from("rdi")):
            case "r":
                body[place] = data.draw(st.integers(0, 255))
            case "d":
                del body[place : place + data.draw(st.integers(1, 10))]
            case "i":
                body[place:place] = data.draw(
                    st.sampled_from([b"[", b"{", b'"', b"\\ud800", b"NaN", b"1e400", b"\xff"])
                )
        if not body:
            break
    try:
        decode_embedding_request(bytes(body)).prompts()
    except InvalidRequest:
        return


def test_a_decoder_is_made_of_any_struct() -> None:
    class Asked(msgspec.Struct):
        count: int
        name: str | None = None

    decode = RequestDecoder(Asked)
    assert decode(b'{"count": 1}') == Asked(1)
    assert decode(b'{"count": "2", "name": null}') == Asked(2)
    with pytest.raises(InvalidRequest, match="count is required"):
        decode(b"{}")
