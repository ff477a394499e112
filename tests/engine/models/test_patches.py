"""Patches: replicas run on their own state and in threads at once, and a patch can be taken back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import tiny
from carpool.engine.build import build
from carpool.engine.config import EngineConfig
from carpool.engine.models.attention import NAME
from carpool.engine.models.backbone import Backbone
from carpool.engine.models.padded import PaddedBackbone
from carpool.engine.models.patches import PATCHES, patch, unpatch
from carpool.engine.models.patches.disentangled import Positions
from carpool.engine.models.patches.layer import PackedLayer
from carpool.engine.models.probe import Probe
from carpool.engine.packing import pack_ids

CPU = torch.device("cpu")
VOCAB = 60
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 600,
    "pad_token_id": 0,
}
DEBERTA: dict[str, Any] = {
    **SIZES,
    "type_vocab_size": 0,
    "relative_attention": True,
    "position_biased_input": False,
    "pos_att_type": ["p2c", "c2p"],
}
V3: dict[str, Any] = {**DEBERTA, "position_buckets": 16, "norm_rel_ebd": "layer_norm", "share_att_key": True}
T5: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
}
MOBILE: dict[str, Any] = {"embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16,
                          "normalization_type": "layer_norm"}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mpnet": ("MPNetModel", {**SIZES, "pad_token_id": 1}),
    "deberta-v3": ("DebertaV2Model", V3),
    "deberta-v2 xlarge": ("DebertaV2Model", {**V3, "conv_kernel_size": 3, "conv_act": "gelu"}),
    "deberta-v2, own projections": ("DebertaV2Model", {**DEBERTA, "max_relative_positions": 24}),
    "deberta-v2, contents to positions only": ("DebertaV2Model", {**V3, "pos_att_type": ["c2p"]}),
    "deberta-v2, positions to contents only": ("DebertaV2Model", {**V3, "pos_att_type": ["p2c"]}),
    "deberta-v2, no positions": ("DebertaV2Model", {**DEBERTA, "relative_attention": False}),
    "deberta": ("DebertaModel", {**DEBERTA, "max_relative_positions": 24}),
    "rembert": ("RemBertModel", {**SIZES, "input_embedding_size": 24}),
    "rembert, a decoder": ("RemBertModel", {**SIZES, "input_embedding_size": 24, "is_decoder": True}),
    "roformer": ("RoFormerModel", {**SIZES, "embedding_size": 24}),
    "roformer, values too": ("RoFormerModel", {**SIZES, "embedding_size": 32, "rotary_value": True}),
    "mobilebert": ("MobileBertModel", {**SIZES, **MOBILE}),
    "mobilebert without trigrams": ("MobileBertModel", {**SIZES, **MOBILE, "trigram_input": False}),
    "lfm2": ("Lfm2Model", {**SIZES, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]}),
    "lfm2 with biases": (
        "Lfm2Model",
        {**SIZES, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"], "conv_bias": True,
         "conv_L_cache": 5},
    ),
    "lfm2 of experts": (
        "Lfm2MoeModel",
        {**SIZES, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"], "moe_intermediate_size": 32,
         "num_experts": 4, "num_experts_per_tok": 2, "num_dense_layers": 1},
    ),
    "t5": ("T5EncoderModel", T5),
    "mt5": ("MT5EncoderModel", T5),
    "umt5": ("UMT5EncoderModel", T5),
    "clip": ("CLIPTextModel", {**SIZES, "bos_token_id": 1, "eos_token_id": 2}),
    "siglip": ("SiglipTextModel", {**SIZES, "bos_token_id": 1, "eos_token_id": 2}),
}  # fmt: skip
# Their patches are for other lengths or other settings of theirs: as they are here, they would do without.
HARMLESS = {"clip", "siglip", "mobilebert without trigrams"}


def made(name: str, attention: str = NAME) -> nn.Module:
    """The model as the loader makes it, patched unless its attention is stock."""
    kind, config = MODELS[name]
    model_class = getattr(transformers, kind)
    torch.manual_seed(0)
    model: nn.Module = model_class(model_class.config_class(**config)).eval().requires_grad_(False)
    tiny.inflate(model)
    attends(model, attention)
    if attention == NAME:
        assert patch(model)
    return model


def attends(model: nn.Module, attention: str) -> None:
    """As the loader has it: UMT5's encoder has a configuration of its own."""
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if config is not None:
            config._attn_implementation = attention


