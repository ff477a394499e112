"""A model that is embeddings and an Encoder runs as just these: the same to the bit, and nothing else is cut short."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from building import backbone, built
from carpool.engine.models.backbone import Backbone
from carpool.engine.models.surgery.shortcut import Shortcut, shorten
from carpool.engine.packing import PackedBatch, pack_ids
from carpool.kernels import native

pytestmark = pytest.mark.skipif(native.level < 1, reason="no native kernels, and no encoder of theirs")
BATCH = pack_ids([[5, 6, 7], [8], list(range(10, 40))], torch.device("cpu"))


def hidden(one: Backbone, batch: PackedBatch = BATCH) -> Tensor:
    with torch.inference_mode():
        return one.forward(batch)


@pytest.fixture
def whole(broad: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Backbone]:
    """A served model with an Encoder and its own forward pass."""

    def made(family: str) -> Backbone:
        with monkeypatch.context() as patch:
            patch.setattr("carpool.engine.build.shorten", lambda *_, **__: 0)
            parts = built(broad(family))
        assert parts.model.surgery["encoder"] == 1
        return backbone(parts)

    return made


@pytest.mark.parametrize("family", ["bert", "xlmr"])
def test_it_is_the_same_to_the_bit(family: str, whole: Callable[[str], Backbone]) -> None:
    model = whole(family)
    batches = [
        BATCH,
        replace(BATCH, token_type_ids=torch.arange(len(BATCH.input_ids)) % 2 * (family == "bert")),
    ]
    before = [hidden(model, batch) for batch in batches]
    assert shorten(model, vocab_size=60) == 1
    for one in (model, model.replica(), model.replica().replica()):
        assert isinstance(vars(one.module)["forward"], Shortcut)
        assert all(torch.equal(hidden(one, batch), b) for batch, b in zip(batches, before, strict=True))


def test_a_copy_runs_over_its_own_modules(whole: Callable[[str], Backbone]) -> None:
    model = whole("bert")
    shorten(model, vocab_size=60)
    copy, before = model.replica(), hidden(model)
    table = copy.module.get_submodule("embeddings.word_embeddings")
    table.weight = nn.Parameter(torch.zeros_like(table.weight))  # type: ignore[arg-type]
    assert torch.equal(hidden(model), before)
    assert not torch.equal(hidden(copy), before)


@pytest.mark.parametrize("where", ["", "embeddings", "encoder.layer.0"])
def test_a_model_that_does_more_keeps_its_own_way(where: str, whole: Callable[[str], Backbone]) -> None:
    model = whole("bert")

    def more(_module: nn.Module, _args: object, out: object) -> object:
        return out + 1 if isinstance(out, Tensor) else type(out)(last_hidden_state=out.last_hidden_state + 1)  # type: ignore[attr-defined,call-arg]

    if where == "embeddings":  # between the embeddings and the layers
        forward = model.module.get_submodule("encoder").forward
        vars(model.module.get_submodule("encoder"))["forward"] = lambda h, *args, **kwargs: forward(
            h + 1, *args, **kwargs
        )
    elif where:  # behind the layers
        forward = model.module.get_submodule("encoder").forward
        vars(model.module.get_submodule("encoder"))["forward"] = lambda *args, **kwargs: more(
            model.module, (), forward(*args, **kwargs)
        )
    else:  # of its inputs
        forward = model.module.forward
        vars(model.module)["forward"] = lambda input_ids, **kwargs: forward(input_ids=input_ids + 1, **kwargs)
    before = hidden(model)
    assert shorten(model, vocab_size=50) == 0
    assert not isinstance(vars(model.module).get("forward"), Shortcut)
    assert torch.equal(hidden(model), before)
