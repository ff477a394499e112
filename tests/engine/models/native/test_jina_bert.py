"""Jina's BERT: slopes, gates, and no table of positions."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from carpool.engine.build import build
from carpool.engine.config import EngineConfig
from carpool.engine.models import attention, renames
from carpool.engine.models.native.jina_bert import _slopes
from carpool.kernels import ops
from zoo import native as zoo
from zoo.measure import TOLERANCE, Prompt, measure, run
from zoo.member import Member


@pytest.mark.parametrize(
    ("heads", "slopes"),
    [
        (4, [2**-2, 2**-4, 2**-6, 2**-8]),
        (8, [2**-i for i in range(1, 9)]),
        (12, [*(2**-i for i in range(1, 9)), 2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]),
        (6, [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]),
    ],
)
def test_slopes(heads: int, slopes: list[float]) -> None:
    assert _slopes(heads) == pytest.approx(slopes)


@pytest.mark.parametrize("kind", ["geglu", "reglu"])
def test_gates(kind: str, tmp_path: Path) -> None:
    line = measure(Member("", "", partial(zoo.jina_bert, feed_forward_type=kind), zoo.EMBED), tmp_path)
    assert max(line.alone, line.company) <= TOLERANCE


def test_without_side_files_it_is_pooled_as_its_config_says(tmp_path: Path) -> None:
    line = measure(Member("", "", partial(zoo.jina_bert, files=False), zoo.EMBED), tmp_path)
    assert line.pooling == "mean"
    assert max(line.alone, line.company) <= TOLERANCE


def test_gates_the_other_way_round_would_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the code variant's weights with its gate where the others have theirs."""
    right = renames.RENAMES["jina-bert-code"]

    def wrong(weights: renames.Weights, config: Any) -> renames.Weights:
        gated = ".gated_layers."
        return {
            name: torch.cat(weight.chunk(2)[::-1]) if gated in name else weight
            for name, weight in right(weights, config).items()
        }

    monkeypatch.setitem(renames.RENAMES, "jina-bert-code", wrong)
    line = measure(Member("", "", partial(zoo.jina_bert, code=True), ("embed",)), tmp_path)
    assert line.alone > 100 * TOLERANCE


def test_slopes_are_by_distance_and_never_a_table_of_tokens_by_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo.jina_bert(tmp_path)
    parts = build(EngineConfig(model=str(tmp_path), cpu_workers=1))
    seen: list[tuple[int, ...]] = []
    compute = ops.varlen_attention

    def spy(*args: Any, **options: Any) -> torch.Tensor:
        seen.append(tuple(options["bias"].shape))
        return compute(*args, **options)

    monkeypatch.setattr(attention, "varlen_attention", spy)
    run(parts, [Prompt("embed", [5] * 3000), Prompt("embed", [7] * 10)])
    assert set(seen) == {(4, 2 * 3000 - 1)}


def test_the_second_text_of_a_pair_is_told_from_the_first(tmp_path: Path) -> None:
    zoo.jina_reranker(tmp_path)
    parts = build(EngineConfig(model=str(tmp_path), cpu_workers=1))
    ids = parts.tokenizer.encode(["the cat sat on a mat"])[0]
    one, pair = run(parts, [Prompt("classify", ids), Prompt("classify", ids, type_start=4)])
    assert float((one - pair).abs().max()) > 1e-3
