"""The budget of a batch: what is tried on a GPU, and what is said when it does not fit."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from carpool.engine.batch import Batch
from carpool.engine.budget import Budget, fit_budget, is_shortage, rehearsed, room_for_weights, tried, wanted
from carpool.engine.errors import ConfigError
from carpool.engine.params import Task

CPU, GPU, OTHER = torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1)
TASKS: tuple[Task, ...] = ("embed", "token_embed")


@pytest.mark.parametrize(
    ("asked", "longest", "device", "tokens"),
    [
        (None, 512, CPU, 2048),
        (None, 4096, CPU, 4096),
        (None, 512, GPU, 16_384),
        (None, 40_960, GPU, 40_960),
        (700, 512, CPU, 700),
        (700, 512, GPU, 700),
    ],
)
def test_a_batch_is_what_was_asked_for_else_what_suits_the_device(
    asked: int | None, longest: int, device: torch.device, tokens: int
) -> None:
    assert wanted(asked, longest, device, chunks=False) == tokens


# ── fitting ──────────────────────────────────────────────────────────────────────────────────────────────────


@given(st.integers(1, 50_000), st.integers(0, 100_000), st.integers(0, 60_000))
def test_a_budget_fits_and_nothing_larger_was_passed_over(least: int, above: int, capacity: int) -> None:
    most = least + above
    asked: list[int] = []

    def fits(tokens: int) -> bool:
        asked.append(tokens)
        return tokens <= capacity

    found = fit_budget(fits, most, least)
    assert asked[0] == most
    assert len(asked) == len(set(asked)), "nothing is tried twice"
    if capacity < least:
        assert found is None
        assert asked[-1] == least
    else:
        assert found is not None
        assert least <= found <= min(capacity, most)
        assert found in (most, least) or 2 * found >= min(capacity, most)
        assert all(tokens > capacity for tokens in asked[:-1])


class Gpu:
    """A runner with memory for so many tokens; the sizes that it was tried with, and what they were."""

    def __init__(self, capacity: int, error: Exception | None = None) -> None:
        self.capacity = capacity
        self.error = error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
        self.batches: list[Batch] = []

    def attempt(self, batch: Batch) -> None:
        self.batches.append(batch)
        distinct, _ = batch.distinct()
        if distinct.num_tokens > self.capacity:
            raise type(self.error)(*self.error.args)  # a fresh one, as it holds the frames it came through

    @property
    def sizes(self) -> list[int]:
        return [batch.distinct()[0].num_tokens for batch in self.batches]


def fitted(*runners: tuple[torch.device, Gpu]) -> Budget:
    return tried(runners, most=16_384, max_model_len=512, max_num_seqs=256, vocab_size=113, tasks=TASKS)


def test_the_whole_budget_is_kept_where_it_fits() -> None:
    gpu = Gpu(16_384)
    assert fitted((GPU, gpu)) == Budget(16_384)
    assert gpu.sizes == [16_384, 16_384]


def test_every_task_is_run_for_long_prompts_and_for_many() -> None:
    """So every kernel that serving uses is there before the first request."""
    gpu = Gpu(16_384)
    fitted((GPU, gpu))
    shapes = [(len(b.distinct()[0].sequences), max(s.num_tokens for s in b.sequences)) for b in gpu.batches]
    assert shapes == [(32, 512), (256, 64)]
    for batch in gpu.batches:
        assert {seq.task for seq in batch.sequences} == set(TASKS)


def test_a_batch_that_does_not_fit_is_halved_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    emptied: list[int] = []
    gpu = Gpu(5000)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(len(gpu.batches)))
    fit = fitted((GPU, gpu))
    assert gpu.sizes == [16_384, 8192, 4096, 4096]
    assert emptied == [1, 2], "before a smaller one is tried"
    assert fit.tokens == 4096
    assert fit.notice == "A batch of 16384 tokens does not fit in the memory of cuda:0: 4096 are the most."


def test_the_smallest_gpu_decides() -> None:
    small, large = Gpu(9000), Gpu(20_000)
    for order in ([(GPU, small), (OTHER, large)], [(GPU, large), (OTHER, small)]):
        fit = fitted(*order)
        assert fit.tokens == 8192
        named = next(device for device, runner in order if runner is small)
        assert str(named) in (fit.notice or "")
    assert large.sizes[0] == 8192, "what did not fit one is not tried on the next"


def test_a_gpu_that_cannot_run_the_longest_prompt_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"A prompt of 512 tokens does not fit .* cuda:1 .* lower --max-model-len"
    ):
        fitted((GPU, Gpu(600)), (OTHER, Gpu(511)))


def test_a_model_that_fails_in_another_way_is_refused_with_its_own_words() -> None:
    with pytest.raises(ConfigError, match=r"fails at the first batch on cuda:0: ValueError: no such kernel$"):
        fitted((GPU, Gpu(0, ValueError("no such kernel\nand a page of context"))))


def test_memory_is_given_back_only_after_the_failure_has_let_go_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An error holds its frames, and they hold the tensors of the batch that did not fit."""
    held: list[weakref.ref[torch.Tensor]] = []
    seen: list[bool] = []

    class Holder(Gpu):
        def attempt(self, batch: Batch) -> None:
            activations = torch.zeros(3)
            held.append(weakref.ref(activations))
            super().attempt(batch)

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: seen.append(held[-1]() is None))
    gc.disable()  # nothing may depend on when it comes
    try:
        fitted((GPU, Holder(9000)))
    finally:
        gc.enable()
    assert seen == [True]


@pytest.mark.parametrize(
    ("tokens", "length", "most", "lengths"),
    [
        (1000, 512, 256, [488, 512]),
        (1024, 512, 256, [512, 512]),
        (100, 512, 256, [100]),
        (1000, 10, 7, [10] * 7),
        (300, 1, 256, [1] * 256),
    ],
)
def test_a_rehearsed_batch_is_of_the_size_and_number_asked_for(
    tokens: int, length: int, most: int, lengths: list[int]
) -> None:
    batch = rehearsed(tokens, length, most, 113, ("embed",))
    assert [seq.num_tokens for seq in batch.sequences] == lengths


def test_no_two_rehearsed_prompts_are_equal() -> None:
    """Else one of them would be run for all, and the batch would be smaller than it seems."""
    batch = rehearsed(16_384, 64, 256, 113, TASKS)
    assert len(batch.distinct()[0].sequences) == 256
    assert all(0 <= i < 113 for seq in batch.sequences for i in seq.token_ids)


# ── shortage ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("error", "short"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes."), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_a_shortage_is_told_from_other_failures(error: Exception, short: bool) -> None:
    assert is_shortage(error) is short


def test_weights_that_do_not_fit_are_refused_and_other_errors_pass() -> None:
    refused = pytest.raises(ConfigError, match=r"do not fit in the memory of cuda:1: take a 16-bit --dtype")
    with refused, room_for_weights(OTHER):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(KeyError), room_for_weights(OTHER):
        raise KeyError("x")
