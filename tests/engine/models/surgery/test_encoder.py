"""All layers of a BERT in one call: the same to the bit, and only where nobody asks what each layer does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from building import backbone, built
from carpool.engine.models.attention import witnessed
from carpool.engine.models.backbone import Backbone
from carpool.engine.models.surgery.encoder import Encoder, unite
from carpool.engine.models.surgery.encoder_layer import EncoderLayer
from carpool.engine.models.surgery.last_layer import narrow
from carpool.engine.packing import PackedBatch, pack_ids
from carpool.kernels import native, native_encoder, native_linear8

pytestmark = pytest.mark.skipif(native.level < 1, reason="no native kernels, and no encoder of theirs")
BATCH = pack_ids([[5, 6, 7], [8], list(range(10, 40))], torch.device("cpu"))


def hidden(one: Backbone, batch: PackedBatch = BATCH) -> Tensor:
    with torch.inference_mode():
        return one.forward(batch)


@pytest.fixture
def apart(broad: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Backbone:
    """A BERT whose layers are straight, and on their own."""
    with monkeypatch.context() as patch:
        patch.setattr("carpool.engine.build.unite", lambda *_, **__: 0)
        patch.setattr("carpool.engine.build.narrow", lambda *_, **__: 0)
        return backbone(built(broad("bert")))


def layers(one: Backbone) -> nn.ModuleList:
    found = one.module.get_submodule("encoder.layer")
    assert isinstance(found, nn.ModuleList)
    return found


def test_it_is_the_same_to_the_bit(apart: Backbone, ran: list[int]) -> None:
    before = hidden(apart)
    assert ran == []
    assert unite(apart, vocab_size=60) == 1
    assert [type(layer) for layer in layers(apart)] == [Encoder]
    ran.clear()
    assert torch.equal(hidden(apart), before)
    assert torch.equal(hidden(apart.replica()), before)
    assert ran == [2, 2]


@pytest.mark.parametrize(
    "config",
    [
        pytest.param({"dtype": "bfloat16"}, marks=pytest.mark.skipif(native.level < 3, reason="no bfloat16")),
        pytest.param(
            {"quantization": "int8"},
            marks=pytest.mark.skipif(not native_linear8.multiplies, reason="no integers"),
        ),
    ],
    ids=str,
)
def test_in_any_arithmetic(
    config: dict[str, str], broad: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = broad("xlmr")
    parts = built(folder, **config)
    assert parts.model.surgery["encoder"] == 1
    monkeypatch.setattr("carpool.engine.build.unite", lambda *_, **__: 0)
    assert torch.equal(hidden(backbone(parts)), hidden(backbone(built(folder, **config))))


def test_the_last_layer_computes_what_is_wanted_alone(broad: Callable[[str], Path], ran: list[int]) -> None:
    parts = built(broad("xlmr"))
    assert parts.model.surgery["last_layer"] == 3
    whole, wanted = hidden(backbone(parts)), torch.tensor([0, 3, 4])
    ran.clear()
    few = hidden(backbone(parts), replace(BATCH, wanted=wanted))
    assert ran == [2]
    assert torch.equal(few[wanted], whole[wanted])
    assert few[1].isnan().all()


def test_all_is_computed_where_the_last_layer_was_not_narrowed(apart: Backbone) -> None:
    """Something behind it may look at every row."""
    unite(apart, vocab_size=60)
    whole = hidden(apart)
    assert torch.equal(hidden(apart, replace(BATCH, wanted=torch.tensor([0, 3, 4]))), whole)
    assert narrow(apart, vocab_size=60) == 3
    assert hidden(apart, replace(BATCH, wanted=torch.tensor([0, 3, 4])))[1].isnan().all()


def test_tokens_that_are_not_looked_at_go_through_its_layers(apart: Backbone, ran: list[int]) -> None:
    unseen = replace(BATCH, unseen=(2, None, 20), seen=torch.tensor([2, 1, 20]))
    before, plain = hidden(apart, unseen), hidden(apart)
    unite(apart, vocab_size=60)
    ran.clear()
    assert torch.equal(hidden(apart, unseen), before)
    assert ran == []
    assert not torch.equal(before, plain)


def test_who_asks_what_layers_do_is_told_of_each(apart: Backbone, ran: list[int]) -> None:
    unite(apart, vocab_size=60)
    ran.clear()
    with witnessed() as seen:
        hidden(apart)
    assert [type(layer) for layer in seen] == [EncoderLayer, EncoderLayer]
    assert ran == []


def test_layers_that_are_not_all_alike_stay_apart(apart: Backbone) -> None:
    layers(apart)[1] = nn.Sequential(layers(apart)[1])
    assert unite(apart, vocab_size=60) == 0


def test_products_that_are_not_native_stay_apart(apart: Backbone) -> None:
    first = layers(apart)[0]
    assert isinstance(first, EncoderLayer)
    first.up = nn.Identity()
    assert unite(apart, vocab_size=60) == 0


def test_all_is_undone_where_the_model_wants_its_layers_one_by_one(apart: Backbone) -> None:
    apart.module.register_forward_pre_hook(
        lambda module, _args: module.get_submodule("encoder.layer.1") and None
    )
    before, own = hidden(apart), layers(apart)
    assert unite(apart, vocab_size=60) == 0
    assert layers(apart) is own
    assert torch.equal(hidden(apart), before)


def test_all_is_undone_where_results_change(apart: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    own = layers(apart)
    run = native_encoder.Encoder.__call__
    monkeypatch.setattr(
        native_encoder.Encoder, "__call__", lambda *given: run(*given).nextafter(torch.tensor(9.0))
    )
    assert unite(apart, vocab_size=60) == 0
    assert layers(apart) is own
