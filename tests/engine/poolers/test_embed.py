"""Embedding pools, on hidden states made by hand: what is pooled, cut and given unit length, text by text."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tiny
from asking import ask
from carpool import LLM
from carpool.engine.errors import InvalidParameter
from carpool.engine.params import PoolingParams, Task
from carpool.engine.poolers.embed import EmbedHead, EmbedPool, TokenEmbedPool
from carpool.engine.poolers.pooler import Pool
from carpool.engine.sequence import Sequence
from carpool.engine.side_files import PoolingMode
from head_oracle import close

WIDTH = 6
LENGTHS = [3, 1, 4]


def hidden(lengths: Seq[int] = LENGTHS, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Rows of each text."""
    torch.manual_seed(1)
    return list(torch.split((torch.randn(sum(lengths), WIDTH) * 3).to(dtype), list(lengths)))


def run(
    pool: Pool, rows: Seq[Tensor], params: Seq[PoolingParams] | None = None, task: Task = "embed"
) -> list[Tensor]:
    lengths = list(map(len, rows))
    each = params or [PoolingParams()] * len(rows)
    sequences = [Sequence(0, i, [1] * len(text), each[i], task) for i, text in enumerate(rows)]
    return [
        torch.from_numpy(row)
        for row in ask(pool, torch.cat(list(rows)), lengths, range(len(rows)), sequences)
    ]


def unit(x: Tensor) -> Tensor:
    unit_length: Tensor = x / x.norm(dim=-1, keepdim=True)
    return unit_length


def head(dense: Seq[nn.Module] = (), normalize: bool = True, dimensions: int | None = None) -> EmbedHead:
    return EmbedHead(dense, normalize, dimensions)


# By hand, one text [tokens, H] at a time.
BY_HAND: dict[Any, Any] = {
    "cls": lambda rows: rows[0],
    "last": lambda rows: rows[-1],
    "mean": lambda rows: rows.sum(0) / len(rows),
    "max": lambda rows: torch.stack([column.max() for column in rows.T]),
    "mean_sqrt_len": lambda rows: rows.sum(0) / len(rows) ** 0.5,
    "weighted_mean": lambda rows: (
        sum((i + 1) * row for i, row in enumerate(rows)) / sum(range(1, len(rows) + 1))
    ),
}


@pytest.mark.parametrize("mode", BY_HAND)
def test_each_mode_pools_what_it_names(mode: Any) -> None:
    for found, rows in zip(run(EmbedPool((mode,), head(normalize=False)), hidden()), hidden(), strict=True):
        assert close(found, BY_HAND[mode](rows))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(sorted(BY_HAND)), min_size=1, max_size=4))
def test_several_modes_are_put_side_by_side_in_their_order(modes: list[Any]) -> None:
    for found, rows in zip(run(EmbedPool(modes, head()), hidden()), hidden(), strict=True):
        assert close(found, unit(torch.cat([BY_HAND[mode](rows) for mode in modes])))


def test_neighbours_may_differ_in_width_and_in_length() -> None:
    params = [PoolingParams(dimensions=2), PoolingParams(use_activation=False), PoolingParams()]
    first, second, third = run(EmbedPool(("cls",), head()), hidden(), params)
    a, b, c = (rows[0] for rows in hidden())
    assert close(first, unit(a[:2]))
    assert close(second, b)
    assert close(third, unit(c))


def test_dense_layers_come_before_the_cut_and_the_cut_before_the_length() -> None:
    torch.manual_seed(2)
    layers = [nn.Sequential(nn.Linear(WIDTH, 9), nn.Tanh()), nn.Linear(9, 5)]
    for layer in layers:
        layer.requires_grad_(False)
    (found,) = run(EmbedPool(("mean",), head(layers)), hidden([4]), [PoolingParams(dimensions=3)])
    through = layers[1](layers[0](hidden([4])[0].mean(0)))
    assert close(found, unit(through[:3]))