def sequences(lengths: list[int], seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(5, VOCAB, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def stock(model: Any, batch: list[list[int]]) -> list[Tensor]:
    rows = [torch.tensor([ids]) for ids in batch]
    return [model(input_ids=row, attention_mask=torch.ones_like(row)).last_hidden_state[0] for row in rows]


@torch.inference_mode()
def packed(backbone: Backbone, batch: list[list[int]]) -> list[Tensor]:
    return list(torch.split(backbone.forward(pack_ids(batch, CPU)), [len(ids) for ids in batch]))


def check(ours: list[Tensor], truths: list[Tensor]) -> None:
    for own, truth in zip(ours, truths, strict=True):
        assert (own - truth).abs().max() <= 2e-5 * truth.abs().max().clamp_min(1)


def test_every_patch_is_tried_here() -> None:
    assert {kind for kind, _ in MODELS.values()} == set(PATCHES)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("lengths", [[1], [2], [7, 1, 23, 23, 64, 2, 40], [64, 3], [3, 64], [5, 5, 5]])
def test_a_patched_model_equals_transformers(name: str, lengths: list[int]) -> None:
    batch = sequences(lengths)
    check(packed(Backbone(made(name)), batch), stock(made(name, "eager"), batch))


@pytest.mark.parametrize("name", MODELS)
def test_beyond_512_tokens_it_still_does(name: str) -> None:
    """Where distances have run out of buckets, and scores come in blocks."""
    batch = sequences([9, 560, 520])
    check(packed(Backbone(made(name)), batch), stock(made(name, "eager"), batch))


@pytest.mark.parametrize("name", MODELS)
def test_the_probe_finds_nothing(name: str) -> None:
    assert Probe(vocab_size=VOCAB, max_model_len=600).fault(Backbone(made(name))) is None


@pytest.mark.parametrize("name", sorted(MODELS.keys() - HARMLESS))
def test_without_its_patch_the_probe_refuses_it(name: str) -> None:
    model = made(name)
    unpatch(model)
    assert Probe(vocab_size=VOCAB, max_model_len=600).fault(Backbone(model)) is not None


@pytest.mark.parametrize("name", MODELS)
def test_a_patch_that_is_taken_back_leaves_the_stock_model(name: str) -> None:
    model, own = made(name), made(name, "eager")
    unpatch(model)
    assert not any(isinstance(module, PackedLayer) for module in model.modules())
    assert [type(module) for module in model.modules()] == [type(module) for module in own.modules()]
    batch = sequences([7, 1, 23])
    padded = PaddedBackbone(model, attention="eager", pads=False)
    check(packed(padded, batch), stock(own, batch))


@pytest.mark.parametrize("name", MODELS)
def test_a_patch_adds_no_weight_and_moves_none(name: str) -> None:
    ours, own = made(name), made(name, "eager")
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in own.named_parameters()]
    assert [n for n, _ in ours.named_buffers()] == [n for n, _ in own.named_buffers()]


@pytest.mark.parametrize("name", MODELS)
def test_a_replica_is_not_the_original(name: str) -> None:
    """A copy whose forward is bound to the original would go on with the original's weights."""
    original = Backbone(made(name))
    replica = original.replica()
    batch = sequences([7, 1, 23])
    before = packed(original, batch)
    check(packed(replica, batch), before)
    for module in replica.module.modules():  # its own from here on, and others
        for key, weight in list(module._parameters.items()):
            if weight is not None:
                module._parameters[key] = nn.Parameter(weight + 1, requires_grad=False)
    for own, same, changed in zip(packed(original, batch), before, packed(replica, batch), strict=True):
        assert torch.equal(own, same)
        assert not torch.allclose(changed, same)


@pytest.mark.parametrize("name", MODELS)
def test_replicas_in_threads_of_their_own_do_not_see_each_other(name: str) -> None:
    one = Backbone(made(name))
    two = one.replica()
    short, long = sequences([3, 3, 9]), sequences([40, 1, 17], seed=2)
    alone = packed(one, short), packed(two, long)

    def work(backbone: Backbone, batch: list[list[int]]) -> list[list[Tensor]]:
        return [packed(backbone, batch) for _ in range(20)]

    with ThreadPoolExecutor(2) as pool:
        many = list(pool.map(work, (one, two), (short, long)))
    for answers, truth in zip(many, alone, strict=True):
        for answer in answers:
            assert all(torch.equal(a, b) for a, b in zip(answer, truth, strict=True))


@pytest.mark.parametrize("name", ["deberta-v3", "deberta"])
def test_replicas_share_what_is_made_of_weights_alone(name: str) -> None:
    model = made(name)
    tables = [module.positions for module in model.modules() if hasattr(module, "positions")]
    copies = [module.positions for module in copy.deepcopy(model).modules() if hasattr(module, "positions")]
    assert tables
    assert all(
        isinstance(table, Positions) and one is table for table, one in zip(tables, copies, strict=True)
    )


# Rounding sends a token to other experts.
@pytest.mark.parametrize("name", sorted(MODELS.keys() - {"lfm2 of experts"}))
def test_in_bfloat16_it_is_as_exact_as_transformers(name: str) -> None:
    batch = sequences([7, 1, 23, 23])
    exact = torch.cat(stock(made(name, "eager"), batch))
    theirs = torch.cat(stock(made(name, "eager").to(torch.bfloat16), batch)).float()
    model = made(name, "eager").to(torch.bfloat16)
    attends(model, NAME)
    patch(model)
    ours = torch.cat(packed(Backbone(model), batch)).float()
    assert (ours - exact).norm() <= 1.5 * (theirs - exact).norm()


def test_mixed_heads_are_left_to_the_stock_code() -> None:
    """DeBERTa v1 can be told to mix the heads' scores; no patch knows how, and the probe must see that."""
    config = transformers.DebertaConfig(**DEBERTA, talking_head=True)
    model = transformers.DebertaModel(config).eval()
    tiny.inflate(model)
    attends(model, NAME)
    patch(model)
    assert Probe(vocab_size=VOCAB, max_model_len=64).fault(Backbone(model)) is not None


def test_patched_models_are_served_without_a_notice(checkpoint: Callable[[str], Path]) -> None:
    model = build(EngineConfig(model=str(checkpoint("mpnet")), cpu_workers=1)).model
    assert model.packing == "packed"
    assert not [notice for notice in model.notices if "MPNet" in notice]
