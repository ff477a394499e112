"""Today's layers, straight and then all in one call: as exact as before, the same to the bit, and others left alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny_today
from building import backbone, built
from carpool.engine.cache.storage import Storage
from carpool.engine.config import PoolerConfig
from carpool.engine.models.attention import witnessed
from carpool.engine.models.backbone import Backbone
from carpool.engine.models.difference import apart as difference
from carpool.engine.models.paged import number_layers, pageable_layers
from carpool.engine.models.surgery.encoder import Encoder, unite
from carpool.engine.models.surgery.encoder_layer import straighten
from carpool.engine.models.surgery.gated_layer import GatedLayer
from carpool.engine.packing import Keeping, PackedBatch, pack_ids
from carpool.kernels import native, native_linear8

pytestmark = pytest.mark.skipif(native.level < 1, reason="no native kernels, and no layers of theirs")
CPU = torch.device("cpu")
BATCH = pack_ids([[5, 6, 7], [8], list(range(10, 50))], CPU)
CAUSAL = [name for name in tiny_today.STRAIGHT if name not in ("modernbert", "nomic")]
Made = Callable[..., Backbone]


def hidden(one: Backbone, batch: PackedBatch = BATCH) -> Tensor:
    with torch.inference_mode():
        return one.forward(batch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder_of(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            tiny_today.make(name, made[name])
        return made[name]

    return folder_of


@pytest.fixture
def crooked(folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Made:
    """A model with all swapped but its layers."""

    def made(name: str, **config: Any) -> Backbone:
        with monkeypatch.context() as patch:
            patch.setattr("carpool.engine.build.straighten", lambda *_, **__: 0)
            return backbone(built(folder(name), **config))

    return made


@pytest.fixture
def apart(folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Made:
    """A model whose layers are straight, and on their own."""

    def made(name: str, **config: Any) -> Backbone:
        with monkeypatch.context() as patch:
            patch.setattr("carpool.engine.build.unite", lambda *_, **__: 0)
            return backbone(built(folder(name), **config))

    return made


def layers(one: Backbone) -> nn.ModuleList:
    found = one.module.get_submodule("layers")
    assert isinstance(found, nn.ModuleList)
    return found


@pytest.mark.parametrize("name", tiny_today.STRAIGHT)
def test_it_is_as_it_was(name: str, crooked: Made) -> None:
    model = crooked(name)
    before, count = hidden(model), len(layers(model))
    assert straighten(model, vocab_size=60) == count
    assert all(isinstance(layer, GatedLayer) for layer in layers(model))
    assert difference(hidden(model), before) <= 1e-5
    assert model.is_causal == (name in CAUSAL)


@pytest.mark.skipif(native.level < 3, reason="no AVX-512 BF16 here, or not built")
@pytest.mark.parametrize("name", tiny_today.STRAIGHT)
def test_in_bfloat16_it_is_no_further_from_float32(name: str, crooked: Made) -> None:
    exact, model = hidden(crooked(name)), crooked(name, dtype="bfloat16")
    before = hidden(model)
    assert straighten(model, vocab_size=60) == len(layers(model))
    assert difference(hidden(model), exact) <= 1.1 * difference(before, exact)


@pytest.mark.parametrize("name", tiny_today.CROOKED)
def test_layers_that_do_something_else_are_left_alone(name: str, crooked: Made) -> None:
    model = crooked(name)
    before, own = hidden(model), list(layers(model))
    assert straighten(model, vocab_size=60) == 0
    assert list(layers(model)) == own
    assert torch.equal(hidden(model), before)


@pytest.mark.parametrize("name", tiny_today.STRAIGHT)
def test_all_in_one_call_are_the_same_to_the_bit(name: str, apart: Made, ran: list[int]) -> None:
    model = apart(name)
    before, count = hidden(model), len(layers(model))
    assert ran == []
    assert unite(model, vocab_size=60) == 1
    assert [type(layer) for layer in layers(model)][-1] is Encoder
    ran.clear()
    assert torch.equal(hidden(model), before)
    assert torch.equal(hidden(model.replica()), before)
    assert ran == [count, count]


ARITHMETIC = [
    pytest.param({"dtype": "bfloat16"}, marks=pytest.mark.skipif(native.level < 3, reason="no bfloat16")),
    pytest.param(
        {"quantization": "int8"},
        marks=pytest.mark.skipif(not native_linear8.multiplies, reason="no integers"),
    ),
]


@pytest.mark.parametrize("config", ARITHMETIC, ids=str)
@pytest.mark.parametrize("name", ["modernbert", "qwen3", "gemma3"])
def test_in_any_arithmetic(name: str, config: dict[str, str], apart: Made) -> None:
    model = apart(name, **config)
    before = hidden(model)
    assert unite(model, vocab_size=60) == 1
    assert torch.equal(hidden(model), before)


@pytest.mark.parametrize("config", [{}, *ARITHMETIC], ids=str)
@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_the_last_layer_computes_what_is_wanted_alone(
    name: str, config: dict[str, str], folder: Callable[[str], Path], apart: Made, ran: list[int]
) -> None:
    pooled = {"pooler_config": PoolerConfig(pooling_type="LAST"), **config}
    parts, wanted = built(folder(name), **pooled), torch.tensor([2, 3, 43])
    assert (parts.model.surgery["encoder"], parts.model.surgery["last_layer"]) == (1, 2)
    ran.clear()
    whole, few = (hidden(backbone(parts), replace(BATCH, wanted=rows)) for rows in (None, wanted))
    assert ran == [len(layers(apart(name)))] * 2
    assert torch.equal(few[wanted], whole[wanted])
    assert few[1].isnan().all()
    assert torch.equal(hidden(apart(name, **pooled), replace(BATCH, wanted=wanted))[wanted], whole[wanted])


@pytest.mark.parametrize("name", CAUSAL)
def test_what_is_kept_is_kept_and_read_in_the_same_call(name: str, apart: Made, ran: list[int]) -> None:
    """Prompts that begin like others, ones in parts and ones of which nothing is kept, in one row."""
    model, made = apart(name), []
    united = model.replica()
    assert unite(united, vocab_size=60) == 1
    pageable_layers(united, vocab_size=60, max_model_len=128, block_size=16, limits=[8])
    ran.clear()
    for one in (model, united):
        storage = Storage.of(number_layers(one), 8, 16, CPU)
        for pages in storage.layers:
            for page in pages:
                page.zero_()
        outs = []
        for ids, blocks, pasts in (
            ([[5, 6, 7], list(range(10, 40))], [None, [3, 1]], [0, 0]),
            (
                [[9, 8], [6] * 5, list(range(20, 43)), [4] * 7],
                [None, [0], [3, 1, 5, 2], [3, 4]],
                [0, 0, 30, 16],
            ),
            ([[7, 8, 9]], [[3, 6]], [16]),
        ):
            outs.append(hidden(one, pack_ids(ids, CPU, keeping=Keeping(storage, blocks, pasts))))
        made.append([*outs, *(page for pages in storage.layers for page in pages)])
    assert all(map(torch.equal, *made))
    assert ran == [len(layers(model))] * 3


def test_tokens_that_are_not_looked_at_go_through_its_layers(apart: Made, ran: list[int]) -> None:
    model = apart("modernbert")
    unseen = replace(BATCH, unseen=(2, None, 20), seen=torch.tensor([2, 1, 20]))
    before, plain = hidden(model, unseen), hidden(model)
    unite(model, vocab_size=60)
    ran.clear()
    assert torch.equal(hidden(model, unseen), before)
    assert ran == []
    assert not torch.equal(before, plain)


def test_who_asks_what_layers_do_is_told_of_each(apart: Made, ran: list[int]) -> None:
    model = apart("gemma3")
    unite(model, vocab_size=60)
    ran.clear()
    with witnessed() as seen:
        hidden(model)
    assert [type(layer) for layer in seen] == [GatedLayer] * 4
    assert ran == []


def test_an_adapter_keeps_a_layer_as_it_was(crooked: Made) -> None:
    model = crooked("qwen3")
    first = layers(model)[0]
    first.get_submodule("mlp").down = nn.Sequential(first.get_submodule("mlp.down"))
    assert straighten(model, vocab_size=60) == 2
    assert layers(model)[0] is first
    assert unite(model, vocab_size=60) == 0


def test_all_is_undone_where_a_model_needs_its_own_layers(crooked: Made) -> None:
    model = crooked("llama")
    model.module.register_forward_pre_hook(lambda module, _args: module.layers[1].mlp and None)
    before, own = hidden(model), list(layers(model))
    assert straighten(model, vocab_size=60) == 0
    assert list(layers(model)) == own
    assert torch.equal(hidden(model), before)
