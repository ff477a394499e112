"""The padded fallback: the same hidden states as one prompt at a time, in the rows they came from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import tiny
from carpool.engine.models.backbone import Backbone
from carpool.engine.models.lora import Delta, attach
from carpool.engine.models.padded import PaddedBackbone
from carpool.engine.packing import PackedBatch, pack_ids

CPU = torch.device("cpu")
VOCAB = 60
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 140,
    "pad_token_id": 0,
}
CAUSAL: dict[str, Any] = {**SIZES, "num_key_value_heads": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertModel", SIZES),
    "roberta": ("XLMRobertaModel", {**SIZES, "pad_token_id": 1, "type_vocab_size": 1}),
    "mpnet": ("MPNetModel", {**SIZES, "pad_token_id": 1}),
    "deberta": ("DebertaV2Model", {**SIZES, "relative_attention": True, "pos_att_type": ["p2c", "c2p"],
                                   "position_biased_input": False, "type_vocab_size": 0}),
    "modernbert": ("ModernBertModel", {**SIZES, "local_attention": 8, "bos_token_id": 1, "eos_token_id": 2,
                                       "cls_token_id": 1, "sep_token_id": 2}),
    "llama": ("LlamaModel", CAUSAL),
    "mistral": ("MistralModel", {**CAUSAL, "sliding_window": 8}),
    "lfm2": ("Lfm2Model", {**CAUSAL, "layer_types": ["conv", "full_attention"]}),
    "qwen3.5": ("Qwen3_5TextModel", {**CAUSAL, "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
                                     "linear_key_head_dim": 16, "linear_value_head_dim": 16,
                                     "layer_types": ["linear_attention", "full_attention"]}),
    "t5": ("T5EncoderModel", {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2,
                              "num_heads": 4}),
}  # fmt: skip
LENGTHS = [7, 1, 23, 40, 23, 24, 2, 100]


def made(name: str) -> Any:
    kind, config = MODELS[name]
    model_class = getattr(transformers, kind)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**config)).eval().requires_grad_(False)
    tiny.inflate(model)
    return model


def sequences(lengths: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(5, VOCAB, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def alone(model: Any, batch: list[list[int]]) -> list[Tensor]:
    """Stock and eager, one prompt at a time."""
    model.set_attn_implementation("eager")
    rows = [torch.tensor([ids]) for ids in batch]
    return [model(input_ids=row, attention_mask=torch.ones_like(row)).last_hidden_state[0] for row in rows]


@torch.inference_mode()
def run(backbone: Backbone, batch: PackedBatch) -> list[Tensor]:
    return list(torch.split(backbone.forward(batch), batch.lengths))


def check(ours: list[Tensor], truths: list[Tensor]) -> None:
    for own, truth in zip(ours, truths, strict=True):
        assert (own - truth).abs().max() <= 2e-5 * truth.abs().max().clamp_min(1)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("pads", [True, False])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_row_is_what_its_prompt_gives_alone(name: str, pads: bool, attention: str) -> None:
    if attention == "sdpa" and not made(name)._supports_sdpa:
        pytest.skip("its class has no such attention")
    batch = sequences(LENGTHS)
    padded = PaddedBackbone(made(name), attention=attention, pads=pads)
    check(run(padded, pack_ids(batch, CPU)), alone(made(name), batch))


@pytest.mark.parametrize("pads", [True, False])
def test_positions_of_the_roberta_family_skip_pad_tokens_within_a_prompt(pads: bool) -> None:
    batch = [[0, 5, 1, 6, 2], [1, 0, 5, 2], [0, 5, 2, 1, 1], [1], [9, 9, 9, 9, 9, 9]]
    padded = PaddedBackbone(made("roberta"), attention="sdpa", pads=pads)
    check(run(padded, pack_ids(batch, CPU)), alone(made("roberta"), batch))


def test_token_types_stay_with_their_tokens() -> None:
    batch = sequences([6, 5, 6, 20])
    starts = [2, None, 4, 9]
    padded = PaddedBackbone(made("bert"), attention="sdpa", pads=True)
    model = made("bert")
    for own, ids, start in zip(run(padded, pack_ids(batch, CPU, starts)), batch, starts, strict=True):
        types = torch.tensor([[int(start is not None and i >= start) for i in range(len(ids))]])
        with torch.no_grad():
            truth = model(input_ids=torch.tensor([ids]), token_type_ids=types).last_hidden_state[0]
        check([own], [truth])


class Calls(nn.Module):
    """A model that keeps its inputs and answers with the ids, a width of one."""

    def __init__(self) -> None:
        super().__init__()
        self.config = transformers.BertConfig(**SIZES)
        self.inputs: list[dict[str, Tensor]] = []

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        self.inputs.append({"ids": input_ids, "mask": attention_mask})
        return transformers.modeling_outputs.BaseModelOutput(input_ids[..., None].float())


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.booleans())
def test_whatever_the_lengths_every_token_comes_back_to_its_place(lengths: list[int], pads: bool) -> None:
    calls = Calls()
    batch = pack_ids(sequences(lengths), CPU)
    hidden = PaddedBackbone(calls, attention="eager", pads=pads).forward(batch)
    assert torch.equal(hidden[:, 0].long(), batch.input_ids)
    real = sum(int(call["mask"].sum()) for call in calls.inputs)
    cells = sum(call["mask"].numel() for call in calls.inputs)
    assert real == sum(lengths)
    assert cells <= real / 0.75 if pads else cells == real
    for call in calls.inputs:
        assert (call["ids"][call["mask"] == 0] == 0).all(), "what is padded is padded with the pad token"
        assert (call["mask"].diff(dim=1) <= 0).all(), "on the right"


def test_equal_lengths_share_one_call() -> None:
    calls = Calls()
    PaddedBackbone(calls, attention="eager", pads=False).forward(pack_ids(sequences([5, 9, 5, 5, 9]), CPU))
    assert sorted(tuple(call["ids"].shape) for call in calls.inputs) == [(2, 9), (3, 5)]


def test_a_replica_shares_weights_and_runs_the_same_way() -> None:
    one = PaddedBackbone(made("bert"), attention="eager", pads=False)
    two = one.replica()
    batch = pack_ids(sequences(LENGTHS), CPU)
    assert (two.packing, two.pads) == ("padded", False)
    assert two.module.config._attn_implementation == "eager"  # type: ignore[union-attr]
    pairs = list(zip(one.module.parameters(), two.module.parameters(), strict=True))
    assert all(a is b for a, b in pairs)
    assert one.module is not two.module
    check(run(two, batch), run(one, batch))


@pytest.mark.parametrize("pads", [True, False])
def test_adapters_ride_with_their_sequences(pads: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    name = "encoder.layer.0.attention.self.query"
    deltas = [
        Delta(torch.randn(r, 32, generator=generator), torch.randn(32, r, generator=generator))
        for r in (2, 3)
    ]
    module = made("bert")
    for slot, delta in enumerate(deltas, start=1):
        attach(module, slot, {name: delta})
    batch, slots = sequences([6, 6, 6, 9, 20, 20, 5]), [1, 0, 2, 1, 2, 0, 1]
    rows = run(PaddedBackbone(module, attention="sdpa", pads=pads), pack_ids(batch, CPU, adapters=slots))
    for own, ids, slot in zip(rows, batch, slots, strict=True):
        plain = made("bert")
        if slot:
            with torch.no_grad():
                plain.get_submodule(name).weight += deltas[slot - 1].matrix()
        check([own], alone(plain, [ids]))
