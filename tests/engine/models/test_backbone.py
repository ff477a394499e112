"""Backbone: replicas, positions, and what it says about the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import tiny
from carpool.engine.build import Parts
from carpool.engine.models.attention import witnessed
from carpool.engine.models.backbone import Backbone
from carpool.engine.packing import pack_ids
from oracle import Oracle

CPU = torch.device("cpu")


@pytest.fixture
def backbone(parts: Callable[[str], Parts]) -> Callable[[str], Backbone]:
    return lambda family: parts(family).runners[0]._backbone


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_replicas_share_weights_and_nothing_else(family: str, backbone: Callable[[str], Backbone]) -> None:
    one = backbone(family)
    two = one.replica()
    weights = list(zip(one.module.parameters(), two.module.parameters(), strict=True))
    assert weights
    assert all(a is b for a, b in weights)
    buffers = list(zip(one.module.buffers(), two.module.buffers(), strict=True))
    assert all(a.data_ptr() != b.data_ptr() for a, b in buffers)
    modules = list(zip(one.module.modules(), two.module.modules(), strict=True))
    assert all(a is not b for a, b in modules)
    configs: list[Any] = [one.module.config, two.module.config]
    assert configs[0] is not configs[1]
    assert configs[0].to_dict() == configs[1].to_dict()
    for (
        name,
        a,
    ) in one.module.named_modules():  # a layer that kept the first one's configuration would write to it
        b = two.module.get_submodule(name)
        if hasattr(a, "config"):
            assert b.config is two.module.config


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_replica_computes_the_same(family: str, backbone: Callable[[str], Backbone]) -> None:
    batch = pack_ids([[5, 6, 7], [8], [9, 10]], CPU)
    one = backbone(family)
    with torch.inference_mode():
        assert torch.equal(one.replica().forward(batch), one.forward(batch))


@pytest.mark.parametrize("family", ["xlmr", "roberta"])
@pytest.mark.parametrize("ids", [[0, 5, 1, 6, 2], [1, 0, 5, 2], [0, 5, 2, 1, 1], [1, 1, 1], [1]])
def test_positions_skip_the_pad_token_wherever_it_stands(
    family: str, ids: list[int], backbone: Callable[[str], Backbone], checkpoint: Callable[[str], Path]
) -> None:
    company = [[0, 9, 2], ids, [0, 1, 8, 2]]
    with torch.inference_mode():
        packed = backbone(family).forward(pack_ids(company, CPU))[3 : 3 + len(ids)]
    alone = Oracle(checkpoint(family)).hidden(ids)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "positions", "causal"),
    [("bert", 128, False), ("xlmr", 128, False), ("roberta", 128, False), ("qwen3", None, True),
     ("mistral", None, True), ("gemma2", None, True), ("modernbert", None, False)],
)  # fmt: skip
def test_what_a_model_is_is_read_off_its_modules(
    family: str, positions: int | None, causal: bool, backbone: Callable[[str], Backbone]
) -> None:
    assert backbone(family).max_positions == positions
    assert backbone(family).is_causal is causal


@pytest.mark.parametrize(
    ("kind", "told"),
    [("Gemma3TextModel", {"use_bidirectional_attention": True}), ("Qwen2Model", {"is_causal": False})],
)
def test_a_decoder_that_was_told_to_look_both_ways_is_one_still(kind: str, told: dict[str, bool]) -> None:
    """Its class's pooling is the last token's, as the reference has it."""
    model_class = getattr(transformers, kind)
    with torch.device("meta"):
        model = model_class(model_class.config_class(num_hidden_layers=1, **told))
    assert Backbone(model).is_causal


@pytest.mark.parametrize("width", [16, 32])
def test_opts_width_is_what_its_last_projection_gives(width: int) -> None:
    config = transformers.OPTConfig(
        vocab_size=60, hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=width,
    )  # fmt: skip
    model = transformers.OPTModel(config).eval()
    assert model(torch.tensor([[5, 6]])).last_hidden_state.shape[-1] == Backbone(model).hidden_size == width


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_layers_attention_is_ours(family: str, backbone: Callable[[str], Backbone]) -> None:
    """A layer that computes its own would see the whole row."""
    batch = pack_ids([[5, 6]], CPU)
    one = backbone(family)
    with torch.inference_mode(), witnessed() as callers:
        one.forward(batch)
    config: Any = one.module.config
    assert len(callers) == config.num_hidden_layers


@pytest.mark.parametrize(
    ("kind", "causal"),
    [
        ("MambaModel", True),
        ("XLNetModel", True),
        ("MPNetModel", False),
        ("DebertaV2Model", False),
        ("RemBertModel", False),
    ],
)
def test_where_no_layer_says_what_it_sees_what_the_model_is_trained_for_tells(
    kind: str, causal: bool
) -> None:
    """A recurrent model has no attention to ask, and its last token is the one that has read everything."""
    model_class = getattr(transformers, kind)
    with torch.device("meta"):
        model = model_class(model_class.config_class(num_hidden_layers=1))
    assert not any(hasattr(module, "is_causal") for module in model.modules())
    assert Backbone(model).is_causal is causal
