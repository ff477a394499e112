"""Layers of BERT's kind in one straight line: the same results, and what is not quite such a layer is left alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from building import backbone, built
from carpool.engine.models.backbone import Backbone
from carpool.engine.models.surgery.encoder_layer import EncoderLayer, straighten
from carpool.engine.packing import pack_ids
from carpool.kernels import native

pytestmark = pytest.mark.skipif(native.level < 1, reason="no native kernels, and no layers of theirs")
BIAS = "encoder.relative_attention_bias.weight"
BATCH = pack_ids([[5, 6, 7], [8], list(range(10, 40))], torch.device("cpu"))


def hidden(one: Backbone) -> Tensor:
    with torch.inference_mode():
        return one.forward(BATCH)


@pytest.fixture
def crooked(checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Backbone:
    """A BERT with all swapped but its layers."""
    monkeypatch.setattr("carpool.engine.build.straighten", lambda *_, **__: 0)
    return backbone(built(checkpoint("bert")))


def layers(one: Backbone) -> nn.ModuleList:
    found = one.module.get_submodule("encoder.layer")
    assert isinstance(found, nn.ModuleList)
    return found


def test_it_is_the_same_to_the_bit(crooked: Backbone) -> None:
    before = hidden(crooked)
    assert straighten(crooked, vocab_size=60) == 2
    assert all(isinstance(layer, EncoderLayer) for layer in layers(crooked))
    assert torch.equal(hidden(crooked), before)


@pytest.mark.skipif(native.level < 3, reason="no AVX-512 BF16 here, or not built")
@pytest.mark.parametrize("config", [{"dtype": "bfloat16"}, {"quantization": "int8"}], ids=str)
def test_in_any_arithmetic(config: dict[str, str], checkpoint: Callable[[str], Path]) -> None:
    parts = built(checkpoint("xlmr"), **config)
    assert parts.model.surgery["encoder_layer"] == 2
    whole = hidden(backbone(built(checkpoint("xlmr"), surgery=False))).float()
    assert float((hidden(backbone(parts)).float() - whole).norm() / whole.norm()) < 0.05


@pytest.mark.skipif(native.level < 3, reason="no AVX-512 BF16 here, or not built")
@pytest.mark.parametrize("config", [{"dtype": "float32"}, {"dtype": "bfloat16"}], ids=str)
def test_a_bias_by_distance_is_that_of_the_batch(
    config: dict[str, str], broad: Callable[[str], Path], ran: list[int]
) -> None:
    """MPNet's, where a product and its LayerNorm stand in different modules."""
    folder = broad("mpnet")
    weights = load_file(folder / "model.safetensors")
    weights[BIAS] = 20 * weights[BIAS][:, :2].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    parts = built(folder, **config)
    assert parts.model.surgery["encoder_layer"] == 2
    whole = backbone(built(folder, surgery=False))
    for batch in (BATCH, pack_ids([[9, 8, 7, 6]], torch.device("cpu"))):
        ran.clear()
        with torch.inference_mode():
            mine, theirs = (one.forward(batch).float() for one in (backbone(parts), whole))
        assert ran == [2]
        assert float((mine - theirs).norm() / theirs.norm()) < (
            1e-5 if config["dtype"] == "float32" else 0.05
        )


def test_a_model_of_one_layer_is_not_taken_for_it(crooked: Backbone) -> None:
    del layers(crooked)[1]
    before = hidden(crooked)
    assert straighten(crooked, vocab_size=60) == 1
    assert torch.equal(hidden(crooked), before)


class Scaled(nn.Module):
    """A layer that computes something more."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = self.layer(*args, **kwargs) * self.scale
        return out


def test_what_lies_around_a_layer_stays(crooked: Backbone) -> None:
    layers(crooked)[0] = Scaled(layers(crooked)[0])
    before = hidden(crooked)
    assert straighten(crooked, vocab_size=60) == 2
    assert isinstance(layers(crooked)[0], Scaled)
    assert torch.equal(hidden(crooked), before)


def test_a_layer_with_a_weight_more_is_left_as_it_is(crooked: Backbone) -> None:
    layers(crooked)[0].register_buffer("table", torch.zeros(1))
    assert straighten(crooked, vocab_size=60) == 1
    assert not isinstance(layers(crooked)[0], EncoderLayer)


def test_a_layer_that_computes_something_else_is_left_as_it_is(crooked: Backbone) -> None:
    layer = layers(crooked)[1]
    layer.register_forward_hook(lambda _module, _args, out: out + 1)
    before = hidden(crooked)
    assert straighten(crooked, vocab_size=60) == 1
    assert torch.equal(hidden(crooked), before)


def test_all_is_undone_where_the_model_reaches_into_its_layers(crooked: Backbone) -> None:
    first = layers(crooked)[0]
    crooked.module.register_forward_pre_hook(
        lambda module, _args: module.get_submodule("encoder.layer.0.attention") and None
    )
    before = hidden(crooked)
    assert straighten(crooked, vocab_size=60) == 0
    assert layers(crooked)[0] is first
    assert torch.equal(hidden(crooked), before)
