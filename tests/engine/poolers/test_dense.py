"""Dense layers with a bypass beside them, as sentence-transformers and PyLate have them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers.base.modules.dense import Dense as Published
from torch import nn

from carpool.engine.errors import ConfigError
from carpool.engine.poolers.dense import load_dense
from carpool.engine.side_files import Dense
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
    assert close(load_dense(spec, CPU)(rows), truth)


def test_a_bypass_that_is_not_there_is_refused(tmp_path: Path) -> None:
    _, spec = written(tmp_path, 4, True)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(
        {name: weights[name] for name in weights if "residual" not in name}, tmp_path / "model.safetensors"
    )
    with pytest.raises(ConfigError, match=r"no residual\.weight of shape \(4, 6\)"):
        load_dense(spec, CPU)
