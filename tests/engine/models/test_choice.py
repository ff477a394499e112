"""How a model is run: packed, else padded and loudly so, else refused with a sentence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import tiny
from carpool.engine.build import Parts, build
from carpool.engine.config import EngineConfig
from carpool.engine.errors import ConfigError
from carpool.engine.models import patches
from carpool.engine.models.attention import NAME
from carpool.engine.models.backbone import Backbone
from carpool.engine.models.choice import choose
from carpool.engine.models.padded import PaddedBackbone
from carpool.engine.models.patches import mpnet, patch
from carpool.engine.models.stretching import StretchingBackbone
from carpool.engine.packing import pack_ids
from oracle import Oracle
from zoo.measure import Prompt, run

CPU = torch.device("cpu")
VOCAB = 60
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}


def loaded(kind: str, *, patched: bool = True, zero_pad: bool = True, **config: Any) -> Backbone:
    """As the loader hands it over. `zero_pad`: the pad token's embedding is zero, as checkpoints have it."""
    model_class = getattr(transformers, kind)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**{**SIZES, **config})).eval().requires_grad_(False)
    tiny.inflate(model)
    if zero_pad:
        model.get_input_embeddings().weight[0] = 0
    model.config._attn_implementation = NAME
    if patched:
        patch(model)
    return Backbone(model)


def chosen(backbone: Backbone, max_model_len: int = 128) -> tuple[Any, str]:
    found, notice = choose(backbone, vocab_size=VOCAB, max_model_len=max_model_len)
    return found, notice or ""


def stock(kind: str, batch: list[list[int]], **config: Any) -> list[Tensor]:
    module: Any = loaded(kind, patched=False, **config).module
    module.config._attn_implementation = "eager"
    with torch.no_grad():
        return [module(input_ids=torch.tensor([ids])).last_hidden_state[0] for ids in batch]


def agrees(backbone: Backbone, kind: str, **config: Any) -> None:
    generator = torch.Generator().manual_seed(2)
    batch = [torch.randint(5, VOCAB, (n,), generator=generator).tolist() for n in (5, 9, 8, 1, 9, 60)]
    with torch.inference_mode():
        rows = torch.split(backbone.forward(pack_ids(batch, CPU)), [len(ids) for ids in batch])
    for own, truth in zip(rows, stock(kind, batch, **config), strict=True):
        assert (own - truth).abs().max() <= 2e-5 * truth.abs().max().clamp_min(1)


def test_what_passes_the_probe_is_packed_without_a_word() -> None:
    backbone = loaded("BertModel")
    assert chosen(backbone) == (backbone, "")


def test_a_class_that_goes_past_the_registry_is_padded_and_said_to_be() -> None:
    backbone, notice = chosen(loaded("MPNetModel", patched=False))
    assert isinstance(backbone, PaddedBackbone)
    assert backbone.pads
    assert notice == (
        "MPNetModel cannot be packed (the model does not attend through transformers' attention registry): "
        "texts are served right-padded, by transformers' own code, slower."
    )
    agrees(backbone, "MPNetModel")


def test_a_patch_that_does_not_fit_any_more_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a change in transformers might make one: it costs speed, and nothing else."""
    backbone = loaded("MPNetModel")

    def fails(*_: object, **__: object) -> None:
        raise AttributeError("no attribute 'q'")

    monkeypatch.setattr(mpnet.PackedSelfAttention, "forward", fails)
    padded, notice = chosen(backbone)
    assert isinstance(padded, PaddedBackbone)
    assert "no attribute 'q'" in notice
    agrees(padded, "MPNetModel")


def test_a_patch_that_computes_something_else_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing leaks, and alone it is as wrong as in company."""
    backbone = loaded("MPNetModel")
    bucket = mpnet.PackedEncoder.relative_position_bucket
    monkeypatch.setattr(mpnet.PackedEncoder, "relative_position_bucket", lambda self, far: bucket(-far))
    padded, notice = chosen(backbone)
    assert isinstance(padded, PaddedBackbone)
    assert "differ from those of transformers' own attention" in notice
    agrees(padded, "MPNetModel")


