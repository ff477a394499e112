"""The mixture of experts: each token by its own few, whoever else is in the batch."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Literal

import pytest
import torch

from carpool.engine.build import build
from carpool.engine.config import EngineConfig
from carpool.engine.models.native.nomic_moe import NomicMoeConfig, _Mixture
from zoo import native as zoo
from zoo.measure import TOLERANCE, Prompt, measure, run
from zoo.member import Member
from zoo.published import random_weights

CONFIG = NomicMoeConfig(hidden_size=32, intermediate_size=zoo.INNER, num_experts=zoo.EXPERTS)


@pytest.fixture(scope="module")
def mixture() -> _Mixture:
    made = _Mixture(CONFIG).requires_grad_(False)
    shapes = {name: tuple(weight.shape) for name, weight in made.named_parameters()}
    made.load_state_dict(random_weights(shapes, seed=5))
    return made


@pytest.mark.parametrize("tokens", [1, 2, 17])
def test_equals_one_token_and_one_expert_at_a_time(mixture: _Mixture, tokens: int) -> None:
    x = torch.randn(tokens, 32, generator=torch.Generator().manual_seed(tokens))
    slow = zoo._experts(dict(mixture.state_dict()), "", x, chosen=2)
    torch.testing.assert_close(mixture(x[None])[0], slow, rtol=0, atol=2e-5)


def test_shares_do_not_add_up_to_one_and_the_bias_comes_once(mixture: _Mixture) -> None:
    """Planted: both of the usual mistakes are far from it."""
    x = torch.randn(9, 32, generator=torch.Generator().manual_seed(1))
    shares, chosen = mixture.router(x).topk(2)
    right = mixture(x[None])[0]
    normalised = mixture.experts(x, shares / shares.sum(-1, keepdim=True), chosen)
    a_bias_each = right - mixture.experts.bias + shares.sum(-1, keepdim=True) * mixture.experts.bias
    assert min(float((wrong - right).abs().max()) for wrong in (normalised, a_bias_each)) > 1e-2


def test_a_token_is_alike_whoever_else_asks_its_experts(mixture: _Mixture) -> None:
    x = torch.randn(40, 32, generator=torch.Generator().manual_seed(2))
    together = mixture(x[None])[0]
    alone = torch.cat([mixture(row[None, None])[0] for row in x])
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-5)


def test_another_number_of_experts_a_token_would_show(tmp_path: Path) -> None:
    """Planted."""
    line = measure(Member("", "", partial(zoo.nomic_moe, moe_top_k=1), ("embed",)), tmp_path)
    assert line.alone > 100 * TOLERANCE


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_replicas_answer_alike(dtype: Literal["float32", "bfloat16"], tmp_path: Path) -> None:
    zoo.nomic_moe(tmp_path)
    parts = build(EngineConfig(model=str(tmp_path), dtype=dtype, cpu_workers=2))
    ids = parts.tokenizer.encode(["the cat sat on a mat"])[0]
    first = run(parts, [Prompt("embed", ids)])[0]
    parts.runners.reverse()
    assert torch.equal(run(parts, [Prompt("embed", ids)])[0], first)
