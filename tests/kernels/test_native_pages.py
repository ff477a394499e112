"""Attention to the pages of a cache and writing them: natively as the torch twins do, on every instruction set here."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from carpool.kernels import native, native_pages, ops, reference
from carpool.kernels.attention import Choice

needs_native = pytest.mark.skipif(native.library is None, reason="the native kernels are not built")
LEVELS = range(1, native.level + 1)


class Paged(NamedTuple):
    """Sequences whose keys and values lie in shuffled pages, as `paged_attention` takes them, and the whole prompts."""

    query: Tensor  # of the last tokens of each
    key_cache: Tensor
    value_cache: Tensor
    pages: Tensor
    cu_seqlens: Tensor
    key_lengths: Tensor
    longest: int
    prompts: list[tuple[Tensor, Tensor, Tensor]]  # query, key and value [L, N, D] of each

    @property
    def taken(self) -> tuple[Any, ...]:
        return self[:7]

    @property
    def each(self) -> list[tuple[Any, ...]]:
        """The same of every sequence alone."""
        return [
            (
                self.query[start:end],
                self.key_cache,
                self.value_cache,
                self.pages[b : b + 1],
                torch.tensor([0, end - start], dtype=torch.int32),
                self.key_lengths[b : b + 1],
                end - start,
            )
            for b, (start, end) in enumerate(pairwise(self.cu_seqlens.tolist()))
        ]


def paged(
    sequences: list[tuple[int, int, int]],
    page_size: int,
    heads: tuple[int, int],
    size: int,
    dtype: torch.dtype,
) -> Paged:
    """`sequences` are (pages that it begins with and shares with all others who do, tokens of its own, queries)."""
    generator = torch.Generator().manual_seed(size + page_size + sum(map(sum, sequences)))

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    lengths = [prefix * page_size + own for prefix, own, _ in sequences]
    most = max(prefix for prefix, _, _ in sequences)
    needed = [-(-length // page_size) for length in lengths]
    order = iter(torch.randperm(most + sum(needed) + 2, generator=generator).tolist())
    common = [next(order) for _ in range(most)]
    pages = torch.full((len(sequences), max(needed) + 1), -1, dtype=torch.int32)
    for row, count, (prefix, _, _) in zip(pages, needed, sequences, strict=True):
        own = common[:prefix] + [next(order) for _ in range(count - prefix)]
        row[:count] = torch.tensor(own, dtype=torch.int32)
    # What nobody has written may be anything, and has no part.
    total = most + sum(needed) + 2
    caches = [torch.full((total, page_size, heads[1], size), float("nan"), dtype=dtype) for _ in range(2)]
    prompts = []
    for row, length in zip(pages, lengths, strict=True):
        token = torch.arange(length)
        page, place = row.long()[token // page_size], token % page_size
        for cache in caches:
            fresh = random(length, heads[1], size)
            kept = cache[page, place]
            cache[page, place] = torch.where(kept.isnan(), fresh, kept)
        prompts.append((2 * random(length, heads[0], size), caches[0][page, place], caches[1][page, place]))
    counts = [queries for _, _, queries in sequences]
    return Paged(
        torch.cat([query[len(query) - n :] for (query, _, _), n in zip(prompts, counts, strict=True)]),
        caches[0],
        caches[1],
        pages,
        torch.tensor([0, *accumulate(counts)], dtype=torch.int32),
        torch.tensor(lengths, dtype=torch.int32),
        max(counts),
        prompts,
    )


def exactly(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """Causal attention of a whole prompt [L, N, D] in float64."""
    group = query.shape[1] // key.shape[1]
    q, k, v = (x.double().transpose(0, 1) for x in (query, key, value))
    scores = q @ k.repeat_interleave(group, 0).transpose(1, 2) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    behind = torch.arange(len(query))[:, None] - torch.arange(len(query))
    seen = (behind >= 0) & (behind < (window or len(query)))
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return (weights @ v.repeat_interleave(group, 0)).transpose(0, 1)


OWN = st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 97]))


@needs_native
@pytest.mark.parametrize("level", LEVELS)
@given(
    sequences=st.lists(
        st.tuples(st.sampled_from([0, 1, 2, 5]), OWN, st.one_of(st.integers(0, 40), st.just(99))),
        min_size=1,
        max_size=5,
    ).filter(lambda sequences: any(queries for _, _, queries in sequences)),
    page_size=st.sampled_from([1, 3, 16, 48]),
    heads=st.sampled_from([(1, 1), (3, 3), (4, 2), (6, 1)]),
    size=st.sampled_from([16, 48, 64, 128, 256]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    window=st.one_of(st.none(), st.integers(1, 70)),
    softcap=st.sampled_from([None, 5.0]),
)
@settings(max_examples=25, deadline=None)
def test_attention_to_pages_is_as_exact_as_that_within_whole_prompts(
    level: int,
    sequences: list[tuple[int, int, int]],
    page_size: int,
    heads: tuple[int, int],
    size: int,
    dtype: torch.dtype,
    window: int | None,
    softcap: float | None,
) -> None:
    sequences = [(prefix, own, min(queries, prefix * page_size + own)) for prefix, own, queries in sequences]
    given = paged(sequences, page_size, heads, size, dtype)
    how: dict[str, Any] = {"scale": size**-0.5, "window": window, "softcap": softcap}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "level", level)
        mine = native_pages.paged_attention(*given.taken, **how)
        whole = [native.varlen_attention(*x, [(len(x[0]), 1)], causal=True, **how) for x in given.prompts]

    assert mine.dtype == dtype
    bounds = given.cu_seqlens.tolist()
    for (start, end), prompt, packed in zip(pairwise(bounds), given.prompts, whole, strict=True):
        if start < end:
            exact = exactly(*prompt, **how)
            rows = len(exact) - (end - start)
            allowed = 2 * (packed.double() - exact).abs().max() + 1e-6
            assert (mine[start:end].double() - exact[rows:]).abs().max() <= allowed


@needs_native
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 65])
def test_pages_of_long_prompts_are_the_same_alone_and_behind_another(
    level: int, dtype: torch.dtype, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone, windowed queries go piece by piece, and all keys are copied; behind a short prompt they do not."""
    monkeypatch.setattr(native, "level", level)
    given = paged([(3, 5, 50), (3, 900, 800), (3, 600, 40)], 48, (4, 2), 32, dtype)
    how: dict[str, Any] = {"scale": 0.2, "window": window}
    together = native_pages.paged_attention(*given.taken, **how)
    alone = [native_pages.paged_attention(*one, **how) for one in given.each]
    assert torch.equal(together, torch.cat(alone))


