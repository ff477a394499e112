"""Every family equals stock transformers, alone and in company, in any order."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from carpool.engine.batch import Batch
from carpool.engine.build import Parts, build
from carpool.engine.config import EngineConfig
from carpool.engine.params import PoolingParams, Task
from carpool.engine.sequence import Sequence
from oracle import Oracle

# What each family's files say, in the oracle's words; without side files, what its class means.
EXPECTED: dict[str, dict[str, Any]] = {
    "bert": {"modes": ["mean"]},
    "xlmr": {"modes": ["cls"]},
    "roberta": {"modes": ["cls"]},
    "qwen2": {"modes": ["lasttoken"]},
    "qwen3": {"modes": ["lasttoken"]},
    "mistral": {"modes": ["weightedmean"], "normalize": False},
    "modernbert": {"modes": ["mean"], "activations": [torch.tanh]},
    "gemma2": {"modes": ["mean"]},
}
FAMILIES = sorted(tiny.FAMILIES)
TEXTS = [text for text in tiny.TEXTS if text]


def run(parts: Parts, token_ids: list[list[int]], task: Task = "embed") -> list[Tensor]:
    """One batch of all of them; results in the order given."""
    sequences = [Sequence(0, i, ids, PoolingParams(), task) for i, ids in enumerate(token_ids)]
    batch = Batch.of(sequences)
    rows = {seq.index: row for seq, row in zip(batch.sequences, parts.runners[0].run(batch), strict=True)}
    return [torch.from_numpy(rows[i]) for i in range(len(token_ids))]


def difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.fixture(scope="module")
def oracle(checkpoint: Callable[[str], Path]) -> Callable[[str], Oracle]:
    made: dict[str, Oracle] = {}

    def of(family: str) -> Oracle:
        if family not in made:
            made[family] = Oracle(checkpoint(family), **EXPECTED[family])
        return made[family]

    return of


def test_every_family_is_expected_to_be_something() -> None:
    assert set(EXPECTED) == set(tiny.FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_alone_equals_transformers(
    family: str, parts: Callable[[str], Parts], oracle: Callable[[str], Oracle]
) -> None:
    ids = [oracle(family).ids(text) for text in TEXTS]
    assert parts(family).tokenizer.encode(TEXTS) == ids
    for own in ids:
        (vector,) = run(parts(family), [own])
        assert difference(vector, oracle(family).embed(own)) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(3))
def test_in_company_equals_transformers_in_any_order(
    family: str, seed: int, parts: Callable[[str], Parts], oracle: Callable[[str], Oracle]
) -> None:
    rng = random.Random(seed)
    ids = [oracle(family).ids(text) for text in rng.sample(TEXTS, len(TEXTS)) + rng.choices(TEXTS, k=6)]
    for own, vector in zip(ids, run(parts(family), ids), strict=True):
        assert difference(vector, oracle(family).embed(own)) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_equal_transformers(
    family: str, parts: Callable[[str], Parts], oracle: Callable[[str], Oracle]
) -> None:
    """Every row of every text, Dense layers and normalising included."""
    told = oracle(family)
    ids = [told.ids(text) for text in TEXTS]
    alone = Oracle(told.path, ["cls"], normalize=told.normalize, activations=told.activations)
    for own, rows in zip(ids, run(parts(family), ids, "token_embed"), strict=True):
        hidden = told.hidden(own)
        for i, row in enumerate(rows):
            alone.hidden = lambda _, row=hidden[i]: row[None]  # type: ignore[method-assign, misc]
            assert difference(row, alone.embed(own)) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_random_ids_equal_transformers(
    family: str, parts: Callable[[str], Parts], oracle: Callable[[str], Oracle]
) -> None:
    """Clients send ids as well: special tokens in odd places, the pad token within."""
    rng = random.Random(3)
    model = parts(family).model
    ids = [[rng.randrange(model.vocab_size) for _ in range(n)] for n in (1, 2, 3, 17, 17, 60)]
    pad = oracle(family).model.config.pad_token_id
    ids.append([5, pad, 6, pad, pad, 7])
    for own, vector in zip(ids, run(parts(family), ids), strict=True):
        assert difference(vector, oracle(family).embed(own)) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_as_exact_as_torchs_own(
    family: str, checkpoint: Callable[[str], Path], oracle: Callable[[str], Oracle]
) -> None:
    """Its distance from float32 is at most twice that of stock transformers in bfloat16."""
    ours = build(EngineConfig(model=str(checkpoint(family)), dtype="bfloat16", cpu_workers=1))
    torchs = Oracle(checkpoint(family), **EXPECTED[family], dtype=torch.bfloat16)
    ids = [torchs.ids(text) for text in TEXTS]
    exact = torch.stack([oracle(family).embed(own) for own in ids])
    own_error = difference(torch.stack(run(ours, ids)), exact)
    torchs_error = difference(torch.stack([torchs.embed(own) for own in ids]), exact)
    assert torchs_error > 1e-4, "this test needs an error to compare with"
    assert own_error <= 2 * torchs_error
