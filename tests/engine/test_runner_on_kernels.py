"""Whole batches through the CUDA kernels, on the emulator: the same rows as from torch, whatever rides together."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from carpool.engine.batch import Batch
from carpool.engine.models.backbone import Backbone
from carpool.engine.packing import PackedBatch
from carpool.engine.params import PoolingParams, Task
from carpool.engine.poolers.adapted import AdaptedPool
from carpool.engine.poolers.classify import ClassifyHead, ClassifyPool, TokenClassifyPool, activation_named
from carpool.engine.poolers.embed import EmbedHead, EmbedPool, TokenEmbedPool
from carpool.engine.poolers.pooler import Pool, Pooler
from carpool.engine.poolers.sparse import NonZeroPool
from carpool.engine.poolers.splade import SpladePool
from carpool.engine.runner import ModelRunner
from carpool.engine.sequence import Sequence
from carpool.engine.side_files import PoolingMode, Splade
from carpool.kernels import cuda_table, launch
from emu import build
from emu.backend import Emulated

pytestmark = pytest.mark.skipif(build.MISSING is not None, reason=str(build.MISSING))

CPU = torch.device("cpu")
WIDTH, WORDS, LABELS, TAG = 24, 50, 3, 7
POOLING = ("pool_rows", "pool_split", "gather_rows", "activate_rows", "sparse_rows")
P = PoolingParams


@pytest.fixture(scope="module")
def emulated() -> Emulated:
    backend = Emulated(check=True)
    backend.only = lambda instance: (
        instance.types[:1] != ("__half",)
    )  # hidden states are float32 or bfloat16 here
    backend.prepare(cuda_table.BY_NAME[name] for name in POOLING)
    return backend


class Table:
    """A token's hidden state is its row of a table."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.table = torch.randn(WORDS, WIDTH, generator=torch.Generator().manual_seed(3)).to(dtype)

    def forward(self, batch: PackedBatch) -> Tensor:
        return self.table[batch.input_ids]


def linear(inputs: int, outputs: int, seed: int) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs).requires_grad_(False)


def runner(
    dtype: torch.dtype, modes: tuple[PoolingMode, ...] = ("mean",), dense: tuple[nn.Module, ...] = (),
    activation: str = "softmax", steps: bool = False, late: bool = False, splade: Splade | None = None,
) -> ModelRunner:  # fmt: skip
    """A model that does everything at once, as none in earnest does. `sparse_embed` is SPLADE's."""
    head = EmbedHead(dense, True, None)
    labels = ClassifyHead(
        linear(WIDTH, LABELS, 1), activation_named(activation), logit_mean=0.25, logit_sigma=2.0
    )
    tokens = TokenClassifyPool(labels, TAG, [2, 0]) if steps else TokenClassifyPool(labels)
    pools: dict[Task, Pool] = {
        "embed": EmbedPool(modes, head),
        "token_embed": TokenEmbedPool(head),
        "classify": AdaptedPool({0: ClassifyPool(modes[0], labels, late)}),
        "token_classify": tokens,
        "sparse_embed": NonZeroPool(SpladePool(linear(WIDTH, WORDS, 2), WORDS, splade or Splade())),
    }
    return ModelRunner(cast(Backbone, Table(dtype)), Pooler(pools), CPU)


def batch(*asked: tuple[Task, int, PoolingParams], **more: Any) -> Batch:
    """Texts of so many tokens, in order; equal lengths are equal texts."""
    generator = torch.Generator().manual_seed(5)
    texts = {
        n: torch.randint(0, WORDS, (n,), generator=generator).tolist()
        for n in sorted({n for _, n, _ in asked})
    }
    return Batch.of([Sequence(i, 0, texts[n], p, task, **more) for i, (task, n, p) in enumerate(asked)])


