"""Classification pools, on hidden states and heads made by hand."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from asking import ask, packed_of, read
from carpool.engine.params import PoolingParams, Task
from carpool.engine.poolers.classify import ClassifyHead, ClassifyPool, TokenClassifyPool, activation_named
from carpool.engine.poolers.methods import METHODS
from carpool.engine.poolers.pooler import Pool, Pooler
from carpool.engine.sequence import Sequence
from head_oracle import close

TAG = 9
SOFTMAX = activation_named("softmax")


def weights(labels: int = 3, hidden: int = 4) -> nn.Linear:
    torch.manual_seed(labels)
    return nn.Linear(hidden, labels).requires_grad_(False)


def packed(lengths: Seq[int], hidden: int = 4) -> tuple[Tensor, Tensor]:
    """Hidden states [T, H] and cu_seqlens of texts of these lengths."""
    torch.manual_seed(5)
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    return torch.randn(int(bounds[-1]), hidden), bounds


def texts(
    lengths: Seq[int], task: Task = "classify", params: Seq[PoolingParams] = (), **more: Any
) -> list[Sequence]:
    each = params or [PoolingParams()] * len(lengths)
    ids = more.get("ids") or [list(range(length)) for length in lengths]
    return [Sequence(0, i, ids[i], own, task) for i, own in enumerate(each)]


def results(pool: Pool, lengths: Seq[int], sequences: list[Sequence]) -> list[Tensor]:
    hidden, _ = packed(lengths)
    return [torch.from_numpy(row) for row in ask(pool, hidden, lengths, range(len(lengths)), sequences)]


# ── whole texts ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mode", ["cls", "last", "mean"])
def test_a_text_is_pooled_then_put_through_the_head_then_activated(mode: Any) -> None:
    lengths, head = [3, 1, 5], weights()
    hidden, bounds = packed(lengths)
    pooled = {"cls": bounds[:-1], "last": bounds[1:] - 1}
    rows = METHODS["mean"](hidden, bounds) if mode == "mean" else hidden[pooled[mode].long()]
    found = results(ClassifyPool(mode, ClassifyHead(head, SOFTMAX)), lengths, texts(lengths))
    assert all(close(row, theirs) for row, theirs in zip(found, head(rows).softmax(-1), strict=True))


def test_a_late_head_pools_logits_not_rows() -> None:
    """It matters where the head bends: a mean of squares is not the square of the mean."""

    class Squares(nn.Module):
        def forward(self, rows: Tensor) -> Tensor:
            return rows**2

    lengths = [3, 2]
    hidden, _ = packed(lengths)
    pool = ClassifyPool("mean", ClassifyHead(Squares(), activation_named("identity")), late=True)
    for row, text in zip(results(pool, lengths, texts(lengths)), torch.split(hidden, lengths), strict=True):
        assert close(row, (text**2).mean(0))


def test_neighbours_may_differ_in_what_they_want() -> None:
    lengths, head = [2, 3, 4], weights()
    wishes = [PoolingParams(use_activation=wish) for wish in (True, False, None)]
    hidden, bounds = packed(lengths)
    logits = head(METHODS["cls"](hidden, bounds))
    pool = ClassifyPool("cls", ClassifyHead(head, SOFTMAX))
    yes, no, default = results(pool, lengths, texts(lengths, params=wishes))
    assert close(yes, logits[0].softmax(-1))
    assert close(no, logits[1])
    assert close(default, logits[2].softmax(-1))


def test_a_head_may_leave_its_logits_alone_by_default() -> None:
    lengths, head = [2, 2], weights()
    wishes = [PoolingParams(), PoolingParams(use_activation=True)]
    hidden, bounds = packed(lengths)
    logits = head(METHODS["last"](hidden, bounds))
    pool = ClassifyPool("last", ClassifyHead(head, SOFTMAX, by_default=False))
    default, yes = results(pool, lengths, texts(lengths, params=wishes))
    assert close(default, logits[0])
    assert close(yes, logits[1].softmax(-1))


def test_calibration_comes_before_the_activation() -> None:
    head = weights(labels=1)
    rows = torch.randn(4, 4)
    calibrated = ClassifyHead(head, torch.sigmoid, logit_mean=2.65, logit_sigma=0.5)
    assert close(calibrated.calibrated(calibrated.logits(rows)), (head(rows) - 2.65) / 0.5)
    hidden, _ = packed([2])
    (row,) = results(ClassifyPool("cls", calibrated), [2], texts([2]))
    assert close(row, torch.sigmoid((head(hidden[:1]) - 2.65) / 0.5)[0])


@pytest.mark.parametrize("alias", ["normalize", "softmax", "activation"])
def test_older_names_of_the_wish_are_understood(alias: str) -> None:
    older: dict[str, Any] = {alias: False}
    assert PoolingParams(**older).use_activation is False
    assert PoolingParams(**older, use_activation=True).use_activation is True


@pytest.mark.parametrize(
    ("name", "expected"),
    [("identity", [0.0, 1.0]), ("sigmoid", [0.5, 0.7310586]), ("softmax", [0.2689414, 0.7310586])],
)
def test_activations_by_name_go_over_the_labels(name: str, expected: list[float]) -> None:
    found = activation_named(name)(torch.tensor([[0.0, 1.0], [0.0, 1.0]]))
    assert close(found, torch.tensor([expected, expected]))


# ── tokens ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_token_has_a_row_and_every_text_its_wish() -> None:
    lengths, head = [3, 1, 2], weights()
    hidden, _ = packed(lengths)
    wishes = [PoolingParams(use_activation=wish) for wish in (None, False, True)]
    found = results(
        TokenClassifyPool(ClassifyHead(head, SOFTMAX)), lengths, texts(lengths, "token_classify", wishes)
    )
    first, second, third = torch.split(head(hidden), lengths)
    expected = (first.softmax(-1), second, third.softmax(-1))
    assert all(close(a, b) for a, b in zip(found, expected, strict=True))


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(7, 10), min_size=1, max_size=6), min_size=1, max_size=4),
    st.sampled_from([None, (0,), (2, 0), (0, 1, 2)]),
    st.sampled_from([None, TAG]),
)
def test_steps_are_the_rows_of_their_tag_and_softmax_is_over_the_columns_kept(
    ids: list[list[int]], columns: tuple[int, ...] | None, tag: int | None
) -> None:
    lengths, head = list(map(len, ids)), weights()
    hidden, _ = packed(lengths)
    pool = TokenClassifyPool(ClassifyHead(head, SOFTMAX), tag, columns)
    found = results(pool, lengths, texts(lengths, "token_classify", ids=ids))
    for row, own, text in zip(found, ids, torch.split(hidden, lengths), strict=True):
        keep = [i for i, token in enumerate(own) if tag is None or token == tag]
        logits = head(text[keep])[:, list(columns or (0, 1, 2))]
        assert close(row, logits.softmax(-1))


def test_a_text_without_a_step_has_no_rows() -> None:
    pool = TokenClassifyPool(ClassifyHead(weights(), SOFTMAX), TAG)
    (row,) = results(pool, [3], texts([3], "token_classify"))
    assert row.shape == (0, 3)


# ── several tasks in a batch ─────────────────────────────────────────────────────────────────────────────────


def test_each_sequence_of_a_mixed_batch_goes_to_its_own_pool() -> None:
    lengths, head = [3, 2, 4, 1], ClassifyHead(weights(), SOFTMAX)
    hidden, _ = packed(lengths)
    pooler = Pooler({"classify": ClassifyPool("cls", head), "token_classify": TokenClassifyPool(head)})
    tasks: list[Task] = ["token_classify", "classify", "token_classify", "classify"]
    mixed = [Sequence(0, i, [1] * n, PoolingParams(), tasks[i]) for i, n in enumerate(lengths)]
    rows = [
        torch.from_numpy(row)
        for row in read(pooler(hidden, packed_of(hidden, lengths), mixed, range(len(mixed))))
    ]
    each = torch.split(weights()(hidden).softmax(-1), lengths)
    expected = [each[0], each[1][0], each[2], each[3][0]]
    assert all(close(row, theirs) for row, theirs in zip(rows, expected, strict=True))
