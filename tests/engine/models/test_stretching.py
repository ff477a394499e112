"""Rotary frequencies that follow the longest prompt: a result depends on nothing but its prompt, in any order."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import tiny
from carpool.engine.models.attention import NAME
from carpool.engine.models.backbone import Backbone
from carpool.engine.models.padded import PaddedBackbone
from carpool.engine.models.stretching import StretchingBackbone, stretches_beyond
from carpool.engine.packing import PackedBatch, pack_ids

CPU = torch.device("cpu")
VOCAB = 60
LIMIT = 16
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
DYNAMIC: dict[str, Any] = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
LONG: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.5, 3.0, 6.0, 12.0],
    "original_max_position_embeddings": LIMIT,
}
LAYERED: dict[str, Any] = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": DYNAMIC,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "dynamic": ("LlamaModel", {**SIZES, "max_position_embeddings": LIMIT, "rope_parameters": DYNAMIC}),
    "longrope": ("Phi3Model", {**SIZES, "max_position_embeddings": 64, "rope_parameters": LONG, "eos_token_id": 2,
                               "original_max_position_embeddings": LIMIT}),
    "a layer type": ("Gemma3TextModel", {**SIZES, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8,
                                         "max_position_embeddings": LIMIT, "rope_parameters": LAYERED,
                                         "layer_types": ["full_attention", "sliding_attention"]}),
}  # fmt: skip
LENGTHS = [3, LIMIT - 1, LIMIT, LIMIT + 1, LIMIT + 1, 30, 60, 8, 40]


def made(name: str) -> Any:
    kind, config = MODELS[name]
    model_class = getattr(transformers, kind)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**copy.deepcopy(config))).eval().requires_grad_(False)
    tiny.inflate(model)
    return model


def stretching(name: str, padded: bool = False) -> StretchingBackbone:
    module = made(name)
    if padded:
        return StretchingBackbone(PaddedBackbone(module, attention="eager", pads=True), LIMIT)
    module.config._attn_implementation = NAME
    return StretchingBackbone(Backbone(module), LIMIT)


def sequences() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(5, VOCAB, (n,), generator=generator).tolist() for n in LENGTHS]


@pytest.fixture(scope="module", params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def truths(name: str) -> list[Tensor]:
    """Each prompt by a model that never saw another."""
    fresh = made(name)
    fresh.config._attn_implementation = "eager"
    with torch.no_grad():
        return [
            copy.deepcopy(fresh)(input_ids=torch.tensor([ids])).last_hidden_state[0] for ids in sequences()
        ]


@torch.inference_mode()
def run(backbone: Backbone, batch: list[list[int]]) -> list[Tensor]:
    return list(torch.split(backbone.forward(pack_ids(batch, CPU)), [len(ids) for ids in batch]))


def check(own: Tensor, truth: Tensor) -> None:
    assert (own - truth).abs().max() <= 2e-5 * truth.abs().max().clamp_min(1)


def test_the_stock_code_remembers_and_this_test_would_see_it(truths: list[Tensor], name: str) -> None:
    """Planted: without this class a short prompt beside a long one comes out otherwise."""
    module = made(name)
    module.config._attn_implementation = NAME
    batch = sequences()
    together = run(Backbone(module), batch)
    assert max((own - truth).abs().max() for own, truth in zip(together, truths, strict=True)) > 0.1


@pytest.mark.parametrize("padded", [False, True])
def test_in_company_each_is_what_it_is_alone_in_any_order(
    name: str, padded: bool, truths: list[Tensor]
) -> None:
    backbone, batch = stretching(name, padded), sequences()
    order = list(range(len(batch)))
    for seed in range(6):
        random.Random(seed).shuffle(order)
        for i, own in zip(order, run(backbone, [batch[i] for i in order]), strict=True):
            check(own, truths[i])


@pytest.mark.parametrize("padded", [False, True])
def test_no_prompt_remembers_the_ones_before(name: str, padded: bool, truths: list[Tensor]) -> None:
    backbone, batch = stretching(name, padded), sequences()
    for i in [6, 0, 3, 2, 5, 1, 6, 3, 8, 7, 4]:
        check(run(backbone, [batch[i]])[0], truths[i])


def test_a_replica_is_as_fresh_and_does_not_share_what_it_remembers(name: str, truths: list[Tensor]) -> None:
    one, batch = stretching(name), sequences()
    run(one, batch)
    two = one.replica()
    pairs = list(zip(one.module.parameters(), two.module.parameters(), strict=True))
    assert all(a is b for a, b in pairs)
    for i in (6, 3, 0):
        check(run(two, [batch[i]])[0], truths[i])
        check(run(one, [batch[-1 - i]])[0], truths[-1 - i])


def test_a_call_that_failed_is_forgotten_too(truths: list[Tensor], name: str) -> None:
    backbone, batch = stretching(name), sequences()
    norm = backbone.module.norm
    assert isinstance(norm, torch.nn.Module)

    def fails(*_: object) -> None:
        raise MemoryError

    hook = norm.register_forward_hook(fails)
    with pytest.raises(MemoryError):
        run(backbone, [batch[6]])
    hook.remove()
    check(run(backbone, [batch[3]])[0], truths[3])


def test_short_prompts_share_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = stretching("dynamic")
    rows: list[list[int]] = []
    honest = Backbone.forward

    def counted(self: Backbone, batch: PackedBatch) -> Tensor:
        rows.append(batch.lengths)
        return honest(self, batch)

    monkeypatch.setattr(Backbone, "forward", counted)
    run(backbone, sequences())
    assert sorted(rows) == [[3, 15, 16, 8], [17, 17], [30], [40], [60]]


@pytest.mark.parametrize(
    ("rope", "length", "limit"),
    [
        ({"rope_type": "default", "rope_theta": 1e4}, 64, None),
        ({"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}, 64, None),
        (DYNAMIC, 64, 64),
        ({**DYNAMIC, "original_max_position_embeddings": 32}, 64, 32),
        (LONG, 64, LIMIT),
    ],
)
def test_the_limit_is_the_length_up_to_which_frequencies_stand_still(
    rope: dict[str, Any], length: int, limit: int | None
) -> None:
    config = transformers.LlamaConfig(
        **SIZES, max_position_embeddings=length, rope_parameters=copy.deepcopy(rope)
    )
    assert stretches_beyond(config) == limit


def test_a_model_without_rotary_positions_never_stretches() -> None:
    assert stretches_beyond(transformers.BertConfig()) is None
    config = transformers.Gemma3TextConfig(**copy.deepcopy(MODELS["a layer type"][1]))
    assert stretches_beyond(config) == LIMIT
