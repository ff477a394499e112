"""The last layer for the rows that are read: the same results, the other rows not computed, and none of them read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from carpool.engine.batch import Batch
from carpool.engine.build import Parts, build
from carpool.engine.config import EngineConfig, PoolerConfig
from carpool.engine.errors import InferenceFailed
from carpool.engine.models import padded
from carpool.engine.models.backbone import Backbone
from carpool.engine.models.surgery.last_layer import narrow
from carpool.engine.packing import PackedBatch, pack_ids
from carpool.engine.params import PoolingParams, Task
from carpool.engine.poolers.embed import EmbedPool
from carpool.engine.poolers.pooler import Pooler
from carpool.engine.runner import Row
from carpool.engine.sequence import Sequence
from carpool.kernels import native
from emu.backend import Emulated
from paged import Cabin, asked

CPU = torch.device("cpu")
P = PoolingParams
IDS = [[5, 6, 7], [8], list(range(10, 40)), [9, 9, 11, 12], list(range(20, 55))]
ROW = pack_ids(IDS, CPU)
FIRST, LAST = [0, 3, 4, 34, 38], [2, 3, 33, 37, 72]
# The family, how it is pooled, and how many modules follow its last attention.
MODELS = [
    pytest.param("bert", "CLS", 3, id="bert"),
    pytest.param("qwen3", None, 2, id="qwen3"),
    pytest.param("modernbert", "CLS", 2, id="modernbert"),
    pytest.param("xlmr_cross", None, 3, id="a RoBERTa that classifies"),
    pytest.param("qwen2_3", None, 2, id="a decoder that classifies"),
    pytest.param("gemma2", "LAST", 2, id="gemma2"),
]


def built(path: Path, pooling: Any = None, **config: Any) -> Parts:
    own = {"model": str(path), "pooler_config": PoolerConfig(pooling_type=pooling), "cpu_workers": 1}
    return build(EngineConfig(**{**own, "dtype": "float32", **config}))


def sequences(task: Task, **more: Any) -> list[Sequence]:
    return [Sequence(i, 0, ids, P(), task, **more) for i, ids in enumerate(IDS)]


def told(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> list[list[int] | None]:
    """From now on, what the backbone is told to be wanted, a batch at a time."""
    seen: list[list[int] | None] = []
    backbone = parts.runners[0]._backbone
    honest = backbone.forward

    def forward(batch: PackedBatch) -> Tensor:
        seen.append(None if batch.wanted is None else batch.wanted.tolist())
        return honest(batch)

    monkeypatch.setattr(backbone, "forward", forward)
    return seen


def run(parts: Parts, *work: Sequence) -> list[Row]:
    return parts.runners[0].run(Batch(work))


def assert_alike(rows: list[Row], others: list[Row], tolerance: float) -> None:
    for row, other in zip(rows, others, strict=True):
        assert isinstance(row, np.ndarray), row
        assert isinstance(other, np.ndarray)
        np.testing.assert_allclose(row, other, rtol=0, atol=tolerance * np.abs(other).max())


@pytest.mark.parametrize("how", [{}, {"dtype": "bfloat16"}, {"quantization": "int8"}])
@pytest.mark.parametrize(("family", "pooling", "count"), MODELS)
def test_results_are_those_of_the_whole_layer(
    family: str,
    pooling: str | None,
    count: int,
    how: dict[str, str],
    checkpoint: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parts = built(checkpoint(family), pooling, **how)
    assert parts.model.surgery["last_layer"] == count
    task = parts.model.default_task
    seen = told(parts, monkeypatch)
    narrowed = run(parts, *sequences(task))
    assert seen == [FIRST if parts.model.pooling == "cls" else LAST]
    monkeypatch.setattr(Pooler, "wanted", lambda *_: None)
    whole = run(parts, *sequences(task))
    assert seen[1:] == [None]
    # Native layers make a token the same in any company; others round by how many tokens there are.
    exact = how.get("dtype") == "bfloat16" and native.level >= 3
    assert_alike(narrowed, whole, 0 if exact else 2e-2 if how else 2e-6)


@pytest.mark.parametrize(("family", "pooling", "count"), MODELS)
def test_the_other_rows_are_no_numbers(
    family: str, pooling: str | None, count: int, checkpoint: Callable[[str], Path]
) -> None:
    """So the work is not done, and whoever reads them shows it."""
    backbone = built(checkpoint(family), pooling).runners[0]._backbone
    with torch.inference_mode():
        hidden = backbone.forward(replace(ROW, wanted=torch.tensor(LAST)))
        whole = backbone.forward(ROW)
        again = backbone.replica().forward(replace(ROW, wanted=torch.tensor(LAST)))
    read = torch.zeros(len(whole), dtype=torch.bool)
    read[LAST] = True
    assert torch.isnan(hidden[~read]).all()
    assert torch.isfinite(whole).all()
    assert torch.equal(again.nan_to_num(7), hidden.nan_to_num(7))


def test_on_a_device_too(checkpoint: Callable[[str], Path], emulated: Emulated) -> None:
    for family, pooling in (("bert", "CLS"), ("qwen3", None)):
        parts = built(checkpoint(family), pooling, enable_prefix_caching=False, enable_chunked_prefill=False)
        assert parts.model.surgery["last_layer"] > 0
        whole = built(checkpoint(family), pooling, surgery=False)
        assert_alike(run(parts, *sequences("embed")), run(whole, *sequences("embed")), 1e-5)
    assert "pool_rows" in emulated.ran


# ── what is read is what pools say ───────────────────────────────────────────────────────────────────────────


def test_a_pool_that_reads_more_than_it_says_gives_no_result(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: means that are said to be of first tokens."""
    parts = built(checkpoint("bert"), "MEAN")
    assert "last_layer" not in parts.model.surgery
    assert all(isinstance(row, np.ndarray) for row in run(parts, *sequences("embed")))
    monkeypatch.setattr(EmbedPool, "reads", "first")
    rows = run(built(checkpoint("bert"), "MEAN"), *sequences("embed"))
    assert [isinstance(row, InferenceFailed) for row in rows] == [len(ids) > 1 for ids in IDS]


