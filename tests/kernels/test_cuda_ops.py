"""The operations on a CUDA device, without one: what each launches, and what it refuses before."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from carpool.kernels import cuda_ops, cuda_table, launch, reference
from carpool.kernels.launch import Launch, LaunchError

BOUNDS = torch.tensor([0, 3, 8], dtype=torch.int32)
PAIR = torch.zeros(2, dtype=torch.int32)


@dataclass
class Recorder:
    """Takes launches and runs none of them."""

    launches: list[Launch] = field(default_factory=list)

    def serves(self, device: torch.device) -> bool:
        return True

    def run(self, launch: Launch) -> None:
        self.launches.append(launch)

    @property
    def names(self) -> list[str]:
        return [launch.instance.expression for launch in self.launches]


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(launch, "backend", recorder)
    return recorder


def pooled(
    tokens: int = 8, columns: int = 16, count: int = 2, dtype: torch.dtype = torch.float32, **changed: Any
) -> tuple[Tensor, Tensor]:
    """`pool_rows` of `count` sequences, the last of which has what the others leave."""
    bounds = torch.tensor([*range(count), tokens], dtype=torch.int32) if count else BOUNDS[:1]
    given: dict[str, Any] = {
        "hidden": torch.zeros(tokens, columns, dtype=dtype),
        "cu_seqlens": bounds,
        "modes": torch.full((count,), reference.MEAN, dtype=torch.int8),
        "widths": torch.full((count,), columns, dtype=torch.int32),
        "normalize": torch.ones(count, dtype=torch.bool),
    }
    return cuda_ops.pool_rows(**{**given, **changed})


def attended(**changed: Any) -> Tensor:
    """`packed_attention` of the two sequences of BOUNDS, 4 heads of 32 columns that share 2 of keys."""
    given: dict[str, Any] = {
        "query": torch.zeros(8, 4, 32),
        "key": torch.zeros(8, 2, 32),
        "value": torch.zeros(8, 2, 32),
        "cu_seqlens": BOUNDS,
        "longest": 5,
        "scale": 0.5,
    }
    return cuda_ops.packed_attention(**{**given, **changed})


def attended_pages(**changed: Any) -> Tensor:
    """`paged_attention` of the same queries' heads of 8 columns, 2 pages a sequence."""
    given: dict[str, Any] = {
        "query": torch.zeros(8, 2, 8),
        "key_cache": NO_CACHE,
        "value_cache": NO_CACHE,
        "pages": torch.zeros(2, 2, dtype=torch.int32),
        "cu_seqlens": BOUNDS,
        "key_lengths": PAIR,
        "longest": 5,
        "scale": 0.5,
    }
    return cuda_ops.paged_attention(**{**given, **changed})


# ── what goes to the device ──────────────────────────────────────────────────────────────────────────────────────


def test_arguments_have_exactly_the_width_that_the_kernel_takes(recorder: Recorder) -> None:
    pooled(dtype=torch.bfloat16)
    [made] = recorder.launches
    assert made.instance.expression == "pool_rows<__nv_bfloat16, float>"
    assert [value.nbytes for value in made.packed] == [8] * 8 + [4, 4]
    assert made.packed[-2:] == (np.int32(16), np.float32(1e-12))
    assert [value.dtype.kind for value in made.packed] == ["u"] * 8 + ["i", "f"]


def test_tensors_go_as_addresses_and_none_as_null(recorder: Recorder) -> None:
    hidden = torch.zeros(8, 16)
    out, scales = pooled(hidden=hidden)
    packed = recorder.launches[0].packed
    assert [int(packed[i]) for i in (0, 5, 6, 7)] == [hidden.data_ptr(), 0, out.data_ptr(), scales.data_ptr()]


def test_64_bit_scalars_stay_so(recorder: Recorder) -> None:
    cuda_ops.step_rows(torch.zeros(8, dtype=torch.int64), BOUNDS[:1], 5)
    assert not recorder.launches
    run = Launch(
        cuda_table.instance("step_count"),
        (1,),
        128,
        0,
        (torch.zeros(8, dtype=torch.int64), BOUNDS, PAIR, 2, -(1 << 40)),
    )
    assert run.packed[-1] == np.int64(-(1 << 40))
    assert run.packed[-1].nbytes == 8


