"""Layers behind the pooling, as sentence-transformers and PyLate have them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules.dense import Dense as Published
from sentence_transformers.base.modules.normalize import Normalize
from sentence_transformers.sentence_transformer.modules.layer_norm import LayerNorm
from torch import nn

import tiny
from carpool import LLM
from carpool.engine.errors import ConfigError
from carpool.engine.poolers.dense import load_layer
from carpool.engine.side_files import Dense, Norm
from head_oracle import close

CPU = torch.device("cpu")


def written(folder: Path, outer: int, residual: bool) -> tuple[Published, Dense]:
    torch.manual_seed(3)
    layer = Published(6, outer, activation_function=nn.GELU(), use_residual=residual)
    layer.save(str(folder))
    return layer, Dense(folder, 6, outer, True, "torch.nn.modules.activation.GELU", residual=residual)


@pytest.mark.parametrize("outer", [6, 4])
@pytest.mark.parametrize("residual", [True, False])
@torch.no_grad()
def test_equals_sentence_transformers(tmp_path: Path, outer: int, residual: bool) -> None:
    layer, spec = written(tmp_path, outer, residual)
    rows = torch.randn(5, 6)
    truth = layer({"sentence_embedding": rows})["sentence_embedding"]
    assert close(load_layer(spec, CPU)(rows), truth)


def test_a_bypass_that_is_not_there_is_refused(tmp_path: Path) -> None:
    _, spec = written(tmp_path, 4, True)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(
        {name: weights[name] for name in weights if "residual" not in name}, tmp_path / "model.safetensors"
    )
    with pytest.raises(ConfigError, match=r"no residual\.weight of shape \(4, 6\)"):
        load_layer(spec, CPU)


@pytest.mark.parametrize("mode", [["mean"], ["cls", "max"]])
@pytest.mark.parametrize("order", ["norm dense unit", "unit dense", "dense unit norm", "norm unit"])
def test_layers_are_run_in_the_order_of_the_files(mode: list[str], order: str, tmp_path: Path) -> None:
    """A text's vector and, where one row is what the layers take, the vectors of its tokens."""
    tiny.bert(tmp_path)
    tiny.sentence_transformers_files(tmp_path, mode, normalize=False)
    wide = tiny.HIDDEN * len(mode)
    torch.manual_seed(5)
    norm = LayerNorm(24 if order.startswith("dense") else wide)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    own = {"norm": norm, "dense": Published(wide, 24, activation_function=nn.Tanh()), "unit": Normalize()}
    model = SentenceTransformer(str(tmp_path), device="cpu")
    model = SentenceTransformer(modules=[*model, *(own[name] for name in order.split())], device="cpu")
    model.save(str(tmp_path / "whole"))
    llm = LLM(str(tmp_path / "whole"), dtype="float32", cpu_workers=1)
    texts = ["the cat sat on a mat", "rain"]
    found = torch.tensor([answer.outputs.embedding for answer in llm.embed(texts)])
    assert close(found, model.encode(texts, convert_to_tensor=True))
    assert ("token_embed" in llm.model_info.tasks) == (len(mode) == 1)
    assert not llm.model_info.linear_head, "no mean of vectors is the vector of a mean"
    llm.close()


@torch.no_grad()
def test_a_layer_norm_without_its_weights_is_refused(tmp_path: Path) -> None:
    LayerNorm(6).save(str(tmp_path))
    spec = Norm(tmp_path, 6)
    assert close(load_layer(spec, CPU)(torch.arange(6.0)[None]), LayerNorm(6).norm(torch.arange(6.0)[None]))
    save_file({"norm.weight": torch.ones(6)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"no norm\.bias of shape \(6,\)"):
        load_layer(spec, CPU)
