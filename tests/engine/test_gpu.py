"""The whole engine on a CUDA device, against itself on the CPU. They have not run on a device yet.

`./dev bench gpu` runs these, and all else that is marked `gpu`.
"""

from __future__ import annotations

import asyncio
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from carpool.engine.async_engine import AsyncEngine
from carpool.engine.batch import Batch
from carpool.engine.build import Parts, build
from carpool.engine.config import EngineConfig
from carpool.engine.llm import LLM
from carpool.engine.params import PoolingParams, TokenizationParams
from carpool.engine.sequence import Sequence
from zoo import MEMBERS, Member
from zoo.measure import measure

pytestmark = pytest.mark.gpu
TEXTS = ["A text.", "Another, which is somewhat longer than the first.", "word " * 200, ""]


def vectors(texts: list[str] = TEXTS, **options: Any) -> NDArray[np.float32]:
    with closing(LLM(**options)) as llm:
        return np.array([output.outputs.embedding for output in llm.embed(texts, use_tqdm=False)])


def least_cosine(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    products = (one * other).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)
    return float(products.min())


@pytest.mark.parametrize(
    ("dtype", "cosine"), [("float32", 1 - 1e-5), ("float16", 0.999), ("bfloat16", 0.998)]
)
def test_minilm_means_the_same_as_on_a_cpu(dtype: str, cosine: float) -> None:
    there = vectors(device="cuda", dtype=dtype)
    assert least_cosine(there, vectors(device="cpu", dtype="float32")) > cosine


@pytest.mark.parametrize("member", MEMBERS, ids=lambda member: member.name)
def test_every_family_equals_its_reference(member: Member, tmp_path: Path) -> None:
    """In float32, which torch's matrix products are by default: TF32 would round their factors to 10 bits."""
    if "quantization" in member.options:
        pytest.skip("int8 is for CPUs")
    line = measure(replace(member, options={**member.options, "device": "cuda"}), tmp_path)
    assert max(line.alone, line.company) < 1e-3


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_company_does_not_matter(dtype: str) -> None:
    crowd = TEXTS + [f"neighbour {i} " * (i % 40) for i in range(300)]
    alone = np.concatenate([vectors([text], device="cuda", dtype=dtype) for text in TEXTS])
    assert least_cosine(alone, vectors(crowd, device="cuda", dtype=dtype)[: len(TEXTS)]) > 1 - 1e-4


def test_graphs_change_nothing() -> None:
    plain = vectors(device="cuda", dtype="float16")
    assert least_cosine(plain, vectors(device="cuda", dtype="float16", cuda_graphs=True)) > 1 - 1e-5


def test_no_surgery_changes_nothing() -> None:
    plain = vectors(device="cuda", dtype="float32")
    assert least_cosine(plain, vectors(device="cuda", dtype="float32", surgery=False)) > 1 - 1e-5


def test_our_attention_serves_what_torch_does_not() -> None:
    parts = built(dtype="float32")
    assert "cupy" in parts.model.attention
    assert "varlen_attn" in built(dtype="float16").model.attention


# ── the road of a batch ──────────────────────────────────────────────────────────────────────────────────────────


def built(**options: Any) -> Parts:
    return build(EngineConfig(device="cuda", **options))


def batch_of(*lengths: int) -> Batch:
    sequences = [
        Sequence(0, i, [i + 7] * length, PoolingParams(), "embed") for i, length in enumerate(lengths)
    ]
    return Batch.of(sequences)


def test_launching_a_batch_never_makes_the_host_wait() -> None:
    runner = built(dtype="float16").runners[0]
    runner.bind()
    runner.run(batch_of(5, 80, 3))
    torch.cuda.set_sync_debug_mode("error")
    try:
        landings = [runner.launch(batch_of(5, 80, 3)), runner.launch(batch_of(9))]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [len(landing()) for landing in landings] == [3, 1]


def test_batches_under_way_together_keep_their_results_apart() -> None:
    runner = built(dtype="float32").runners[0]
    runner.bind()
    batches = [batch_of(*range(1 + i, 60 + i)) for i in range(8)]
    expected = [runner.run(batch) for batch in batches]
    landings = [runner.launch(batch) for batch in batches]
    for landing, rows in zip(landings, expected, strict=True):
        for got, row in zip(landing(), rows, strict=True):
            assert isinstance(got, np.ndarray)
            assert isinstance(row, np.ndarray)
            np.testing.assert_array_equal(got, row)


def test_a_batch_that_does_not_fit_is_run_in_halves() -> None:
    parts = built(dtype="float32")
    runner = parts.runners[0]
    runner.bind()
    torch.cuda.empty_cache()
    rows = runner.run(batch_of(*[64] * 8))
    room = torch.cuda.memory_allocated() + (64 << 20)
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(0).total_memory)
    try:
        crowded = runner.run(batch_of(*[64] * 512))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert all(isinstance(row, np.ndarray) for row in crowded)
    assert len(crowded) == 512
    assert isinstance(rows[0], np.ndarray)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
async def test_two_devices_serve_as_one_does() -> None:
    async def answers(**options: Any) -> list[Any]:
        engine = AsyncEngine(EngineConfig(device="cuda", dtype="float32", **options))
        await engine.start()
        texts = [f"text {i} " * (1 + i % 50) for i in range(200)]
        asked = [engine.pool([text], PoolingParams(), TokenizationParams()) for text in texts]
        rows = [result.rows[0] for result in await asyncio.gather(*asked)]
        await engine.stop(5)
        return rows

    for one, other in zip(await answers(), await answers(data_parallel_size=2), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