def test_long_sequences_are_pooled_in_two_passes(recorder: Recorder) -> None:
    pooled(tokens=1000, longest=999)
    assert recorder.names == ["pool_split<float>", "pool_rows<float, float>"]
    split, join = recorder.launches
    assert split.grid == (1000 // cuda_table.CHUNK + 2,)
    partial = split.arguments[4]
    assert isinstance(partial, Tensor)
    assert partial.shape == (split.grid[0], 16)
    assert join.arguments[5] is partial


def test_short_sequences_are_pooled_in_one(recorder: Recorder) -> None:
    pooled(tokens=1000, longest=cuda_ops.LONG)
    assert recorder.names == ["pool_rows<float, float>"]
    assert recorder.launches[0].arguments[5] is None


def test_a_row_a_warp_fills_whole_blocks_and_no_more(recorder: Recorder) -> None:
    for rows in (1, 4, 5, 8, 9):
        cuda_ops.activate_rows(torch.zeros(rows, 3), torch.zeros(rows, dtype=torch.int8))
    assert [made.grid for made in recorder.launches] == [(1,), (1,), (2,), (2,), (3,)]
    assert {made.threads for made in recorder.launches} == {128}


def by_name(made: Launch) -> dict[str, launch.Argument]:
    return dict(zip((each.name for each in made.instance.parameters), made.arguments, strict=True))


@pytest.mark.parametrize(
    ("size", "instance", "queries"), [(8, "64", 64), (64, "64", 64), (72, "128", 64), (256, "256", 32)]
)
def test_attention_has_a_block_for_every_tile_and_head(
    recorder: Recorder, size: int, instance: str, queries: int
) -> None:
    """As many blocks as there may be tiles, without a look at where sequences end: that is on the device."""
    query, key = torch.zeros(200, 4, size), torch.zeros(200, 2, size)
    attended(
        query=query, key=key, value=key, cu_seqlens=torch.tensor([0, 3, 200], dtype=torch.int32), longest=197
    )
    [made] = recorder.launches
    assert recorder.names == [f"attention<float, {instance}>"]
    assert made.grid == (200 // queries + 2, 4)
    assert made.shared == 0
    assert by_name(made)["group"] == 2


def test_attention_takes_views_of_a_fused_row(recorder: Recorder) -> None:
    fused = torch.zeros(8, 8, 32)
    query, key, value = torch.split(fused, [4, 2, 2], 1)
    attended(query=query, key=key, value=value)
    given = by_name(recorder.launches[0])
    strides = [given[f"{name}_{kind}"] for name in ("query", "key", "value") for kind in ("stride", "head")]
    assert strides == [256, 32] * 3
    at = fused.data_ptr()
    assert [int(each) for each in recorder.launches[0].packed[:3]] == [at, at + 4 * 128, at + 4 * 192]


def test_how_far_a_token_sees(recorder: Recorder) -> None:
    for causal, window in ((False, None), (True, None), (False, 3), (True, 3), (False, 1 << 40)):
        attended(causal=causal, window=window)
    attended_pages(window=2)
    far = cuda_ops.attention._FAR
    sights = [(by_name(made)["left"], by_name(made)["right"]) for made in recorder.launches]
    assert sights == [(far, far), (far, 0), (2, 2), (2, 0), (far, far), (1, 0)]


def test_pages_are_read_at_the_strides_of_their_caches(recorder: Recorder) -> None:
    attended_pages()
    given = by_name(recorder.launches[0])
    assert [given[name] for name in ("page_size", "most", "key_stride", "key_head")] == [4, 2, 8, 8]
    assert given["pages"] is not None
    assert given["key_lengths"] is PAIR


def test_16_bit_biases_and_sinks_are_widened(recorder: Recorder) -> None:
    attended(bias=torch.zeros(4, 9).half(), sinks=torch.zeros(4).bfloat16())
    given = by_name(recorder.launches[0])
    assert given["reach"] == 9
    for name in ("bias", "sinks"):
        widened = given[name]
        assert isinstance(widened, Tensor)
        assert widened.dtype == torch.float32


@pytest.mark.parametrize("columns", [8, 24, 384, 768, 1024, 4096, cuda_ops.WIDEST])
@pytest.mark.parametrize("vector", [4, 8])
def test_staged_rows_fit_for_every_width(columns: int, vector: int) -> None:
    """What pool.cu lays out, counted by its own rule for every width a row may have."""
    threads, room = 256, cuda_table.pooling_shared(columns, vector, 256)
    for width in range(columns + 1):
        vectors = -(-width // vector)
        unit = 32 // vector
        pitch = (-(-vectors // unit) | 1) * unit
        lanes = min(threads // max(1, min(vectors, threads)), cuda_table.MOST_LANES)
        assert 4 * lanes * vector * pitch <= room
    static = cuda_table.BY_NAME["pool_rows"].shared
    assert room + static <= 48 << 10, "what a block gets without asking"


# ── what never gets there ────────────────────────────────────────────────────────────────────────────────────────

HIDDEN, NOTHING = torch.zeros(8, 16), torch.zeros(0, 16)
NO_ROWS, NO_FLAGS = torch.zeros(0, dtype=torch.int32), torch.zeros(0, dtype=torch.bool)
NO_CACHE = torch.zeros(2, 4, 1, 8)


def test_empty_batches_launch_nothing(recorder: Recorder) -> None:
    """CuPy makes one block of a grid of none, and it would read what is not there."""
    none = NO_ROWS
    assert pooled(count=0)[0].shape == (0, 16)
    assert cuda_ops.gather_rows(HIDDEN, none, none, NO_FLAGS, "binary")[0].shape == (0, 2)
    assert cuda_ops.step_rows(none.long(), BOUNDS[:1], 0)[1].tolist() == [0]
    assert cuda_ops.activate_rows(NOTHING, none.to(torch.int8)).shape == (0, 16)
    assert cuda_ops.sparse_rows(NOTHING, BOUNDS[:1]).shape == (0, 16)
    assert cuda_ops.cosine_pairs(HIDDEN, HIDDEN, none, none).shape == (0,)
    assert cuda_ops.maxsim(HIDDEN, BOUNDS, HIDDEN, BOUNDS, none, none).shape == (0,)
    assert cuda_ops.norm_rows(NOTHING, None, torch.ones(16), None, 1e-6, centred=True)[0].shape == (0, 16)
    assert cuda_ops.rotary(torch.zeros(0, 2, 8), torch.zeros(0, 8), torch.zeros(0, 8)).shape == (0, 2, 8)
    assert cuda_ops.gated(NOTHING, "silu").shape == (0, 8)
    cuda_ops.kv_write(torch.zeros(0, 1, 8), torch.zeros(0, 1, 8), none.long(), NO_CACHE, NO_CACHE)
    pages = torch.zeros(0, 3, dtype=torch.int32)
    assert cuda_ops.kv_gather(NO_CACHE, NO_CACHE, pages, BOUNDS[:1], 0)[0].shape == (0, 1, 8)
    heads = torch.zeros(0, 2, 8)
    assert attended(query=heads, key=heads, value=heads, cu_seqlens=BOUNDS[:1]).shape == (0, 2, 8)
    assert attended_pages(query=heads, pages=pages, cu_seqlens=BOUNDS[:1], key_lengths=none).shape == (
        0,
        2,
        8,
    )
    assert not recorder.launches


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"hidden": torch.zeros(8, 18)}, "whole 16 bytes"),
        ({"hidden": torch.zeros(8, 12, dtype=torch.float16)}, "whole 16 bytes"),
        ({"hidden": torch.zeros(129)[1:].view(8, 16)}, "whole 16 bytes"),
        ({"hidden": torch.zeros(8, 32)[:, :16]}, "without gaps"),
        ({"hidden": torch.zeros(8, 0)}, "without gaps"),
        ({"hidden": torch.zeros(8, cuda_ops.WIDEST + 8)}, "shared memory"),
        ({"hidden": torch.zeros(8, 16, dtype=torch.float64)}, "must be float32"),
        ({"cu_seqlens": BOUNDS[:0]}, "cumulative lengths"),
        ({"cu_seqlens": torch.tensor([0, 1, 8])}, "bounds points to int, got torch.int64"),
        ({"modes": torch.zeros(2)}, "modes points to signed char"),
        ({"modes": torch.zeros(3, dtype=torch.int8)}, r"modes must be \[2\]"),
        ({"widths": torch.zeros(4, dtype=torch.int32)[::2]}, r"widths must be \[2\]"),
        ({"normalize": torch.zeros(2, dtype=torch.uint8)}, "unit points to bool"),
    ],
)
def test_what_a_kernel_cannot_take_is_refused(recorder: Recorder, changed: dict[str, Any], why: str) -> None:
    with pytest.raises(LaunchError, match=why):
        pooled(**changed)
    assert not recorder.launches


def test_other_operations_refuse_what_does_not_fit(recorder: Recorder) -> None:
    x, half = torch.zeros(8, 2, 16), torch.zeros(8, 16)
    caches = NO_CACHE, NO_CACHE
    slots = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(LaunchError, match="rows of a kind"):
        cuda_ops.cosine_pairs(HIDDEN, torch.zeros(8, 32), PAIR, PAIR)
    with pytest.raises(LaunchError, match="rows of a kind"):
        cuda_ops.maxsim(HIDDEN, BOUNDS, HIDDEN.half(), BOUNDS, PAIR, PAIR)
    with pytest.raises(LaunchError, match="residual has 7 rows"):
        cuda_ops.norm_rows(HIDDEN, HIDDEN[:7], torch.ones(16), None, 1e-6, centred=False)
    with pytest.raises(LaunchError, match="weight points to float"):
        cuda_ops.norm_rows(HIDDEN, None, torch.ones(16).half(), None, 1e-6, centred=False)
    with pytest.raises(LaunchError, match="cannot be turned"):
        cuda_ops.rotary(x, half[:, :7].contiguous(), half[:, :7].contiguous())
    with pytest.raises(LaunchError, match="do not fit"):
        cuda_ops.rotary(x.transpose(0, 1), half, half)
    with pytest.raises(LaunchError, match=r"float32 or torch\.float32"):
        cuda_ops.rotary(x, half.half(), half.half())
    with pytest.raises(LaunchError, match="each half"):
        cuda_ops.gated(torch.zeros(2, 12), "gelu")
    with pytest.raises(LaunchError, match="do not fit caches"):
        cuda_ops.kv_write(torch.zeros(3, 2, 8), torch.zeros(3, 2, 8), slots, *caches)
    with pytest.raises(LaunchError, match=r"must be \[3, N, D\]"):
        cuda_ops.kv_write(torch.zeros(2, 1, 8), torch.zeros(2, 1, 8), slots, *caches)
    with pytest.raises(LaunchError, match="whole 16 bytes"):
        cuda_ops.kv_gather(torch.zeros(2, 4, 1, 3), torch.zeros(2, 4, 1, 3), BOUNDS[None], BOUNDS[:2], 3)
    with pytest.raises(LaunchError, match="pages must be"):
        cuda_ops.kv_gather(*caches, BOUNDS[None], BOUNDS, 8)
    assert not recorder.launches


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"query": torch.zeros(8, 4, 34)}, "whole 16 bytes and at most 256 columns wide, got 34"),
        ({"query": torch.zeros(8, 4, 260)}, "at most 256 columns"),
        ({"query": torch.zeros(8, 4, 33)[..., 1:]}, "query: heads must be whole 16 bytes"),
        ({"key": torch.zeros(8, 32, 2).transpose(1, 2)}, "key: heads must be whole 16 bytes"),
        ({"value": torch.zeros(513)[1:].view(8, 2, 32)}, "value: heads must be whole 16 bytes"),
        ({"query": torch.zeros(8, 4, 32).double()}, "must be float32"),
        ({"key": torch.zeros(8, 2, 32).half()}, "does not fit 32 columns of torch.float32"),
        ({"value": torch.zeros(8, 2, 64)}, "does not fit 32 columns"),
        ({"value": torch.zeros(8, 4, 32)}, "are not alike"),
        ({"key": torch.zeros(8, 3, 32), "value": torch.zeros(8, 3, 32)}, "4 heads do not share out 3"),
        ({"key": torch.zeros(7, 2, 32)}, "key has 7 tokens, query has 8"),
        ({"cu_seqlens": BOUNDS.long()}, "bounds points to int"),
        ({"window": 0}, "at least 1"),
        ({"bias": torch.zeros(4, 7)}, "do not cover a text of 5 tokens"),
        ({"bias": torch.zeros(4, 10)}, "2M - 1"),
        ({"bias": torch.zeros(2, 9)}, "2M - 1"),
        ({"sinks": torch.zeros(2)}, r"sinks must be \[4\]"),
        ({"seen": torch.zeros(3, dtype=torch.int32)}, r"seen must be \[2\]"),
        ({"seen": torch.zeros(2)}, "seen points to int"),
    ],
)
def test_attention_refuses_what_it_cannot_read(recorder: Recorder, changed: dict[str, Any], why: str) -> None:
    with pytest.raises(LaunchError, match=why):
        attended(**changed)
    assert not recorder.launches


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"pages": torch.zeros(3, 2, dtype=torch.int32)}, "pages must be"),
        ({"pages": torch.zeros(2, 4, dtype=torch.int32)[:, ::2]}, "pages must be"),
        ({"pages": torch.zeros(2, 2)}, "pages points to int"),
        ({"key_lengths": BOUNDS}, r"key_lengths must be \[2\]"),
        ({"value_cache": NO_CACHE[:1]}, "caches must be alike"),
        ({"query": torch.zeros(8, 2, 8).half()}, "does not fit 8 columns of torch.float16"),
    ],
)
def test_attention_refuses_pages_that_do_not_fit(
    recorder: Recorder, changed: dict[str, Any], why: str
) -> None:
    with pytest.raises(LaunchError, match=why):
        attended_pages(**changed)
    assert not recorder.launches


# ── twins ────────────────────────────────────────────────────────────────────────────────────────────────────────

OPERATIONS = [
    name for name, value in vars(cuda_ops).items() if inspect.isfunction(value) and not name.startswith("_")
]


def test_each_operation_has_a_twin_of_its_name_and_signature() -> None:
    assert len(OPERATIONS) == 14
    for name in OPERATIONS:
        ours, twin = (inspect.signature(getattr(room, name), eval_str=True) for room in (cuda_ops, reference))
        assert ours == twin, name
