"""The reference's lax rules, field by field."""

from __future__ import annotations

from typing import Any

import pytest

from carpool.server.errors import InvalidRequest
from carpool.server.lax import read_struct, read_token_id, shown
from carpool.server.protocol import DetokenizeRequest, EmbeddingRequest, PoolingRequest


def embedding(**fields: Any) -> EmbeddingRequest:
    return read_struct(EmbeddingRequest, {"input": "hi", **fields})


def refusal(kind: type[Any] = EmbeddingRequest, **fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        read_struct(kind, fields)
    return caught.value


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (32, 32),
        ("32", 32),
        (" 32 ", 32),
        ("+32", 32),
        ("32.0", 32),
        ("1_000", 1000),
        (32.0, 32),
        (1e2, 100),
        (True, 1),
        (False, 0),
        (2**70, 2**70),
        ("-5", -5),
    ],
)
def test_what_passes_for_an_integer(value: Any, number: int) -> None:
    read = embedding(dimensions=value).dimensions
    assert (read, type(read)) == (number, int)


@pytest.mark.parametrize(
    "value", [32.5, "32.5", "x", "", "1e2", [32], {}, float("nan"), float("inf"), "９" * 5000, "٣", "１２"]
)
def test_what_does_not(value: Any) -> None:
    error = refusal(dimensions=value)
    assert str(error).startswith("dimensions must be an integer, got ")
    assert error.param == "dimensions"


@pytest.mark.parametrize(
    ("value", "truth"),
    [
        (True, True),
        ("true", True),
        ("True", True),
        (1, True),
        (1.0, True),
        ("on", True),
        ("yes", True),
        ("t", True),
        (False, False),
        ("false", False),
        (0, False),
        (0.0, False),
        ("off", False),
        ("no", False),
        ("0", False),
    ],
)
def test_what_passes_for_a_boolean(value: Any, truth: bool) -> None:
    assert embedding(add_special_tokens=value).add_special_tokens is truth


@pytest.mark.parametrize("value", ["maybe", 2, 0.5, "", [], {}])
def test_what_does_not_pass_for_a_boolean(value: Any) -> None:
    assert str(refusal(use_activation=value)).startswith("use_activation must be true or false, got ")


@pytest.mark.parametrize("field", ["model", "user", "request_id"])
@pytest.mark.parametrize("value", [7, 1.5, True, [], {}, ["a"]])
def test_a_text_is_never_made_from_anything_else(field: str, value: Any) -> None:
    error = refusal(**{field: value})
    assert str(error).startswith(f"{field} must be a string, got ")
    assert error.param == field


@pytest.mark.parametrize(
    ("field", "value", "names"),
    [
        ("encoding_format", "hex", "'float', 'base64', 'bytes' or 'bytes_only'"),
        ("encoding_format", "FLOAT", "'float', 'base64', 'bytes' or 'bytes_only'"),
        ("encoding_format", 1, "'float', 'base64', 'bytes' or 'bytes_only'"),
        ("embed_dtype", "int8", "'float32', 'float16', 'bfloat16', 'fp8_e4m3' or 'fp8_e5m2'"),
        ("endianness", "middle", "'native', 'big' or 'little'"),
        ("truncation_side", "middle", "'left' or 'right'"),
        ("padding", "longest", "'max_length' or 'do_not_pad'"),
    ],
)
def test_a_choice_names_what_may_be_chosen(field: str, value: Any, names: str) -> None:
    error = refusal(**{field: value})
    assert f"{field} must be {names}, got " in str(error)
    assert error.param == field


@pytest.mark.parametrize("value", [-2, 2**70, "-2"])
def test_truncation_is_bounded_below(value: Any) -> None:
    if int(value) > 0:
        assert embedding(truncate_prompt_tokens=value).truncate_prompt_tokens == value
    else:
        assert str(refusal(truncate_prompt_tokens=value)).startswith(
            "truncate_prompt_tokens must be an integer of at least -1, got "
        )


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1, 10**30])
def test_priority_has_64_bits(value: int) -> None:
    assert refusal(priority=value).param == "priority"
    assert embedding(priority=2**63 - 1).priority == 2**63 - 1