def test_whoever_asks_for_all_tokens_gets_them_and_so_does_the_rest_of_its_batch(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = built(checkpoint("bert"), "CLS")
    seen = told(parts, monkeypatch)
    vectors, tokens = sequences("embed"), sequences("token_embed")
    rows = run(parts, *vectors, *tokens)
    assert seen == [None]
    for vector, matrix in zip(rows[: len(IDS)], rows[len(IDS) :], strict=True):
        assert isinstance(matrix, np.ndarray)
        assert isinstance(vector, np.ndarray)
        np.testing.assert_allclose(matrix[0], vector, atol=1e-6)


def test_behind_a_prompt_that_is_skipped_the_first_token_is_another(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = built(checkpoint("bert"), "CLS")
    seen = told(parts, monkeypatch)
    ids = IDS[2]
    (row,) = run(parts, Sequence(0, 0, ids, P(), skip=4))
    (tokens,) = run(parts, Sequence(0, 0, ids, P(), "token_embed"))
    assert seen == [None, None]
    assert_alike([row], [tokens[4]], 1e-6)  # type: ignore[index]


def test_sequences_that_share_their_work_are_read_once(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = built(checkpoint("bert"), "CLS")
    seen = told(parts, monkeypatch)
    one, other = [5, 6, 7, 8], [9, 10]
    rows = run(parts, *(Sequence(i, 0, ids, P()) for i, ids in enumerate((one, other, one))))
    assert seen == [[0, 4]]
    assert_alike([rows[2]], [rows[0]], 0)


def test_of_texts_of_one_token_nothing_is_left_out(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = built(checkpoint("bert"), "CLS")
    seen = told(parts, monkeypatch)
    run(parts, Sequence(0, 0, [5], P()), Sequence(1, 0, [6], P()))
    assert seen == [None]


@pytest.mark.parametrize("reuse", [True, False])
def test_prompts_in_parts_are_narrowed_if_only_their_last_token_is_asked_for(
    reuse: bool, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = built(checkpoint("qwen3"), enable_prefix_caching=False, enable_chunked_prefill=False)
    whole = run(parts, *sequences("embed"))
    cabin = Cabin.of(parts.runners[0], 60)
    seen = told(parts, monkeypatch)
    rows = cabin.run([asked(ids, last_only=reuse) for ids in IDS])
    assert len(cabin.batches) > 2
    for wanted, batch in zip(seen, cabin.batches, strict=True):
        assert (wanted is not None) == (reuse and batch.num_tokens > len(batch.sequences))
    assert_alike(rows, whole, 1e-5)


# ── where it does not hold ───────────────────────────────────────────────────────────────────────────────────


def test_a_layer_that_mixes_tokens_behind_its_attention_is_left_as_it_is(
    checkpoint: Callable[[str], Path],
) -> None:
    """Planted: each token's feed-forward looks at the token before it."""

    class Mixing(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.inner(x + x.roll(1, 1))
            return out

    backbone = built(checkpoint("qwen3"), surgery=False).runners[0]._backbone
    layer: Any = backbone.module.get_submodule("layers.1")
    layer.mlp = Mixing(layer.mlp)
    assert narrow(backbone, vocab_size=60) == 0
    with torch.inference_mode():
        assert torch.isfinite(backbone.forward(replace(ROW, wanted=torch.tensor(LAST)))).all(), (
            "a hook was left"
        )
    layer.mlp = layer.mlp.inner
    assert narrow(backbone, vocab_size=60) == 2


def test_a_module_that_serves_every_layer_is_not_the_last_ones(checkpoint: Callable[[str], Path]) -> None:
    backbone = built(checkpoint("qwen3"), surgery=False).runners[0]._backbone
    layers: Any = backbone.module.get_submodule("layers")
    layers[1].mlp = layers[0].mlp
    assert narrow(backbone, vocab_size=60) == 1


def test_padded_models_have_no_row(checkpoint: Callable[[str], Path]) -> None:
    module = built(checkpoint("bert"), surgery=False).runners[0]._backbone.module
    assert narrow(padded.PaddedBackbone(module, attention="eager", pads=True), vocab_size=60) == 0


def test_without_surgery_every_row_is_computed(checkpoint: Callable[[str], Path]) -> None:
    backbone: Backbone = built(checkpoint("bert"), "CLS", surgery=False).runners[0]._backbone
    with torch.inference_mode():
        assert torch.isfinite(backbone.forward(replace(ROW, wanted=torch.tensor(FIRST)))).all()
