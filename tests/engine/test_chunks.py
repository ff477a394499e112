"""Prompts in parts, behind others' beginnings and beside whole ones: answered as each would be alone and whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from carpool.engine.batch import Batch
from carpool.engine.build import build
from carpool.engine.config import EngineConfig
from carpool.engine.errors import InferenceFailed, Undone
from carpool.engine.models.backbone import Backbone
from carpool.engine.models.paged import paged_attention_chosen
from carpool.engine.packing import PackedBatch
from carpool.engine.params import PoolingParams
from carpool.engine.poolers.classify import ClassifyHead, ClassifyPool, TokenClassifyPool, activation_named
from carpool.engine.poolers.embed import EmbedHead, EmbedPool, TokenEmbedPool
from carpool.engine.poolers.pooler import Pooler
from carpool.engine.runner import ModelRunner, Row
from carpool.engine.sequence import Sequence
from carpool.engine.side_files import PoolingMode
from carpool.kernels import native
from emu.backend import Emulated
from paged import Cabin, asked, storage_of
from zoo import MEMBERS
from zoo.stock import embedding

CPU = torch.device("cpu")
WIDTH, LABELS, TAG = 32, 3, 7
ZOO = {"llama": "meta-llama/Llama-3.2-1B", "gemma3": "google/gemma-3-270m", "gpt2": "openai-community/gpt2"}
MODELS = ["qwen2", "qwen3", "mistral", "gemma2", *ZOO]
P = PoolingParams


@pytest.fixture(scope="module")
def backbone(
    checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Backbone]:
    made: dict[tuple[str, str, bool], Backbone] = {}

    def backbone(name: str, dtype: Any = "float32", surgery: bool = True) -> Backbone:
        if (name, dtype, surgery) not in made:
            if name in ZOO:
                folder = tmp_path_factory.mktemp(name)
                next(member for member in MEMBERS if member.name == ZOO[name]).make(folder)
            else:
                folder = checkpoint(name)
            config = EngineConfig(model=str(folder), cpu_workers=1, dtype=dtype, surgery=surgery)
            made[name, dtype, surgery] = build(config).runners[0]._backbone
        return made[name, dtype, surgery]

    return backbone


def runner_of(backbone: Backbone, mode: PoolingMode = "last") -> ModelRunner:
    """All tasks over one backbone; `mode` is for vectors and classes."""
    torch.manual_seed(1)
    head = EmbedHead((), True, None)
    labels = ClassifyHead(nn.Linear(WIDTH, LABELS).requires_grad_(False), activation_named("softmax"))
    pools = {
        "embed": EmbedPool((mode,), head),
        "token_embed": TokenEmbedPool(head),
        "classify": ClassifyPool(mode, labels),
        "token_classify": TokenClassifyPool(labels, TAG, [2, 0]),
    }
    return ModelRunner(backbone, Pooler(cast(Any, pools)), CPU)


def prompts(mode: PoolingMode) -> list[Sequence]:
    """Of one block and of many, several with one beginning, two alike, one that is another's beginning."""
    generator = torch.Generator().manual_seed(9)

    def words(count: int) -> list[int]:
        return torch.randint(5, 60, (count,), generator=generator).tolist()

    last_only = mode == "last"
    common, long = words(21), words(75)
    texts = [common + words(own) for own in (1, 3, 9, 30)] + [words(2), long, long[:40], long[:40], words(50)]
    tags = [*words(20), TAG, *words(13), TAG, TAG, *words(25), TAG]
    return [
        *(asked(ids, last_only=last_only) for ids in texts),
        asked(common + words(5), "classify", last_only=last_only),
        asked(common + words(44), "classify", P(use_activation=False), last_only=last_only),
        asked(words(35), "embed", P(dimensions=9), last_only=last_only, skip=30),
        asked(words(47), "token_embed", last_only=False),
        asked(words(3), "token_embed", last_only=False),
        asked(tags, "token_classify", last_only=False),
    ]


def alone(runner: ModelRunner, sequences: list[Sequence]) -> list[Row]:
    """Each whole, by itself, with nothing kept."""
    return [
        runner.run(Batch((Sequence(0, 0, seq.token_ids, seq.params, seq.task, skip=seq.skip),)))[0]
        for seq in sequences
    ]