def test_what_the_operator_set_holds_for_those_who_do_not_say() -> None:
    pool = EmbedPool(("cls",), head(normalize=False, dimensions=4))
    params = [PoolingParams(), PoolingParams(dimensions=2), PoolingParams(use_activation=True)]
    rows = hidden()
    found = run(pool, rows, params)
    expected = [rows[0][0][:4], rows[1][0][:2], unit(rows[2][0][:4])]
    assert all(close(a, b) for a, b in zip(found, expected, strict=True))


def test_a_vector_of_zeros_stays_one() -> None:
    (found,) = run(EmbedPool(("cls",), head()), [torch.zeros(2, WIDTH)])
    assert close(found, torch.zeros(WIDTH))


def test_every_token_has_a_vector_of_its_own() -> None:
    params = [PoolingParams(), PoolingParams(use_activation=False), PoolingParams(dimensions=2)]
    rows = hidden()
    found = run(TokenEmbedPool(head()), rows, params, "token_embed")
    expected = [unit(rows[0]), rows[1], unit(rows[2][:, :2])]
    assert all(close(a, b) for a, b in zip(found, expected, strict=True))


def test_16_bit_rows_are_pooled_in_float32() -> None:
    rows = hidden([200], torch.bfloat16)
    (found,) = run(EmbedPool(("mean",), head(normalize=False)), rows)
    assert found.dtype == torch.float32
    assert close(found, rows[0].float().mean(0))


def test_only_the_texts_of_the_task_are_answered() -> None:
    rows = hidden()
    sequence = Sequence(0, 2, [1] * 4, PoolingParams(), "embed")
    (found,) = ask(EmbedPool(("last",), head()), torch.cat(rows), LENGTHS, [2], [sequence])
    assert close(torch.from_numpy(found), unit(rows[2][-1]))
    (found,) = ask(TokenEmbedPool(head()), torch.cat(rows), LENGTHS, [2], [sequence])
    assert close(torch.from_numpy(found), unit(rows[2]))


# ── prompts that are left out ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mode", ["cls", "last", "mean", "max", "mean_sqrt_len"])
def test_a_prompt_that_is_not_pooled_has_no_part_in_the_result(mode: PoolingMode) -> None:
    """Of a text that is nothing else, the last row is all there is; texts out of order, and one twice."""
    rows, skips, places = hidden(), [1, 3, 0, 2], [2, 0, 1, 2]
    sequences = [
        Sequence(0, i, [1] * LENGTHS[place], PoolingParams(), skip=skip)
        for i, (place, skip) in enumerate(zip(places, skips, strict=True))
    ]
    found = ask(EmbedPool([mode], head()), torch.cat(rows), LENGTHS, places, sequences)
    for place, skip, ours in zip(places, skips, found, strict=True):
        kept = rows[place][skip:] if skip < LENGTHS[place] else rows[place][-1:]
        assert close(torch.from_numpy(ours), unit(BY_HAND[mode](kept)))


def test_equals_sentence_transformers_where_the_prompt_is_left_out(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    prompt, texts = "the cat sat on ", ["rain in spain", "a mat", "ice cream and war and peace"]
    tiny.bert(tmp_path)
    tiny.edit_json(tmp_path / "1_Pooling" / "config.json", include_prompt=False)
    model = SentenceTransformer(str(tmp_path), device="cpu")
    llm = LLM(str(tmp_path), dtype="float32", cpu_workers=1)
    both = [prompt + text for text in texts]
    found = [
        torch.tensor([answer.outputs.embedding for answer in llm.embed(both, tokenization_kwargs=kwargs)])
        for kwargs in ({"prompt": prompt}, {})
    ]
    with pytest.raises(InvalidParameter, match="cannot be cut on the left"):
        llm.embed(both, tokenization_kwargs={"prompt": prompt, "max_length": 4, "truncation_side": "left"})
    llm.close()
    truths = (
        model.encode(texts, prompt=prompt, convert_to_tensor=True),
        model.encode(both, convert_to_tensor=True),
    )
    assert all(close(ours, truth) for ours, truth in zip(found, truths, strict=True))
    assert not close(*found), "leaving the prompt out matters"