@needs_native
def test_what_was_laid_out_in_one_call_is_not_taken_for_the_next_ones() -> None:
    given = paged([(2, 5, 5), (2, 9, 4)], 16, (4, 2), 32, torch.bfloat16)
    before = native_pages.paged_attention(*given.taken, scale=1.0)
    given.value_cache.neg_()

    assert torch.equal(native_pages.paged_attention(*given.taken, scale=1.0), -before)


@needs_native
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_in_pages_is_each_of_its_sequences(
    level: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever shares pages with whom: shorter behind longer, none behind some, a prompt twice, of none a query."""
    monkeypatch.setattr(native, "level", level)
    sequences = [
        (5, 7, 3),
        (2, 1, 9),
        (5, 4, 20),
        (5, 4, 7),
        (5, 4, 30),
        (0, 33, 33),
        (5, 0, 1),
        (3, 3, 0),
        (3, 3, 5),
    ]
    given = paged(sequences, 7, (4, 2), 32, dtype)
    given.pages[3:5] = given.pages[2]  # the very same pages, and more or fewer tokens in the last
    given.key_lengths[2:5] = torch.tensor([36, 39, 37])
    how: dict[str, Any] = {"scale": 0.2, "window": 30}
    together = native_pages.paged_attention(*given.taken, **how)
    alone = [native_pages.paged_attention(*one, **how) for one in given.each]
    assert torch.equal(together, torch.cat(alone))


@needs_native
@pytest.mark.parametrize(
    "wrong",
    [
        {"pages": [[0, 1], [1, 9]]},
        {"pages": [[0, 1], [1, -1]]},
        {"pages": [[0, 1]]},
        {"key_lengths": [4, 33]},
        {"key_lengths": [4, 1]},
        {"key_lengths": [4]},
        {"cu_seqlens": [0, 4, 8]},
        {"cu_seqlens": [0, 4, 5]},
        {"cu_seqlens": [1, 4, 6]},
        {"cu_seqlens": [0, 7, 6]},
    ],
)
def test_pages_that_do_not_hold_a_sequence_are_an_error_and_are_not_read(wrong: dict[str, Any]) -> None:
    tables = {"pages": [[0, 1], [1, 2]], "cu_seqlens": [0, 4, 6], "key_lengths": [4, 32]}
    cache, query = torch.randn(9, 16, 1, 16), torch.randn(6, 2, 16)

    def attend(given: dict[str, Any]) -> None:
        rows: dict[str, Any] = {name: torch.tensor(x, dtype=torch.int32) for name, x in given.items()}
        native_pages.paged_attention(query, cache, cache, longest=4, scale=1.0, **rows)

    attend(tables)
    with pytest.raises(ValueError, match="sequence"):
        attend({**tables, **wrong})
    cache = cache[:, :0]
    with pytest.raises(ValueError, match="of 0 tokens"):
        attend(tables)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_keys_and_values_are_written_where_their_slots_say(dtype: torch.dtype) -> None:
    slots = torch.tensor([5, -1, 0, 47, 48, 13, 1 << 40, 17])
    keys, values = torch.randn(len(slots), 6, 20).to(dtype).split([3, 3], dim=1)  # type: ignore[no-untyped-call]
    caches = [torch.randn(3, 16, 3, 20).to(dtype) for _ in range(2)]
    expected = [cache.clone() for cache in caches]
    reference.kv_write(keys, values, slots, *expected)
    assert native_pages.serves(caches[0], caches[1], keys, values)
    native_pages.kv_write(keys, values, slots, *caches)

    assert all(map(torch.equal, caches, expected))
    assert torch.equal(caches[0].flatten(0, 1)[slots[-1]], keys[-1])


@needs_native
@pytest.mark.parametrize(
    "wrong",
    [
        {"slots": torch.zeros(4, dtype=torch.int64)},
        {"slots": torch.zeros(3, dtype=torch.int32)},
        {"keys": torch.zeros(3, 2, 8)},
        {"values": torch.zeros(3, 1, 16)},
        {"values": torch.zeros(3, 2, 16).bfloat16()},
        {"keys": torch.zeros(2, 3, 16).transpose(0, 1)},
        {"value_cache": torch.zeros(3, 4, 2, 16)},
        {"key_cache": torch.zeros(4, 2, 2, 16).transpose(0, 1)},
    ],
)
def test_rows_that_do_not_fit_a_cache_are_not_written(wrong: dict[str, Tensor]) -> None:
    given = {
        "keys": torch.zeros(3, 2, 16),
        "values": torch.zeros(3, 2, 16),
        "slots": torch.arange(3),
        "key_cache": torch.zeros(2, 4, 2, 16),
        "value_cache": torch.zeros(2, 4, 2, 16),
    }
    native_pages.kv_write(**given)
    with pytest.raises(ValueError, match="do not fit"):
        native_pages.kv_write(**{**given, **wrong})


@needs_native
def test_pages_are_read_and_written_natively_where_that_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    given = paged([(1, 5, 5), (1, 9, 4)], 16, (4, 2), 32, torch.bfloat16)
    tokens = torch.zeros(2, 2, 32, dtype=torch.bfloat16), torch.ones(2, 2, 32, dtype=torch.bfloat16)
    calls: list[str] = []

    def noted(plainly: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kind: Any) -> Any:
            calls.append(plainly.__name__)
            return plainly(*args, **kind)

        return call

    monkeypatch.setattr(native_pages, "paged_attention", noted(native_pages.paged_attention))
    monkeypatch.setattr(native_pages, "kv_write", noted(native_pages.kv_write))
    caches = given.key_cache, given.value_cache
    ops.kv_write(*tokens, torch.tensor([0, 1]), *caches)
    ops.paged_attention(*given.taken, scale=1.0, window=3, softcap=2.0)
    assert calls == ["kv_write", "paged_attention"]
    assert str(ops.paged_attention_of(given.query, *caches)) == f"native: {native.LEVELS[native.level]}"

    # what the native code has not, or cannot take
    sinks = torch.ones(4)
    out = ops.paged_attention(*given.taken, scale=1.0, sinks=sinks)
    assert torch.equal(out, reference.paged_attention(*given.taken, scale=1.0, sinks=sinks))
    assert ops.paged_attention_of(given.query, *caches, sinks=sinks) == Choice("torch", "sinks")
    apart = given.query.transpose(0, 1).contiguous().transpose(0, 1)
    again = ops.paged_attention(apart, *given.taken[1:], scale=1.0)
    assert torch.equal(again, reference.paged_attention(*given.taken, scale=1.0))
    gaps = [cache.transpose(0, 1).contiguous().transpose(0, 1) for cache in caches]
    ops.kv_write(*tokens, torch.tensor([2, 3]), *gaps)
    assert gaps[1].isfinite()[0, 2:4].all()
    assert calls == ["kv_write", "paged_attention"]


def test_pages_without_the_library_are_the_twins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", None)
    given = paged([(1, 5, 5)], 16, (2, 2), 32, torch.float32)
    slots, tokens = torch.tensor([3]), torch.ones(1, 2, 32)
    ops.kv_write(tokens, tokens, slots, given.key_cache, given.value_cache)

    assert torch.equal(given.key_cache[0, 3], tokens[0])
    out = ops.paged_attention(*given.taken, scale=1.0)
    assert torch.equal(out, reference.paged_attention(*given.taken, scale=1.0))