def agree(rows: list[Row], truths: list[Row], tolerance: float) -> None:
    for i, (row, truth) in enumerate(zip(rows, truths, strict=True)):
        assert isinstance(row, np.ndarray), row
        assert isinstance(truth, np.ndarray)
        assert row.shape == truth.shape
        off = np.linalg.norm(row.astype(np.float64) - truth) / np.linalg.norm(truth)
        assert off < tolerance, f"{i} is off by {off:.1e}"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mode", ["last", "mean", "cls", "weighted_mean"])
def test_in_parts_each_is_answered_as_whole_and_alone(
    name: str, mode: PoolingMode, backbone: Callable[..., Backbone]
) -> None:
    runner = runner_of(backbone(name), mode)
    sequences = prompts(mode)
    truths = alone(runner, sequences)
    cabin = Cabin.of(runner, 80)
    agree(cabin.run(sequences), truths, 1e-5)
    parts = [seq for batch in cabin.batches for seq in batch.sequences]
    assert len(parts) > 1.5 * len(sequences), "long ones came in chunks"
    assert (sum(seq.cached for seq in sequences) >= 4 * 20) == (mode == "last")
    assert all(seq.carried is None for seq in sequences)
    again = prompts(mode)
    agree(cabin.run(again), truths, 1e-5)
    if mode == "last":
        assert sum(seq.cached for seq in again) > sum(seq.cached for seq in sequences)


@pytest.mark.parametrize("blocks", [20, 27])
def test_a_cache_that_holds_little_costs_time_only(blocks: int, backbone: Callable[..., Backbone]) -> None:
    runner = runner_of(backbone("qwen3"))
    sequences = prompts("last")
    truths = alone(runner, sequences)
    cabin = Cabin.of(runner, blocks)
    for _ in range(3):
        agree(cabin.run(prompts("last")), truths, 1e-5)
    assert cabin.pool.evicted_blocks > 0


@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_two_replicas_in_two_threads_over_one_storage(name: str, backbone: Callable[..., Backbone]) -> None:
    runner = runner_of(backbone(name))
    sequences = [seq for _ in range(6) for seq in prompts("last")]
    truths = alone(runner, prompts("last")) * 6
    cabin = Cabin.of(runner, 100, replicas=2, tokens=40)
    ran: set[int] = set()
    for i, one in enumerate(cabin.runners):
        honest = one.run

        def run(batch: Batch, i: int = i, honest: Callable[[Batch], list[Row]] = honest) -> list[Row]:
            ran.add(i)
            return honest(batch)

        one.run = run  # type: ignore[method-assign]
    agree(cabin.run(sequences), truths, 1e-5)
    assert ran == {0, 1}


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_in_16_bits_parts_differ_by_rounding_alone(name: str, backbone: Callable[..., Backbone]) -> None:
    runner = runner_of(backbone(name, "bfloat16"))
    sequences = [seq for seq in prompts("last") if seq.task != "classify"]
    truths = alone(runner, sequences)
    agree(Cabin.of(runner, 80).run(sequences), truths, 6e-2)


@pytest.mark.skipif(native.library is None, reason="no native kernels")
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 6e-2)])
@pytest.mark.parametrize("mode", ["last", "mean"])
def test_by_the_native_kernels(dtype: Any, tolerance: float, mode: PoolingMode, tmp_path: Path) -> None:
    """Whose heads are wider than those of the models above; grouped, in a window and with a soft cap."""
    embedding(
        "wide", "gemma2", head_dim=16, num_attention_heads=4, num_key_value_heads=2, hidden_size=WIDTH,
        intermediate_size=48, sliding_window=8, attn_logit_softcapping=2.0, query_pre_attn_scalar=16,
        pad_token_id=0, eos_token_id=0, bos_token_id=None,
    ).make(tmp_path)  # fmt: skip
    config = EngineConfig(model=str(tmp_path), cpu_workers=1, dtype=dtype)
    runner = runner_of(build(config).runners[0]._backbone, mode)
    sequences = prompts(mode)
    truths = alone(runner, sequences)
    cabin = Cabin.of(runner, 80)
    agree(cabin.run(sequences), truths, tolerance)
    (choice,) = paged_attention_chosen(runner._backbone, storage_of(runner._backbone, 2))
    assert choice.by == "native"


@pytest.mark.parametrize("name", ["qwen3", "gemma2"])
def test_by_the_cuda_kernels(name: str, backbone: Callable[..., Backbone], emulated: Emulated) -> None:
    runner = runner_of(backbone(name, surgery=False))
    sequences = prompts("last")
    truths = alone(runner, sequences)
    emulated.ran.clear()
    agree(Cabin.of(runner, 80).run(sequences), truths, 1e-5)
    assert emulated.ran >= {"kv_write", "attention"}


