"""Prompts and texts in every form that scripts have them in, and what is none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from carpool.engine.errors import InvalidInput
from carpool.engine.prompts import as_list, read_prompt, read_salt, read_texts


def read(prompts: Any) -> list[str | list[int]]:
    return [read_prompt(prompt) for prompt in as_list(prompts)]


@pytest.mark.parametrize(
    ("prompts", "found"),
    [
        ("a", ["a"]),
        ([5, 6], [[5, 6]]),
        ((5, 6), [[5, 6]]),
        ([], []),
        ([[]], [[]]),
        (["a", [5]], ["a", [5]]),
        ({"prompt": "a"}, ["a"]),
        ({"prompt": ""}, [""]),
        ({"prompt": "a", "prompt_token_ids": [5]}, [[5]]),
        ({"prompt_token_ids": []}, [[]]),
        ({"prompt": "a", "multi_modal_data": None, "cache_salt": "x"}, ["a"]),
        (np.array([5, 6]), [[5, 6]]),
        (np.array([[5, 6], [7, 8]]), [[5, 6], [7, 8]]),
        (np.array(["a", "b"]), ["a", "b"]),
        (torch.tensor([5, 6]), [[5, 6]]),
        ([{"prompt_token_ids": np.array([5, 6])}], [[5, 6]]),
        ((text for text in "ab"), ["a", "b"]),
        ({"a": 1, "b": 2}.keys(), ["a", "b"]),
    ],
)
def test_prompts_come_in_many_forms(prompts: Any, found: list[Any]) -> None:
    assert read(prompts) == found


@pytest.mark.parametrize(
    "prompts",
    [None, 3, b"abc", [b"abc"], [3.5], [[3.5]], [5, "a"], [["a", "b"]], [None], {"prompt": 5}, {}, {"text": "a"},
     {"prompt": "a", "data": 1}, {"prompt_embeds": [[0.5]]}, {"prompt_token_ids": "abc"}, {"prompt_token_ids": 5}],
)  # fmt: skip
def test_nothing_else_is_a_prompt(prompts: Any) -> None:
    with pytest.raises(TypeError, match="prompt"):
        read(prompts)


@pytest.mark.parametrize("field", ["multi_modal_data", "multi_modal_uuids", "mm_processor_kwargs"])
def test_what_is_no_text_is_not_passed_over(field: str) -> None:
    with pytest.raises(InvalidInput, match="This model accepts text only"):
        read({"prompt": "a", field: {"image": [1]}})


def test_a_salt_is_a_text() -> None:
    assert read_salt({"prompt": "a", "cache_salt": "x"}) == "x"
    assert read_salt("a") is None
    with pytest.raises(TypeError, match="cache_salt"):
        read_salt({"prompt": "a", "cache_salt": 5})


@pytest.mark.parametrize(
    ("items", "texts"),
    [
        ("a", ["a"]),
        (["a", {"content": "b"}], ["a", "b"]),
        ({"content": [{"type": "text", "text": "a"}, "b"]}, ["a\nb"]),
        ((text for text in "ab"), ["a", "b"]),
    ],
)
def test_a_side_of_pairs_is_texts_plain_or_in_parts(items: Any, texts: list[str]) -> None:
    assert read_texts(items, "data_1") == texts


@pytest.mark.parametrize("items", [None, 5, b"a", [5], {"prompt": "a"}, {"content": []}, [{"content": None}]])
def test_no_side_is_empty_unawares(items: Any) -> None:
    with pytest.raises(TypeError, match=r"data_1.* is a text or"):
        read_texts(items, "data_1")
