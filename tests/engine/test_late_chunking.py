"""Late chunking: rows of tokens averaged in runs, each with its place in the text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import carpool
from carpool.engine.errors import InvalidParameter
from carpool.engine.late_chunking import LateChunk, LateChunkingMetadata, chunk_means
from carpool.engine.llm import LLM
from carpool.engine.params import LateChunkingParams, PoolingParams
from carpool.engine.pools import has_linear_head
from carpool.engine.side_files import Dense

TEXT = "the cat sat on a mat"  # [CLS] and [SEP] around six words


@pytest.fixture(scope="module")
def llm(checkpoint: Callable[[str], Path]) -> Iterator[LLM]:
    made = LLM(str(checkpoint("bert")), dtype="float32", cpu_workers=1)
    yield made
    made.close()


def late(size: int, **options: Any) -> PoolingParams:
    return PoolingParams(late_chunking_params=LateChunkingParams(size), **options)


def test_a_chunk_knows_its_tokens_and_its_characters() -> None:
    offsets = [(0, 0), (0, 1), (2, 3), (2, 3), (4, 6), (0, 0)]
    assert LateChunkingMetadata.of(offsets, 4) == LateChunkingMetadata(
        4, 6, [LateChunk((0, 4), (0, 3)), LateChunk((4, 6), (4, 6))]
    )
    assert [chunk.char_range for chunk in LateChunkingMetadata.of(offsets, 1).chunks] == [
        None,
        (0, 1),
        (2, 3),
        (2, 3),
        (4, 6),
        None,
    ]


def test_means_are_of_each_run_and_of_unit_length_if_asked_for() -> None:
    rows = torch.tensor([[1.0, 0.0], [3.0, 4.0], [0.0, 5.0]])
    assert chunk_means(rows, 2, unit=False).tolist() == [[2.0, 2.0], [0.0, 5.0]]
    assert chunk_means(rows, 2, unit=True).norm(dim=1).tolist() == pytest.approx([1, 1])


@pytest.mark.parametrize("size", [0, -1, 2.5, True, "3", None])
def test_a_chunk_has_at_least_one_token(size: Any) -> None:
    with pytest.raises(InvalidParameter, match="chunk_size must be a positive integer"):
        LateChunkingParams(size)


@pytest.mark.parametrize("unit", [True, False, None])
def test_each_prompt_has_rows_for_its_own_chunks(unit: bool | None, llm: LLM) -> None:
    texts = [TEXT, "rain in spain", TEXT]
    (bare, *_) = llm.encode(TEXT, PoolingParams(use_activation=False), pooling_task="token_embed")
    params = [late(3, use_activation=unit), PoolingParams(), late(100, use_activation=unit)]
    three, plain, one = llm.encode(texts, params, pooling_task="token_embed")
    states = bare.outputs.data
    for output, parts in ((three, states.split(3)), (one, (states,))):
        expected = torch.stack([part.mean(0) for part in parts])
        if unit is not False:
            expected = expected / expected.norm(dim=1, keepdim=True)
        torch.testing.assert_close(output.outputs.data, expected, rtol=0, atol=1e-5)
    assert plain.late_chunking is None
    assert plain.outputs.data.shape == (len(plain.prompt_token_ids), 32)
    assert three.late_chunking is not None
    assert three.late_chunking.input_tokens == len(three.prompt_token_ids) == 8
    assert [TEXT[slice(*chunk.char_range)] for chunk in three.late_chunking.chunks if chunk.char_range] == [
        "the cat",
        "sat on a",
        "mat",
    ]


def test_without_special_tokens_the_text_is_all_there_is(llm: LLM) -> None:
    (output,) = llm.encode(
        TEXT, late(2), pooling_task="token_embed", tokenization_kwargs={"add_special_tokens": False}
    )
    assert output.late_chunking is not None
    assert [chunk.char_range for chunk in output.late_chunking.chunks] == [(0, 7), (8, 14), (15, 20)]


def test_it_is_refused_where_it_means_nothing(llm: LLM) -> None:
    for call, why in (
        (lambda: llm.embed(TEXT, pooling_params=late(2)), "requires token_embed"),
        (lambda: llm.encode(TEXT, late(2), pooling_task="embed&token_embed"), "requires token_embed"),
        (lambda: llm.score(TEXT, TEXT, pooling_params=late(2)), "requires token_embed"),
        (lambda: llm.encode([[5, 6]], late(2), pooling_task="token_embed"), "no token ids"),
        (lambda: llm.encode("", late(2), pooling_task="token_embed"), "not empty"),
        (
            lambda: llm.encode(TEXT, late(2), pooling_task="token_embed", truncate_prompt_tokens=5),
            "truncation or padding",
        ),
        (
            lambda: llm.encode(TEXT, late(2, truncate_prompt_tokens=5), pooling_task="token_embed"),
            "truncation or padding",
        ),
        (
            lambda: llm.encode(
                TEXT, late(2), pooling_task="token_embed", tokenization_kwargs={"padding": "max_length"}
            ),
            "truncation or padding",
        ),
    ):
        with pytest.raises(InvalidParameter, match=f"Late chunking .*{why}"):
            call()
    assert carpool.LateChunkingParams is LateChunkingParams


@pytest.mark.parametrize(
    ("head", "activations", "linear"),
    [
        (None, (), True),
        (nn.Linear(2, 2), (), True),
        (None, ("torch.nn.modules.linear.Identity",), True),
        (None, ("torch.nn.modules.linear.Identity", "torch.nn.modules.activation.Tanh"), False),
        (nn.Sequential(nn.Linear(2, 2), nn.ReLU()), (), False),
    ],
)
def test_a_head_that_bends_vectors_is_found_out(
    head: nn.Module | None, activations: tuple[str, ...], linear: bool
) -> None:
    checkpoint: Any = SimpleNamespace(dense=[Dense(Path(), 2, 2, True, name) for name in activations])
    loaded: Any = SimpleNamespace(head=head)
    assert has_linear_head(checkpoint, loaded) is linear


def test_no_mean_is_taken_behind_a_head_that_bends(checkpoint: Callable[[str], Path]) -> None:
    one = LLM(str(checkpoint("modernbert")), dtype="float32", cpu_workers=1)  # its Dense ends in a tanh
    with pytest.raises(InvalidParameter, match="the head behind its tokens is not linear"):
        one.encode(TEXT, late(2), pooling_task="token_embed")
    one.close()