@pytest.mark.parametrize("value", ["", "x" * 129, "a@b", "a/b", "a\\b", "a\x00b"])
def test_a_cache_salt_is_checked(value: str) -> None:
    assert refusal(cache_salt=value).param == "cache_salt"
    assert embedding(cache_salt="salty").cache_salt == "salty"


@pytest.mark.parametrize(
    "field", ["model", "encoding_format", "dimensions", "user", "priority", "padding", "input"]
)
def test_null_means_absent(field: str) -> None:
    assert read_struct(EmbeddingRequest, {field: None}) == EmbeddingRequest()


@pytest.mark.parametrize(
    ("value", "read"),
    [
        ("text", "text"),
        ("", ""),
        ([], []),
        (["7", "8"], ["7", "8"]),
        ([7.0, 8], [7, 8]),
        ([True, False], [1, 0]),
        ([7, "8"], [7, 8]),
        ([[7, "8"], [True]], [[7, 8], [1]]),
        ([[]], [[]]),
        ([2**63, -1], [2**63, -1]),
        (["a\x00b"], ["a\x00b"]),
    ],
)
def test_what_passes_for_input(value: Any, read: Any) -> None:
    assert embedding(input=value).input == read


@pytest.mark.parametrize(
    ("value", "param"),
    [
        (5, "input"),
        (1.5, "input"),
        (True, "input"),
        ({"text": "a"}, "input"),
        ([None], "input[0]"),
        ([{"role": "user"}, "a"], "input[1]"),
        ([[{"role": "user"}], [1]], "input[1][0]"),
        ([[1], [{"role": "user"}]], "input[1][0]"),
        (["a", 1], "input[1]"),
        (["a", [1]], "input[1]"),
        (["a", None], "input[1]"),
        ([1, "a"], "input[1]"),
        ([[1], "a"], "input[1]"),
        ([[1], 2], "input[1]"),
        ([1.5], "input[0]"),
        ([7, 8, 1.5], "input[2]"),
        ([["a"]], "input[0][0]"),
        ([[[1]]], "input[0][0]"),
        ([[1, 2], [3, None]], "input[1][1]"),
        ([float("nan")], "input[0]"),
        ("a\ud800b", "input"),
        (["a", "\udfff"], "input[1]"),
    ],
)
def test_the_first_item_that_does_not_fit_is_named(value: Any, param: str) -> None:
    error = refusal(input=value)
    assert error.param == param
    assert str(error).startswith(f"{param} ")


def test_a_lone_surrogate_is_refused_in_any_text() -> None:
    assert refusal(user="\ud800").param == "user"


@pytest.mark.parametrize("value", [-1, "a", 1.5, None, [1]])
def test_token_ids_to_detokenize_are_not_negative(value: Any) -> None:
    error = refusal(DetokenizeRequest, tokens=[5, value])
    assert error.param == "tokens[1]"
    assert str(error).startswith("tokens[1] must be an integer of at least 0, got ")


def test_what_is_required_is_named() -> None:
    error = refusal(DetokenizeRequest)
    assert (str(error), error.param) == ("tokens is required.", "tokens")
    assert refusal(DetokenizeRequest, tokens=None).param == "tokens"
    assert str(refusal(DetokenizeRequest, tokens="5")) == 'tokens must be a list, got "5".'


def test_unknown_fields_are_ignored() -> None:
    assert read_struct(PoolingRequest, {"foo": {"bar": [float("nan")]}}) == PoolingRequest()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a", '"a"'),
        ("x" * 100, f'"{"x" * 40}"…'),
        (None, "null"),
        (True, "true"),
        (32.5, "32.5"),
        ([1], "a list"),
        ({}, "an object"),
        (10**50, "a very large number"),
        ("\ud800", '"\\ud800"'),
    ],
)
def test_values_are_quoted_briefly(value: Any, text: str) -> None:
    assert shown(value) == text


@pytest.mark.parametrize("digits", [4300, 4301, 100_000])
def test_a_token_id_of_very_many_digits_is_refused_or_read_but_never_an_accident(digits: int) -> None:
    text = "9" * digits
    if digits <= 4300:
        assert read_token_id(text, "input[0]") == int(text)
    else:
        with pytest.raises(InvalidRequest, match="must be a token id"):
            read_token_id(text, "input[0]")
