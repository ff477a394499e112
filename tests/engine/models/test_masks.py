"""Masks that are never built: what they would have said is what the layers' arguments say, or it is found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import tiny
from carpool.engine.models.attention import NAME
from carpool.engine.models.backbone import Backbone
from carpool.engine.models.choice import choose
from carpool.engine.models.masks import mask_fault
from carpool.engine.models.padded import PaddedBackbone
from carpool.engine.models.patches import patch
from carpool.engine.packing import pack_ids

CPU = torch.device("cpu")
IDS = [5, 6, 7, 8, 9]
SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 1 << 20,
    "pad_token_id": 0,
}
CAUSAL: dict[str, Any] = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
BOTH = {"layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 8}
FAITHFUL: dict[str, tuple[str, dict[str, Any]]] = {
    "looks both ways": ("XLMRobertaModel", {**SIZES, "max_position_embeddings": 64}),
    "looks back": ("LlamaModel", CAUSAL),
    "was told to look both ways": ("LlamaModel", {**CAUSAL, "is_causal": False}),
    "looks back through a window": ("MistralModel", {**CAUSAL, "sliding_window": 4096}),
    "through windows in some layers": ("Gemma2Model", {**CAUSAL, **BOTH, "sliding_window": 4096}),
    "both ways through a window": ("Gemma3TextModel", {**CAUSAL, **BOTH, "sliding_window": 512,
                                                       "use_bidirectional_attention": True}),
    "both ways through half of one": ("ModernBertModel", {**SIZES, "local_attention": 128, "bos_token_id": 1,
                                                          "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}),
    "passes no masks on": ("MPNetModel", {**SIZES, "max_position_embeddings": 64}),
}  # fmt: skip
CHUNKS: dict[str, Any] = {**CAUSAL, "intermediate_size_mlp": 48, "num_local_experts": 2, "attention_chunk_size": 8192,
                          "no_rope_layers": [1, 0]}  # fmt: skip
INCLUSIVE: dict[str, Any] = {**CAUSAL, "sliding_window": 4096, "is_causal": False}


def backbone(kind: str, config: dict[str, Any]) -> Backbone:
    model_class = getattr(transformers, kind)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**config)).eval().requires_grad_(False)
    tiny.inflate(model)
    model.config._attn_implementation = NAME
    patch(model)
    return Backbone(model)


@pytest.mark.parametrize("name", FAITHFUL)
def test_masks_that_say_what_the_arguments_say_pass_at_any_length(name: str) -> None:
    one = backbone(*FAITHFUL[name])
    assert mask_fault(one, IDS, max_model_len=1 << 18) is None
    assert one.module.config._attn_implementation == NAME  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("kind", "config", "harmless"),
    [("Llama4TextModel", CHUNKS, 8192), ("MistralModel", INCLUSIVE, 4096)],
)
def test_a_mask_that_says_otherwise_is_found_where_a_text_is_long_enough_to_meet_it(
    kind: str, config: dict[str, Any], harmless: int
) -> None:
    """Attention in chunks, of which no argument speaks; a window that counts one more than its argument.

    A text of five tokens shows neither.
    """
    one = backbone(kind, config)
    assert mask_fault(one, IDS, max_model_len=harmless) is None
    fault = mask_fault(one, IDS, max_model_len=harmless + 1)
    assert fault is not None
    assert "looks at other tokens by its masks than by its arguments" in fault


def test_chunks_of_any_size_are_found_if_the_size_is_told() -> None:
    one = backbone("Llama4TextModel", {**CHUNKS, "attention_chunk_size": 777})
    assert mask_fault(one, IDS, max_model_len=1000, limits=[777]) is not None


@pytest.mark.parametrize(("kind", "config"), [("Llama4TextModel", CHUNKS), ("MistralModel", INCLUSIVE)])
def test_such_a_model_is_served_as_transformers_has_it(kind: str, config: dict[str, Any]) -> None:
    small = {
        key: 8 if key in ("attention_chunk_size", "sliding_window") else own for key, own in config.items()
    }
    found, notice = choose(backbone(kind, small), vocab_size=60, max_model_len=64, limits=[8])
    assert isinstance(found, PaddedBackbone)
    assert "by its masks" in (notice or "")
    ids = [5 + i % 50 for i in range(40)]
    stock: Any = backbone(kind, small).module
    stock.config._attn_implementation = "eager"
    with torch.inference_mode():
        own = found.forward(pack_ids([ids, ids[:35]], CPU))[:40]
        truth = stock(input_ids=torch.tensor([ids])).last_hidden_state[0]
    assert (own - truth).abs().max() <= 2e-5 * truth.abs().max()
