"""The function behind transformers' attention registry: what it takes, and what it will not let pass."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from carpool.engine.build import Parts
from carpool.engine.cache.storage import KeptLayer, Storage
from carpool.engine.models.attention import (
    NAME,
    NUMBER,
    UnknownAttentionArgument,
    calls,
    layout,
    packed_attention,
    under_way,
    witnessed,
)
from carpool.engine.models.probe import Probe
from carpool.engine.packing import Keeping, PackedBatch, pack_ids
from carpool.kernels.reference import varlen_attention

RUNS = ((3, 1), (5, 1))


def row(*lengths: int) -> PackedBatch:
    return pack_ids([[7] * length for length in lengths], torch.device("cpu"))


def qkv() -> tuple[Tensor, Tensor, Tensor]:
    """[1, N, T, D] each, two query heads to a key head."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, 8, 8, generator=generator)
    return query, torch.randn(1, 2, 8, 8, generator=generator), torch.randn(1, 2, 8, 8, generator=generator)


class Layer(nn.Module):
    def __init__(self, is_causal: bool | None = None) -> None:
        super().__init__()
        if is_causal is not None:
            self.is_causal = is_causal


def attend(module: nn.Module | None = None, **options: Any) -> Tensor:
    with layout(row(3, 5)):
        out, weights = packed_attention(module or Layer(False), *qkv(), None, **options)
    assert weights is None
    return out


def expected(**options: Any) -> Tensor:
    query, key, value = (x[0].transpose(0, 1) for x in qkv())
    return varlen_attention(query, key, value, RUNS, **{"scale": 8**-0.5, **options})[None]


@pytest.mark.parametrize(
    ("given", "means"),
    [
        ({}, {}),
        ({"scaling": 0.7}, {"scale": 0.7}),
        ({"sliding_window": 2}, {"window": 2}),
        ({"softcap": 1.5}, {"softcap": 1.5}),
        ({"is_causal": True}, {"causal": True}),
        ({"dropout": 0.0, "position_ids": torch.zeros(1), "use_cache": False, "head_mask": None}, {}),
        ({"s_aux": None, "position_bias": None}, {}),
        ({"s_aux": torch.arange(4.0)}, {"sinks": torch.arange(4.0)}),
        ({"position_bias": torch.ones(4, 9).cumsum(1)}, {"bias": torch.ones(4, 9).cumsum(1)}),
    ],
)
def test_every_argument_that_carries_meaning_is_passed_on(
    given: dict[str, Any], means: dict[str, Any]
) -> None:
    torch.testing.assert_close(attend(**given), expected(**means))


@pytest.mark.parametrize(
    ("layers", "argument", "causal"),
    [(True, None, True), (False, None, False), (None, None, True), (True, False, False), (False, True, True)],
)
def test_an_argument_decides_on_causality_then_the_layer(
    layers: bool | None, argument: bool | None, causal: bool
) -> None:
    torch.testing.assert_close(attend(Layer(layers), is_causal=argument), expected(causal=causal))


@pytest.mark.parametrize("name", ["block_mask", "head_mask", "alibi", "something_new"])
def test_an_argument_that_is_not_known_raises(name: str) -> None:
    with pytest.raises(UnknownAttentionArgument, match=f"Layer passes {name}"):
        attend(None, **{name: torch.ones(1)})


def test_a_bias_over_the_whole_row_raises() -> None:
    """It comes of a layer that knows nothing of packing: one by distance is [N, 2M - 1]."""
    with pytest.raises(UnknownAttentionArgument, match="Layer passes position_bias"):
        attend(None, position_bias=torch.ones(1, 4, 8, 8))


def test_a_mask_raises() -> None:
    with layout(row(3, 5)), pytest.raises(UnknownAttentionArgument, match="attention_mask"):
        packed_attention(Layer(), *qkv(), torch.zeros(1, 1, 8, 8))


def test_without_a_layout_nothing_is_computed() -> None:
    with pytest.raises(RuntimeError, match="layout"):
        packed_attention(Layer(), *qkv(), None)


def test_a_layout_ends_with_its_block_also_when_that_raises() -> None:
    with pytest.raises(ZeroDivisionError), layout(row(3, 5)):
        _ = 1 / 0
    test_without_a_layout_nothing_is_computed()


def test_a_layout_knows_where_every_token_stands() -> None:
    with layout(row(2, 2, 3)):
        current = under_way()
    assert (current.runs, current.longest) == (((2, 2), (3, 1)), 3)
    assert current.cu_seqlens.tolist() == [0, 2, 4, 7]
    assert current.positions.tolist() == [0, 1, 0, 1, 0, 1, 2]
    assert current.distances(torch.device("cpu")).tolist() == [-2, -1, 0, 1, 2]
    pairs, single = current.split(torch.arange(7)[:, None])
    assert pairs[..., 0].tolist() == [[0, 1], [2, 3]]
    assert single[..., 0].tolist() == [[4, 5, 6]]


def test_witnesses_see_the_layers_that_attend_and_only_within_their_block() -> None:
    one, two = Layer(False), Layer(False)
    attend(one)
    with witnessed() as seen:
        attend(two)
        attend(one)
    attend(two)
    assert seen == [two, one]