MIXED: list[tuple[Task, int, PoolingParams]] = [
    ("embed", 5, P()),
    ("token_embed", 3, P(dimensions=9)),
    ("classify", 1, P(use_activation=False)),
    ("embed", 9, P(use_activation=False, dimensions=7)),
    ("token_classify", 9, P()),
    ("sparse_embed", 5, P()),
    ("classify", 9, P()),
    ("token_classify", 2, P(use_activation=False)),
    ("token_embed", 1, P(use_activation=False)),
    ("embed", 2, P(embed_dtype="float16")),
    ("embed", 9, P(embed_dtype="bfloat16", dimensions=11)),
    ("token_embed", 3, P(embed_dtype="float16")),
    ("sparse_embed", 9, P()),
]


def same(work: ModelRunner, asked: Batch, emulated: Emulated, *kernels: str) -> None:
    """Both ways, and the kernels had a part in one of them."""
    plain = work.run(asked)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "backend", emulated)
        emulated.ran.clear()
        ours = work.run(asked)
    assert emulated.ran >= set(kernels)
    for seq, row, truth in zip(asked.sequences, ours, plain, strict=True):
        assert isinstance(row, np.ndarray), row
        assert isinstance(truth, np.ndarray)
        assert (row.dtype, row.shape) == (truth.dtype, truth.shape)
        room = {"float32": 2e-6, "float16": 1e-3, "bfloat16": 8e-3}[row.dtype.name]
        np.testing.assert_allclose(
            row.astype(np.float64), truth.astype(np.float64), rtol=room, atol=room, err_msg=str(seq)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_tasks_in_one_batch(dtype: torch.dtype, emulated: Emulated) -> None:
    kernels = {"pool_rows", "gather_rows", "activate_rows", "sparse_rows"}
    same(runner(dtype), batch(*MIXED), emulated, *kernels)


@pytest.mark.parametrize("mode", ["cls", "last", "mean", "max", "mean_sqrt_len", "weighted_mean"])
@pytest.mark.parametrize("params", [P(), P(use_activation=False), P(dimensions=6), P(embed_dtype="bfloat16")])
def test_embeddings_of_every_mode(mode: PoolingMode, params: PoolingParams, emulated: Emulated) -> None:
    asked = batch(*(("embed", n, params) for n in (1, 2, 6, 6, 11)))
    fused = mode in ("cls", "last", "mean") and len({seq.work for seq in asked.sequences}) == 5
    same(runner(torch.float32, (mode,)), asked, emulated, "pool_rows" if fused else "gather_rows")


def test_a_text_long_enough_for_two_passes(emulated: Emulated) -> None:
    asked = batch(("embed", 700, P()), ("embed", 3, P()))
    same(runner(torch.bfloat16), asked, emulated, "pool_split", "pool_rows")


@pytest.mark.parametrize("dense", [(), (linear(WIDTH, 16, 4), nn.Tanh())])
def test_prompts_left_out_modes_side_by_side_and_dense_layers(
    dense: tuple[nn.Module, ...], emulated: Emulated
) -> None:
    modes: tuple[PoolingMode, ...] = ("mean",) if dense else ("cls", "mean", "max")
    for skip in (0, 2):
        same(runner(torch.float32, modes, dense), batch(*MIXED[:2], skip=skip), emulated, "gather_rows")


@pytest.mark.parametrize("activation", ["identity", "sigmoid", "softmax"])
@pytest.mark.parametrize("steps", [False, True])
def test_classes_of_texts_tokens_and_steps(activation: str, steps: bool, emulated: Emulated) -> None:
    wishes = [P(), P(use_activation=False), P(use_activation=True)]
    tasks: tuple[Task, ...] = ("classify", "token_classify")
    asked = batch(*((task, n, own) for task in tasks for n in (1, 4, 30) for own in wishes))
    for late in (False, True):
        work = runner(torch.float32, ("mean",), activation=activation, steps=steps, late=late)
        same(work, asked, emulated, "activate_rows")


@pytest.mark.parametrize("strategy", ["max", "sum"])
@pytest.mark.parametrize("most", [None, 5])
def test_weights_of_a_vocabulary(strategy: Any, most: int | None, emulated: Emulated) -> None:
    asked = batch(*(("sparse_embed", n, P()) for n in (1, 4, 9)))
    same(runner(torch.float32, splade=Splade(strategy, True, most)), asked, emulated, "sparse_rows")
