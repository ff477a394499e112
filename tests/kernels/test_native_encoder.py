"""A whole encoder in one native call: its layers one after the other, to the bit, and what the twin computes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from carpool.kernels import (
    native,
    native_encoder,
    native_linear,
    native_linear8,
    native_pages,
    native_rows,
    twins_cpu,
)
from carpool.kernels.layout import Kept, Layout, Past
from carpool.kernels.panels import Panels
from carpool.kernels.panels8 import Panels8
from carpool.kernels.reference import Activation
from carpool.kernels.twins_cpu import EncoderLayer, Norm

pytestmark = pytest.mark.skipif(native.library is None, reason="the native kernels are not built")
few = settings(max_examples=25, deadline=None)
runs_of = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 3)), min_size=1, max_size=4)
DTYPES = [torch.float32, *([torch.bfloat16] if native.level >= 3 else [])]
KINDS: list[Any] = [Panels, *([Panels8] if native_linear8.multiplies else [])]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def layer(
    width: int,
    wide: int,
    dtype: torch.dtype,
    kinds: list[Any],
    *,
    size: int = 16,
    activation: Activation | None = "gelu",
    seed: int = 0,
    **attention: Any,
) -> EncoderLayer:
    """`kinds` of its four products: one for all, or one each."""
    shapes = (3 * width, width), (width, width), (wide, width), (width, wide)
    joint, out, up, down = (
        kind.of((randn(*shape, seed=seed) * shape[1] ** -0.5).to(dtype), randn(shape[0], seed=seed))
        for kind, shape in zip(kinds * (4 // len(kinds)), shapes, strict=True)
    )
    attended, done = (
        Norm(randn(width, seed=i) + 2, randn(width, seed=i), 1e-6, centred=True) for i in (seed, seed + 1)
    )
    parts: dict[str, Any] = {"joint": joint, "out": out, "up": up, "down": down}
    parts |= {"attended": attended, "done": done, "activation": activation}
    return EncoderLayer(**parts, heads=width // size, scale=size**-0.5, **attention)


def norm_of(width: int, *, centred: bool, seed: int = 0) -> Norm:
    return Norm(randn(width, seed=seed) + 2, randn(width, seed=seed) if centred else None, 1e-6, centred)


def today(
    dtype: torch.dtype,
    kinds: list[Any],
    *,
    norms: AbstractSet[str],
    gate_first: bool | None = True,
    centred: bool = False,
    heads: tuple[int, int] = (4, 2),
    size: int = 32,
    seed: int = 0,
    **others: Any,
) -> EncoderLayer:
    """With norms at these places; rows of 48, and a feed-forward block of 80."""
    width, wide, (query, key) = 48, 80, heads
    shapes = {
        "joint": ((query + 2 * key) * size, width),
        "out": (width, query * size),
        "up": (wide if gate_first is None else 2 * wide, width),
        "down": (width, wide),
    }
    products: dict[str, Any] = {
        name: kind.of((randn(*shape, seed=seed) * shape[1] ** -0.5).to(dtype), None)
        for kind, (name, shape) in zip(kinds * (4 // len(kinds)), shapes.items(), strict=True)
    }
    own: dict[str, Any] = {
        name: norm_of(size if name in ("query", "key") else width, centred=centred, seed=seed)
        for name in sorted(norms)
    }
    return EncoderLayer(
        **products, **own, gate_first=gate_first, heads=query, kv_heads=key, scale=size**-0.5, **others
    )


def one_by_one(
    hidden: Tensor,
    layers: Sequence[EncoderLayer],
    runs: list[tuple[int, int]],
    angles: Sequence[tuple[Tensor, Tensor]] = (),
    kept: Kept | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """By the native kernels of its parts."""

    def of(product: Panels | Panels8) -> Any:
        return native_linear if isinstance(product, Panels) else native_linear8

    def normed(x: Tensor, norm: Norm | None) -> Tensor:
        if norm is None:
            return x
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        made, _ = native_rows.norm_rows(rows, None, norm.weight, norm.bias, norm.eps, centred=norm.centred)
        return made.view(x.shape)

    for number, one in enumerate(layers):
        heads = of(one.joint).linear(normed(hidden, one.before), one.joint)
        query, key, value = heads.view(len(hidden), sum(one.all_heads), -1).split(one.all_heads, 1)
        query, key = normed(query, one.query), normed(key, one.key)
        if one.angles is not None:
            query, key = (native_rows.rotary(x, *angles[one.angles]) for x in (query, key))
        kind: dict[str, Any] = {"scale": one.scale, "window": one.window, "softcap": one.softcap}
        if kept is not None:
            native_pages.kv_write(key.contiguous(), value, kept.slots, *kept.layers[number])
        past = None if kept is None else kept.past
        start, own_runs = len(hidden), runs
        if past is not None:
            start, own_runs = past.start, [] if past.others is None else list(past.others.runs)
        mixed = native.varlen_attention(
            query[:start],
            key[:start],
            value[:start],
            own_runs,
            causal=one.causal,
            bias=bias if one.biased else None,
            **kind,
        )
        if kept is not None and past is not None:
            tables: Any = past.pages, past.cu_seqlens, past.key_lengths, past.longest
            back = native_pages.paged_attention(query[start:], *kept.layers[number], *tables, **kind)
            mixed = torch.cat((mixed, back))
        attended = of(one.out).linear_norm(mixed.flatten(1), one.out, hidden, one.attended, added=one.added)
        between = normed(attended, one.between)
        if one.gate_first is None:
            wide = of(one.up).linear(between, one.up, one.activation)
        else:
            assert one.activation is not None
            both = of(one.up).linear(between, one.up)
            wide = native_rows.gated(both, one.activation, gate_first=one.gate_first)
        hidden = of(one.down).linear_norm(wide, one.down, attended, one.done, added=one.added)
    return hidden


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(
    runs=runs_of,
    shape=st.sampled_from([(32, 64, 16), (48, 16, 48), (64, 224, 32)]),
    kinds=st.lists(st.sampled_from(KINDS), min_size=4, max_size=4),
    activation=st.sampled_from([None, "gelu", "gelu_tanh", "silu"]),
    attention=st.fixed_dictionaries(
        {}, optional={"window": st.just(3), "softcap": st.just(5.0), "biased": st.just(True)}
    ),
)
@few
def test_it_is_its_layers_one_after_the_other_to_the_bit(
    dtype: torch.dtype,
    runs: list[tuple[int, int]],
    shape: tuple[int, int, int],
    kinds: list[Any],
    activation: Activation | None,
    attention: dict[str, Any],
) -> None:
    width, wide, size = shape
    layers = [
        layer(width, wide, dtype, kinds, size=size, activation=activation, seed=i, **attention)
        for i in range(3)
    ]
    hidden = randn(sum(length * count for length, count in runs), width).to(dtype)
    before, bias = hidden.clone(), bias_for(layers, runs)
    for count in (1, 2, 3):
        encoder = native_encoder.Encoder(layers[:count], dtype)
        made = one_by_one(hidden, layers[:count], runs, bias=bias)
        assert torch.equal(encoder(hidden, runs, bias=bias), made)
    assert torch.equal(hidden, before)


def bias_for(layers: list[EncoderLayer], runs: list[tuple[int, int]]) -> Tensor:
    return 3 * randn(layers[0].heads, 2 * max(length for length, _ in runs) + 1)


norms_of = st.sets(st.sampled_from(["before", "query", "key", "attended", "between", "done"]))
attention_of = st.fixed_dictionaries(
    {"causal": st.booleans()}, optional={"window": st.just(3), "softcap": st.just(5.0)}
)


def angles_for(tokens: int) -> list[tuple[Tensor, Tensor]]:
    return [(turned.cos(), turned.sin()) for turned in randn(2, tokens, 32)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(
    runs=runs_of,
    norms=norms_of,
    heads=st.sampled_from([(4, 2), (2, 2), (3, 1)]),
    size=st.sampled_from([32, 48]),
    centred=st.booleans(),
    kinds=st.lists(st.sampled_from(KINDS), min_size=4, max_size=4),
    gate_first=st.sampled_from([True, False, None]),
    activation=st.sampled_from(["gelu", "gelu_tanh", "silu"]),
    added=st.booleans(),
    angles=st.lists(st.sampled_from([None, 0, 1]), min_size=3, max_size=3),
    attention=attention_of,
)
@few
def test_a_layer_of_today_is_its_parts_one_after_the_other_to_the_bit(
    dtype: torch.dtype,
    runs: list[tuple[int, int]],
    angles: list[int | None],
    attention: dict[str, Any],
    **kind: Any,
) -> None:
    layers = [
        today(dtype, **kind, **attention, angles=turned, seed=seed) for seed, turned in enumerate(angles)
    ]
    tokens = sum(length * count for length, count in runs)
    hidden, tables = randn(tokens, 48).to(dtype), angles_for(tokens)
    before = hidden.clone()
    made = native_encoder.Encoder(layers, dtype)(hidden, runs, angles=tables)
    assert torch.equal(made, one_by_one(hidden, layers, runs, tables))
    assert torch.equal(hidden, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pasts", [None, [(7, 13), (1, 20)], [(5, 0), (2, 9), (1, 3)]], ids=str)
def test_what_is_kept_goes_into_pages_and_comes_from_there(
    dtype: torch.dtype, pasts: list[tuple[int, int]] | None
) -> None:
    """`pasts`: the tokens in the row of each sequence, and those that were there before; those of none come first."""
    lengths = [own for own, _ in pasts or [(4, 0), (6, 0)]]
    whole, tokens = [own + past for own, past in pasts or []], sum(lengths)
    layers = [
        today(dtype, [Panels], norms={"before", "between"}, activation="silu", causal=True, angles=0, seed=i)
        for i in range(2)
    ]
    pages = [
        tuple(randn(9, 8, 2, 32, seed=seed + number).to(dtype) for seed in (1, 2)) for number in range(2)
    ]
    past = None
    if pasts is not None:
        first = sum(own for own, past in pasts if not past)
        own = [length for length, (_, past) in zip(lengths, pasts, strict=True) if past]
        tables = torch.arange(len(own) * 3, dtype=torch.int32).view(-1, 3)
        bounds = torch.tensor([0, *own], dtype=torch.int32).cumsum(0)
        totals = torch.tensor([total for total, (_, past) in zip(whole, pasts, strict=True) if past])
        others = None
        if first:
            others = Layout(((first, 1),), first, torch.tensor([0, first]), torch.arange(first))
        past = Past(first, max(own), tables, bounds, totals, others)
    slots = torch.randperm(72, generator=torch.Generator().manual_seed(1))[:tokens]
    slots[0] = -1
    hidden, runs = randn(tokens, 48).to(dtype), [(length, 1) for length in lengths]
    made = []
    for run in (native_encoder.Encoder(layers, dtype), partial(one_by_one, layers=layers)):
        own_pages = tuple((key.clone(), value.clone()) for key, value in pages)
        kept = Kept(own_pages, slots, past)
        out = run(hidden, runs=runs, angles=angles_for(tokens)[:1], kept=kept)
        made.append((out, *chain.from_iterable(own_pages)))
    assert all(map(torch.equal, *made))
    assert not torch.equal(made[0][1], pages[0][0])


def test_pages_that_do_not_fit_are_refused() -> None:
    layers = [today(torch.float32, [Panels], norms={"before"}, activation="silu")]
    encoder, hidden, slots = native_encoder.Encoder(layers, torch.float32), randn(5, 48), torch.arange(5)
    page = torch.zeros(2, 8, 2, 32)
    past = Past(0, 5, torch.tensor([[0]]), torch.tensor([0, 5]), torch.tensor([5]), None)
    for kept, why in (
        (Kept((), slots, None), "pages of 0"),
        (Kept(((page, page),), slots[:4], None), "slots"),
        (Kept(((page, page[:1]),), slots, None), "are not kept"),
        (Kept(((page.double(), page.double()),), slots, None), "are not kept"),
        (Kept(((page, page),), slots, past), "looks ahead"),
    ):
        with pytest.raises(ValueError, match=why):
            encoder(hidden, [(5, 1)], kept=kept)


@pytest.mark.parametrize("start", [-2, 2])
def test_tokens_between_those_with_a_past_and_those_without_are_refused(start: int) -> None:
    layers = [today(torch.float32, [Panels], norms={"before"}, activation="silu", causal=True)]
    own, page = 5 - start, torch.zeros(2, 8, 2, 32)
    past = Past(start, own, torch.tensor([[0]]), torch.tensor([0, own]), torch.tensor([own]), None)
    with pytest.raises(ValueError, match=f"0 tokens have no past, and others begin with {start}"):
        native_encoder.Encoder(layers, torch.float32)(
            randn(5, 48), [(5, 1)], kept=Kept(((page, page),), torch.arange(5), past)
        )


def test_angles_that_do_not_fit_are_refused() -> None:
    layers = [
        today(torch.float32, [Panels], norms=set(), activation="silu", angles=1, size=size)
        for size in (32, 64)
    ]
    encoder, hidden, (sound, _) = native_encoder.Encoder(layers, torch.float32), randn(5, 48), angles_for(5)
    for tables in (
        [sound],
        [sound, (sound[0][:4], sound[1])],
        [sound, (sound[0], sound[1].double())],
        [sound, (sound[0][:, ::2], sound[1][:, ::2])],
        [sound, (torch.cat(sound, 1), torch.cat(sound, 1))],
        [sound, (sound[0].T.contiguous().T, sound[1])],
    ):
        with pytest.raises(ValueError, match="angles"):
            encoder(hidden, [(5, 1)], angles=tables)


@given(
    runs=runs_of,
    norms=norms_of,
    gate_first=st.sampled_from([True, False, None]),
    added=st.booleans(),
    centred=st.booleans(),
    turned=st.sampled_from([None, 0]),
    attention=attention_of,
)
@few
def test_a_layer_of_today_computes_what_its_twin_does(
    runs: list[tuple[int, int]], turned: int | None, attention: dict[str, Any], **kind: Any
) -> None:
    layers = [
        today(torch.float32, [Panels], activation="silu", angles=turned, seed=seed, **kind, **attention)
        for seed in range(2)
    ]
    tokens = sum(length * count for length, count in runs)
    hidden, tables = randn(tokens, 48), angles_for(tokens)
    mine = native_encoder.Encoder(layers, torch.float32)(hidden, runs, angles=tables)
    twins = twins_cpu.encoder(hidden, layers, runs, tables)
    assert (mine - twins).norm() <= 1e-4 * twins.norm()


@given(runs=runs_of, kind=st.sampled_from(KINDS), biased=st.booleans())
@few
def test_it_computes_what_its_twin_does(runs: list[tuple[int, int]], kind: Any, biased: bool) -> None:
    layers = [layer(32, 64, torch.float32, [kind], seed=i, biased=biased) for i in range(2)]
    hidden, bias = randn(sum(length * count for length, count in runs), 32), bias_for(layers, runs)
    mine = native_encoder.Encoder(layers, torch.float32)(hidden, runs, bias=bias)
    # Where a number lies between two levels of 8 bits, the last bit of a sum decides.
    bound = 2e-5 if kind is Panels else 2e-2
    twins = twins_cpu.encoder(hidden, layers, runs, bias=bias)
    assert (mine - twins).norm() <= bound * twins.norm()


@pytest.mark.parametrize(
    "bias",
    [None, torch.zeros(2, 9).double(), torch.zeros(2, 18)[:, ::2], torch.zeros(2, 7), torch.zeros(3, 9)],
)
def test_a_bias_that_does_not_fit_is_refused(bias: Tensor | None) -> None:
    layers = [layer(32, 64, torch.float32, [Panels], biased=biased) for biased in (False, True)]
    with pytest.raises(ValueError, match="bias"):
        native_encoder.Encoder(layers, torch.float32)(randn(5, 32), [(5, 1)], bias=bias)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_window_that_no_text_fills_is_none(dtype: torch.dtype) -> None:
    """Also where a token's place and the window are more than the kernels' integers hold."""
    hidden, runs = randn(40, 32).to(dtype), [(40, 1)]
    plain, wide = (
        native_encoder.Encoder([layer(32, 64, dtype, [Panels], window=window)], dtype)
        for window in (None, 2**31 - 1)
    )
    assert torch.equal(wide(hidden, runs), plain(hidden, runs))


def test_a_copy_goes_on_with_the_same_weights() -> None:
    encoder = native_encoder.Encoder([layer(32, 64, torch.float32, [Panels])], torch.float32)
    assert copy.deepcopy(encoder) is encoder


@pytest.mark.parametrize(
    "change",
    [
        {"down": "out"},
        {"joint": "up"},
        {"heads": 3},
        {"heads": 4},  # of 8
        {"kv_heads": 1},
        {"gate_first": True},
        {"query": Norm(torch.ones(32), None, 1e-6, centred=False)},
        {"before": Norm(torch.ones(32).double(), None, 1e-6, centred=False)},
        {"between": Norm(torch.ones(64)[::2], None, 1e-6, centred=False)},
        {"angles": -1},
        {"attended": Norm(torch.ones(16), torch.ones(16), 1e-6, centred=True)},
        {"done": Norm(torch.ones(32), torch.ones(16), 1e-6, centred=False)},
    ],
    ids=str,
)
def test_a_layer_that_does_not_fit_is_refused(change: dict[str, Any]) -> None:
    sound = layer(32, 64, torch.float32, [Panels])
    changed = {name: getattr(sound, to) if isinstance(to, str) else to for name, to in change.items()}
    with pytest.raises(ValueError, match="natively"):
        native_encoder.Encoder([sound, replace(sound, **changed)], torch.float32)


def test_weights_of_another_dtype_are_refused() -> None:
    with pytest.raises(ValueError, match="natively"):
        native_encoder.Encoder([layer(32, 64, torch.float32, [Panels])], torch.bfloat16)


@pytest.mark.parametrize(
    "hidden", [randn(4, 32), randn(5, 48), randn(5, 64)[:, :32], randn(5, 32).double()], ids=lambda x: x.shape
)
def test_rows_that_do_not_fit_are_refused(hidden: Tensor) -> None:
    encoder = native_encoder.Encoder([layer(32, 64, torch.float32, [Panels])], torch.float32)
    with pytest.raises(ValueError, match="an encoder for"):
        encoder(hidden, [(5, 1)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate_first", [None, True])
@pytest.mark.parametrize("norms", [(), ("before", "between"), ("attended", "done")], ids="+".join)
@pytest.mark.parametrize("count", [1, 2])
def test_what_is_wanted_is_the_same_to_the_bit_and_all_else_shows_that_it_was_not(
    dtype: torch.dtype, gate_first: bool | None, norms: tuple[str, ...], count: int
) -> None:
    layers = [
        today(dtype, [Panels], norms=set(norms), activation="gelu", gate_first=gate_first, seed=seed)
        for seed in range(count)
    ]
    encoder, hidden, runs = native_encoder.Encoder(layers, dtype), randn(45, 48).to(dtype), [(9, 5)]
    before, whole = hidden.clone(), encoder(hidden, runs)
    for rows in ([0, 8, 44], [44, 3], [7], [], list(range(45))):
        wanted = torch.tensor(rows, dtype=torch.int64)
        few = encoder(hidden, runs, wanted=wanted)
        assert torch.equal(few[wanted], whole[wanted])
        assert few.isnan().all(1).sum() == 45 - len(rows)
    assert torch.equal(hidden, before)


@pytest.mark.parametrize(
    "wanted", [torch.tensor([5]), torch.tensor([-1]), torch.tensor([1] * 6), torch.tensor([1.0])], ids=str
)
def test_tokens_that_are_not_there_are_refused(wanted: Tensor) -> None:
    encoder = native_encoder.Encoder([layer(32, 64, torch.float32, [Panels])], torch.float32)
    with pytest.raises(ValueError, match=r"tokens|wanted"):
        encoder(randn(5, 32), [(5, 1)], wanted=wanted)