def test_each_thread_has_its_own_layout() -> None:
    meet = Barrier(2, timeout=10)

    def work(length: int) -> Tensor:
        with layout(row(*[length] * (8 // length))):
            meet.wait()  # both are inside now
            out, _ = packed_attention(Layer(False), *qkv(), None)
            meet.wait()
        return out

    with ThreadPoolExecutor(2) as pool:
        whole, quarters = pool.map(work, (8, 2))
    query, key, value = (x[0].transpose(0, 1) for x in qkv())
    torch.testing.assert_close(whole[0], varlen_attention(query, key, value, [(8, 1)], scale=8**-0.5))
    torch.testing.assert_close(quarters[0], varlen_attention(query, key, value, [(2, 4)], scale=8**-0.5))


def test_its_name_means_nothing_else_to_transformers() -> None:
    assert "flash" not in NAME
    assert "/" not in NAME


def test_a_model_that_starts_to_pass_something_new_is_not_packed(parts: Callable[[str], Parts]) -> None:
    """Planted: an argument that the model's own code hands down to its attention."""
    backbone = parts("qwen3").runners[0]._backbone.replica()
    backbone._extra["block_mask"] = torch.zeros(4)
    with pytest.raises(UnknownAttentionArgument, match="block_mask"):
        backbone.forward(pack_ids([[1, 2]], torch.device("cpu")))
    fault = Probe(vocab_size=100, max_model_len=64).fault(backbone)
    assert fault == "Qwen3Attention passes block_mask to its attention, which carpool does not compute"


# ── what is kept ─────────────────────────────────────────────────────────────────────────────────────────────

CPU = torch.device("cpu")


def numbered(number: int = 0, is_causal: bool = True) -> Layer:
    layer = Layer(is_causal)
    setattr(layer, NUMBER, number)
    return layer


def store(layers: int = 1) -> Storage:
    storage = Storage.of([KeptLayer(2, 8, torch.float32)] * layers, 6, 2, CPU)
    for keys, values in storage.layers:
        keys.fill_(torch.nan), values.fill_(torch.nan)
    return storage


def parts(storage: Storage, layer: nn.Module, **options: Any) -> Tensor:
    """Of 8 tokens: a prompt of 3 of which nothing is kept beside 2 of a prompt, of which then come 3 more."""
    blocks = [4, 1, 5]
    rows = []
    for tokens, past in (((0, 1, 2, 3, 4), 0), ((5, 6, 7), 2)):
        ids = [[7] * 3, [7] * 2] if not past else [[7] * 3]
        keeping = Keeping(storage, [None, blocks] if not past else [blocks], [0, 0] if not past else [past])
        with layout(pack_ids(ids, CPU, keeping=keeping)):
            query, key, value = (x[:, :, list(tokens)] for x in qkv())
            rows.append(packed_attention(layer, query, key, value, None, **options)[0])
    return torch.cat(rows, 1)


@pytest.mark.parametrize(
    ("given", "means"),
    [
        ({}, {}),
        ({"scaling": 0.7}, {"scale": 0.7}),
        ({"sliding_window": 2}, {"window": 2}),
        ({"softcap": 1.5}, {"softcap": 1.5}),
        ({"s_aux": torch.arange(4.0)}, {"sinks": torch.arange(4.0)}),
    ],
)
def test_a_part_looks_back_at_what_is_kept_as_the_whole_would(
    given: dict[str, Any], means: dict[str, Any]
) -> None:
    torch.testing.assert_close(parts(store(), numbered(), **given), expected(causal=True, **means))


def test_each_layer_keeps_its_own() -> None:
    storage = store(2)
    parts(storage, numbered(1))
    assert storage.layers[0][0].isnan().all()
    keys, values = storage.layers[1]
    held = [4 * 2, 4 * 2 + 1, 1 * 2, 1 * 2 + 1, 5 * 2]
    _, key, value = (x[0].transpose(0, 1) for x in qkv())
    assert torch.equal(keys.flatten(0, 1)[held], key[3:])
    assert torch.equal(values.flatten(0, 1)[held], value[3:])
    assert int(keys.isnan().any((2, 3)).sum()) == 12 - 5


def test_a_layer_that_has_no_pages_is_not_run() -> None:
    with pytest.raises(RuntimeError, match="has no pages"):
        parts(store(), Layer(True))


@pytest.mark.parametrize("options", [{"is_causal": False}, {"position_bias": torch.ones(4, 9)}])
def test_what_cannot_look_back_at_what_is_kept_raises(options: dict[str, Any]) -> None:
    with pytest.raises(UnknownAttentionArgument, match="cannot look back"):
        parts(store(), numbered(), **options)


def test_what_layers_ask_for_is_told_to_those_who_ask_and_only_within_their_block() -> None:
    layer = numbered()
    with calls() as made:
        attend(layer, position_bias=torch.ones(4, 9))
        attend(layer, is_causal=False)
    attend(layer)
    assert [(call.layer, call.heads, call.size, call.dtype) for call in made] == [
        (layer, 2, 8, torch.float32)
    ] * 2
    assert [(call.causal, call.biased) for call in made] == [(True, True), (False, False)]
