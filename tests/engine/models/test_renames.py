"""Stored names become the class's: nothing is lost, nothing is invented, and what is missing stays missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import XLMRobertaConfig, XLMRobertaForSequenceClassification

import tiny
from carpool.engine.architecture import Architecture
from carpool.engine.checkpoint import Checkpoint
from carpool.engine.config import PoolerConfig
from carpool.engine.errors import ConfigError
from carpool.engine.models.backbone import Backbone
from carpool.engine.models.loader import Loader
from carpool.engine.models.renames import RENAMES
from carpool.engine.packing import pack_ids
from zoo import translated as zoo
from zoo.measure import TOLERANCE, difference

CPU = torch.device("cpu")
IDS = [0, 7, 8, 9, 2]
ENCODERS = {
    "gte": "gte-multilingual-base",
    "nomic": "nomic-embed-text-v1.5",
    "jina-rotary": "jina-embeddings-v3",
    "jina-learned": "jina-reranker-v2-base-multilingual",
}


def make(dialect: str, folder: Path) -> None:
    (member,) = [member for member in zoo.MEMBERS if member.name.endswith("/" + ENCODERS[dialect])]
    member.make(folder)


def load(folder: Path, *, trust_remote_code: bool = False) -> Backbone:
    checkpoint = Checkpoint.read(folder, {}, PoolerConfig())
    loader = Loader(dtype=torch.float32, device=CPU, max_model_len=64, trust_remote_code=trust_remote_code)
    return loader.load(checkpoint, Architecture.of(checkpoint.architectures, "auto")).backbone


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("dialect", ENCODERS)
def test_every_weight_of_the_backbone_is_needed(dialect: str, tmp_path: Path) -> None:
    """Planted: each of one layer's and of the tables' is taken away in turn."""
    make(dialect, tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    needed = [
        name
        for name in whole
        if ("layer.1." in name or "layers.1." in name or "emb" in name) and "lora" not in name
    ]
    assert len(needed) > 10
    for gone in needed:
        rest = {name: weight for name, weight in whole.items() if name != gone}
        save_file(rest, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ConfigError, match="lacks"):
            load(tmp_path)


@pytest.mark.parametrize("dialect", ENCODERS)
def test_a_table_of_another_size_is_refused(dialect: str, tmp_path: Path) -> None:
    make(dialect, tmp_path)

    def cut(weights: dict[str, Tensor]) -> None:
        name = next(name for name in weights if "word_embeddings" in name and "lora" not in name)
        weights[name] = weights[name][:-1].clone()

    rewrite(tmp_path, cut)
    with pytest.raises(ConfigError, match="do not fit"):
        load(tmp_path)


def test_flash_names_are_xlm_robertas_one_for_one() -> None:
    small = XLMRobertaConfig(
        vocab_size=9, hidden_size=zoo.H, intermediate_size=zoo.INNER, num_hidden_layers=zoo.LAYERS,
        num_attention_heads=zoo.HEADS, max_position_embeddings=20, type_vocab_size=1, num_labels=1,
    )  # fmt: skip
    stored = zoo.random_weights(zoo.FLASH, 9, prefix="roberta.", rows=20)
    stored |= zoo.linear_head(1, "classifier.dense", "classifier.out_proj")
    own = XLMRobertaForSequenceClassification(small).state_dict()
    renamed = RENAMES["jina-learned"](stored, small)
    assert {name: weight.shape for name, weight in renamed.items()} == {
        name: weight.shape for name, weight in own.items() if not name.endswith("position_ids")
    }


def test_adapters_are_left_out_and_originals_come_back() -> None:
    plain = zoo.random_weights(zoo.FLASH, 9, prefix="roberta.")
    stored = zoo.parametrized(plain)
    assert stored.keys() != plain.keys()
    assert RENAMES["jina-rotary"](stored, XLMRobertaConfig()) == plain


def test_a_colbert_brings_a_projection_that_the_backbone_does_not_know(tmp_path: Path) -> None:
    """jina-colbert-v2: the same backbone under another class name, with `linear.weight` beside it."""
    published = zoo.jina_v3(tmp_path)
    tiny.edit_json(tmp_path / "config.json", architectures=["HF_ColBERT"], lora_adaptations=...)
    projection = {"linear.weight": torch.randn(8, zoo.H)}
    save_file(
        {**published.encoder.weights, **projection}, tmp_path / "model.safetensors", metadata={"format": "pt"}
    )
    with torch.inference_mode():
        hidden = load(tmp_path).forward(pack_ids([IDS], CPU))
    assert difference(hidden, published.encoder.hidden(IDS)) <= TOLERANCE


@pytest.mark.parametrize("dialect", ENCODERS)
def test_code_is_not_run_where_it_may_be_and_need_not(dialect: str, tmp_path: Path) -> None:
    make(dialect, tmp_path)
    code = {"AutoConfig": "code.XLMRobertaFlashConfig", "AutoModel": "code.Model"}
    tiny.edit_json(tmp_path / "config.json", auto_map=code)
    (tmp_path / "code.py").write_text("raise SystemExit('remote code was run')")
    load(tmp_path, trust_remote_code=True)