MOBILE: dict[str, Any] = {"embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16,
                          "normalization_type": "layer_norm"}  # fmt: skip


@pytest.mark.parametrize("zero_pad", [True, False])
def test_a_model_that_takes_no_padding_gets_none(zero_pad: bool) -> None:
    """MobileBERT's last token looks at the next one's embedding: of a pad that is not zero it would see something."""
    backbone, notice = chosen(loaded("MobileBertModel", patched=False, zero_pad=zero_pad, **MOBILE))
    assert isinstance(backbone, PaddedBackbone)
    assert backbone.pads is zero_pad
    assert ("only with others of exactly their length" in notice) is not zero_pad
    agrees(backbone, "MobileBertModel", zero_pad=zero_pad, **MOBILE)


def test_where_sdpa_cannot_do_what_a_layer_asks_the_eager_attention_does() -> None:
    config: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 8, "attn_logit_softcapping": 2.0,
                              "query_pre_attn_scalar": 8, "sliding_window": 8}  # fmt: skip
    plain = loaded("Gemma2Model", **config)
    plain._extra["block_mask"] = torch.zeros(1)  # what packed attention refuses
    backbone, _ = chosen(plain)
    assert isinstance(backbone, PaddedBackbone)
    assert backbone._attention == "eager"
    agrees(backbone, "Gemma2Model", **config)


def test_sdpa_serves_where_it_can() -> None:
    plain = loaded("LlamaModel", num_key_value_heads=2)
    plain._extra["block_mask"] = torch.zeros(1)
    backbone, _ = chosen(plain)
    assert isinstance(backbone, PaddedBackbone)
    assert backbone._attention == "sdpa"
    agrees(backbone, "LlamaModel", num_key_value_heads=2)


def test_a_model_that_remembers_is_refused_in_one_sentence() -> None:
    backbone = loaded("BertModel")
    said: list[int] = []

    def drifts(module: nn.Module, given: Any, output: Any) -> Any:
        said.append(1)
        output.last_hidden_state = output.last_hidden_state * (1 + 0.1 * len(said))
        return output

    backbone.module.register_forward_hook(drifts)
    with pytest.raises(
        ConfigError, match=r"BertModel cannot be served, neither packed \(.*\) nor padded \(.*\)\.$"
    ):
        chosen(backbone)


DYNAMIC: dict[str, Any] = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}


@pytest.mark.parametrize(("longest", "kind"), [(128, Backbone), (129, StretchingBackbone)])
def test_rotary_positions_that_stretch_do_so_only_beyond_their_limit(longest: int, kind: type) -> None:
    backbone, notice = chosen(
        loaded("LlamaModel", num_key_value_heads=2, rope_parameters=dict(DYNAMIC)), longest
    )
    assert (type(backbone), getattr(backbone, "packing", None), notice) == (kind, "packed", "")


def test_the_parts_say_that_a_model_is_padded_and_serve_it(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patches, "PATCHES", {})
    parts: Parts = build(EngineConfig(model=str(checkpoint("mpnet")), cpu_workers=2, dtype="float32"))
    assert (parts.model.packing, parts.model.attention) == ("padded", "transformers")
    assert parts.model.by_length, "padding is what differing lengths cost"
    assert [n for n in parts.model.notices if n.startswith("MPNetModel cannot be packed")]
    oracle = Oracle(checkpoint("mpnet"), ["cls"])
    batch = parts.tokenizer.encode([text for text in tiny.TEXTS if text])
    for runner in parts.runners:
        alone = replace(parts, runners=[runner])
        for own, ids in zip(run(alone, [Prompt("embed", ids) for ids in batch]), batch, strict=True):
            torch.testing.assert_close(own, oracle.embed(ids), rtol=1e-5, atol=1e-5)
