"""PEFT folders are read as PEFT means them, and what is more than LoRA is refused with a sentence that says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from carpool.engine.errors import ConfigError
from carpool.engine.models.adapter import read_peft

CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "target_modules": ["q"]}
A, B = torch.randn(4, 6), torch.randn(5, 4)
WEIGHTS = {"base_model.model.layers.0.q.lora_A.weight": A, "base_model.model.layers.0.q.lora_B.weight": B}


def write(folder: Path, config: dict[str, Any], weights: dict[str, torch.Tensor] = WEIGHTS) -> Path:
    tiny.write_json(folder / "adapter_config.json", {**CONFIG, **config})
    save_file({key: w.clone() for key, w in weights.items()}, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("config", "scaling"),
    [
        ({}, 8 / 4),
        ({"use_rslora": True}, 8 / 2),
        ({"r": 9, "rank_pattern": {"q": 4}}, 8 / 4),
        ({"r": 9, "rank_pattern": {r"(?:.*\.)?(?:q|v)": 4}}, 8 / 4),
        ({"alpha_pattern": {r"layers\.0\.q": 2, "q": 5}}, 2 / 4),
        ({"alpha_pattern": {"^layers.0.q": 2}}, 2 / 4),
        ({"alpha_pattern": {"^q": 2, "k": 7}}, 8 / 4),
        ({"alpha_pattern": {r"layers?\.(0|1)\..*": 2}}, 2 / 4),
    ],
)
def test_scaling_is_as_peft_has_it(tmp_path: Path, config: dict[str, Any], scaling: float) -> None:
    adapter = read_peft("mine", write(tmp_path, config))
    assert torch.allclose(adapter.deltas["layers.0.q"].matrix(), B @ A * scaling)
    assert not adapter.saved


def test_a_pickle_is_read_where_there_is_nothing_safer(tmp_path: Path) -> None:
    write(tmp_path, {})
    torch.save(load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "adapter_model.bin")
    safe = read_peft("mine", tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    pickled = read_peft("mine", tmp_path)
    assert torch.equal(safe.deltas["layers.0.q"].up, pickled.deltas["layers.0.q"].up)


def test_a_pickle_that_runs_code_is_not_read(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (print, ("run",))

    write(tmp_path, {})
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save({"x": Evil()}, tmp_path / "adapter_model.bin")
    with pytest.raises(
        ConfigError, match=r"its weights cannot be read .it is a pickle that .* could run code"
    ):
        read_peft("mine", tmp_path)


def test_embeddings_and_saved_modules_are_told_apart(tmp_path: Path) -> None:
    weights = {
        **WEIGHTS,
        "base_model.model.words.lora_embedding_A": A,
        "base_model.model.words.lora_embedding_B": B,
        "base_model.model.score.weight": torch.zeros(2, 6),
        "base_model.model.classifier.modules_to_save.dense.bias": torch.zeros(2),
    }
    adapter = read_peft("mine", write(tmp_path, {"modules_to_save": ["score", "classifier"]}, weights))
    assert set(adapter.deltas) == {"layers.0.q", "words"}
    assert set(adapter.saved) == {"score.weight", "classifier.dense.bias"}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "biases"),
        ({"peft_type": "IA3"}, "peft_type is IA3, and only LORA"),
        ({"peft_type": None}, "peft_type is None"),
        ({"init_lora_weights": "pissa"}, "'pissa' changed the base's own weights"),
        ({"layer_replication": [[0, 4]]}, "sets layer_replication"),
        ({"trainable_token_indices": [3]}, "sets trainable_token_indices"),
        ({"lora_bias": True}, "sets lora_bias"),
        ({"something_of_next_year": 1}, "sets something_of_next_year"),
        ({"r": 8}, "is of rank 4, and adapter_config.json says 8"),
        ({"modules_to_save": ["score"]}, "does not bring them"),
        ({"lora_alpha": "much"}, r"of which rank and lora_alpha layers\.0\.q is"),
        ({"lora_alpha": None}, "of which rank and lora_alpha"),
        ({"r": float("inf")}, "of which rank and lora_alpha"),
        ({"rank_pattern": {"[": 4}}, "of which rank and lora_alpha"),
        ({"alpha_pattern": [4]}, "of which rank and lora_alpha"),
        ({"rank_pattern": {"(((.*)*)*)*!": 4}}, "in too many ways"),
        ({"rank_pattern": {".*.*.*!": 4}}, "in too many ways"),
        ({"alpha_pattern": {"q|" * 1000: 4}}, "in too many ways"),
    ],
)
def test_what_is_more_than_lora_or_less_is_refused(
    tmp_path: Path, config: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=rf"^The adapter 'mine' cannot be served: .*{words}.*\.$"):
        read_peft("mine", write(tmp_path, config))


def test_all_that_peft_writes_today_is_known(tmp_path: Path) -> None:
    """No key of a plain adapter of the installed PEFT is refused."""
    import peft

    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q"]).to_dict()
    assert read_peft("mine", write(tmp_path, {**config, "target_modules": ["q"], "peft_type": "LORA"}))


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"base_model.model.q.lora_A.weight": A}, "only one of lora_A and lora_B"),
        ({"base_model.model.q.lora_A.weight": A, "base_model.model.q.lora_B.weight": A}, "do not multiply"),
        ({**WEIGHTS, "base_model.model.layers.0.q.lora_magnitude_vector": A}, "lora_magnitude_vector"),
        ({"base_model.model.score.weight": A}, "holds no LoRA weights"),
    ],
)
def test_what_is_damaged_is_refused(tmp_path: Path, weights: dict[str, torch.Tensor], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_peft("mine", write(tmp_path, {}, weights))


@pytest.mark.parametrize("content", [[1.0], {"q.lora_A.weight": 1.0}, "words"])
def test_a_pickle_of_something_else_is_refused(tmp_path: Path, content: object) -> None:
    write(tmp_path, {})
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(content, tmp_path / "adapter_model.bin")
    with pytest.raises(ConfigError, match="its weights cannot be read"):
        read_peft("mine", tmp_path)


def test_what_is_no_peft_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no adapter_config\.json"):
        read_peft("mine", tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        read_peft("mine", tmp_path)
    tiny.write_json(tmp_path / "adapter_config.json", CONFIG)
    with pytest.raises(ConfigError, match=r"neither adapter_model\.safetensors nor adapter_model\.bin"):
        read_peft("mine", tmp_path)
