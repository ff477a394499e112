"""A checkpoint's tensors under the names of the model's own modules, however it was saved."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tiny
from carpool.engine.build import build
from carpool.engine.config import EngineConfig
from carpool.engine.errors import ConfigError
from carpool.engine.models.weights import stored, unwrapped
from carpool.engine.packing import pack_ids

Rename = Callable[[str], str]


def _before(prefix: str) -> Rename:
    return lambda name: prefix + name


WRAPPED: dict[str, Rename] = {
    "DataParallel": _before("module."),
    "torch.compile": _before("_orig_mod."),
    "both": _before("module._orig_mod."),
    "a compiled layer": lambda name: re.sub(r"(layers?\.0\.)", r"\1_orig_mod.", name),
    "a SentenceTransformer": _before("0.auto_model."),
    "a class around it": _before("model."),
}


def hidden(folder: Path) -> Tensor:
    """[T, H] of two texts in one row."""
    parts = build(
        EngineConfig(model=str(folder), dtype="float32", cpu_workers=1, max_num_batched_tokens=1024)
    )
    row = pack_ids([[5, 7, 9, 11], [8, 6]], torch.device("cpu"))
    with torch.inference_mode():
        return parts.runners[0]._backbone.forward(row)


def rename(folder: Path, how: Rename) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(
        {how(name): weight for name, weight in weights.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )


@pytest.mark.parametrize("way", WRAPPED)
@pytest.mark.parametrize("family", ["bert", "qwen2"])
def test_what_was_put_around_a_model_is_not_part_of_its_names(
    family: str, way: str, checkpoint: Callable[[str], Path], fresh: Callable[[str], Path]
) -> None:
    folder = fresh(family)
    rename(folder, WRAPPED[way])
    torch.testing.assert_close(hidden(folder), hidden(checkpoint(family)), rtol=0, atol=0)


def test_pickles_are_read_by_the_same_names(fresh: Callable[[str], Path]) -> None:
    folder = fresh("bert")
    names = set(stored(folder))
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({f"module.{name}": weight for name, weight in weights.items()}, folder / "pytorch_model.bin")
    assert set(stored(folder)) == names
    assert set(stored(folder, re.compile("pooler"))) == {"pooler.dense.weight", "pooler.dense.bias"}


def test_names_that_nobody_is_known_to_put_around_a_model_are_not_guessed_at(
    fresh: Callable[[str], Path],
) -> None:
    folder = fresh("bert")
    rename(folder, _before("text_encoder."))
    with pytest.raises(ConfigError, match="lacks 37 of the weights"):
        hidden(folder)


def test_two_models_in_one_file_are_not_taken_for_one(fresh: Callable[[str], Path]) -> None:
    folder = fresh("bert")
    weights = load_file(folder / "model.safetensors")
    both = {
        **{f"model.{n}": w for n, w in weights.items()},
        **{f"0.auto_model.{n}": w + 1 for n, w in weights.items()},
    }
    save_file(both, folder / "model.safetensors", {"format": "pt"})
    assert unwrapped(folder) == {}
    with pytest.raises(ConfigError, match="lacks 37 of the weights"):
        hidden(folder)


def test_a_model_in_a_folder_of_its_own_is_found_by_modules_json(
    tmp_path: Path, checkpoint: Callable[[str], Path]
) -> None:
    """As the first releases of sentence-transformers wrote it."""
    own = tmp_path / "0_Transformer"
    own.mkdir()
    shutil.copytree(checkpoint("bert"), tmp_path, dirs_exist_ok=True)
    for name in (
        "config.json",
        "model.safetensors",
        "sentence_bert_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ):
        (tmp_path / name).rename(own / name)
    modules = json.loads((tmp_path / "modules.json").read_text())
    tiny.write_json(tmp_path / "modules.json", [{**modules[0], "path": "0_Transformer"}, *modules[1:]])
    tiny.edit_json(own / "sentence_bert_config.json", max_seq_length=77)
    assert build(EngineConfig(model=str(tmp_path), max_num_batched_tokens=1024)).model.max_model_len == 77
    torch.testing.assert_close(hidden(tmp_path), hidden(checkpoint("bert")), rtol=0, atol=0)


@pytest.mark.parametrize("family", ["bert", "bert_3", "qwen2_3"])
def test_pickles_from_before_torch_1_6_are_read(family: str, fresh: Callable[[str], Path]) -> None:
    """They are no archives, which could be mapped into memory."""
    folder = fresh(family)
    expected = hidden(folder)
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    (folder / "model.safetensors").unlink()
    assert stored(folder).keys() == weights.keys()
    assert torch.equal(hidden(folder), expected)