# ── failures ─────────────────────────────────────────────────────────────────────────────────────────────────


class Breaking(Backbone):
    """Breaks whenever a token is aboard; `rows` are the lengths of what it ran."""

    def __init__(self, inner: Backbone, token: int | None) -> None:
        self._inner, self._token = inner, token
        self.module = inner.module
        self.rows: list[list[int]] = []

    def forward(self, batch: PackedBatch) -> Tensor:
        self.rows.append(batch.lengths)
        if self._token in batch.input_ids:
            raise IndexError("index out of range in self")
        return self._inner.forward(batch)


@pytest.mark.parametrize("mode", ["last", "mean"])
def test_what_breaks_one_prompt_costs_its_neighbours_time_and_no_answer(
    mode: PoolingMode, backbone: Callable[..., Backbone]
) -> None:
    own = backbone("qwen3")
    sequences = prompts(mode)
    truths = alone(runner_of(own, mode), sequences)
    bad = asked([*sequences[0].token_ids[:20], 9, 61], last_only=mode == "last")
    runner = runner_of(Breaking(own, 61), mode)
    cabin = Cabin.of(runner, 90)
    *rows, failed = cabin.run([*sequences, bad])
    assert type(failed) is InferenceFailed
    assert "IndexError" in str(failed)
    assert cabin.undone
    agree(rows, truths, 1e-5)
    agree(cabin.run(prompts(mode)), truths, 1e-5)


def test_a_batch_of_which_something_is_kept_is_not_halved(backbone: Callable[..., Backbone]) -> None:
    breaking = Breaking(backbone("qwen3"), 61)
    runner = runner_of(breaking)
    cabin = Cabin.of(runner, 20)
    sequences = [asked([5, 6, 7, 8, 9], last_only=True), Sequence(0, 0, [61], P())]
    sequences[0].table = cabin.pool.allocate(cast(Any, sequences[0].prompt), 5)
    (runner,) = cabin.runners
    rows = runner.run(Batch.of(sequences))
    assert [type(row) for row in rows] == [Undone, Undone]
    assert breaking.rows[-1] == [1, 5]
    (row,) = runner.run(Batch((sequences[1],)))
    assert type(row) is InferenceFailed


def test_what_starts_again_from_nothing_forgets_what_it_had(backbone: Callable[..., Backbone]) -> None:
    runner = runner_of(backbone("qwen3"), "mean")
    (truth,) = alone(runner, [asked(list(range(5, 25)), last_only=False)])
    cabin = Cabin.of(runner, 20)
    (runner,) = cabin.runners
    seq = asked(list(range(5, 25)), last_only=False)
    prompt = cast(Any, seq.prompt)
    seq.table = cabin.pool.allocate(prompt, 20)
    assert runner.run(Batch((seq,), (9,))) == [None]
    assert sum(map(len, seq.carried)) == 9
    for count in (7, 13):
        rows = runner.run(Batch((seq,), (count,)))
        assert (rows[0] is None) == (count == 7)
        seq.computed += count
    agree(rows, [truth], 1e-5)


def test_a_part_that_is_missing_is_not_passed_over(backbone: Callable[..., Backbone]) -> None:
    runner = runner_of(backbone("qwen3"), "mean")
    cabin = Cabin.of(runner, 20)
    (runner,) = cabin.runners
    seq = asked(list(range(5, 25)), last_only=False)
    seq.table = cabin.pool.allocate(cast(Any, seq.prompt), 20)
    assert runner.run(Batch((seq,), (9,))) == [None]
    seq.computed = 10
    (row,) = runner.run(Batch((seq,)))
    assert isinstance(row, InferenceFailed)
    assert "a part of a prompt is missing" in str(row)


def test_what_waits_for_its_last_part_does_not_hold_on_to_its_neighbours(
    backbone: Callable[..., Backbone],
) -> None:
    runner = runner_of(backbone("qwen3"), "mean")
    cabin = Cabin.of(runner, 20)
    (runner,) = cabin.runners
    seq = asked(list(range(5, 25)), last_only=False)
    seq.table = cabin.pool.allocate(cast(Any, seq.prompt), 20)
    other = Sequence(0, 0, [5] * 50, P())
    row, vector = runner.run(Batch.of([seq, other], {seq: 9, other: 50}))
    assert row is None
    assert isinstance(vector, np.ndarray)
    (carried,) = seq.carried
    assert carried.untyped_storage().nbytes() == 9 * WIDTH * 4
