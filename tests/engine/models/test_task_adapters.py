"""The adapters that a checkpoint brings: which tasks they make, what stands before a text, which is the default."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from carpool.engine.build import build
from carpool.engine.config import EngineConfig
from carpool.engine.errors import ConfigError
from carpool.engine.model_info import ModelInfo
from carpool.engine.params import TaskAdapter
from zoo.adapters import V5_TASKS, jina_v3_hf, jina_v3_tasks, jina_v5_tasks
from zoo.translated import TASKS


def info(folder: Path, **overrides: Any) -> ModelInfo:
    return build(EngineConfig(model=str(folder), cpu_workers=1, hf_overrides=overrides)).model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any], Path]:
    """Folders, made once each; not to be written to."""
    folders: dict[Any, Path] = {}

    def of(make: Any) -> Path:
        if make not in folders:
            folders[make] = tmp_path_factory.mktemp("tasks")
            make(folders[make])
        return folders[make]

    return of


def test_jina_v3_has_its_five_and_their_instructions(made: Callable[[Any], Path]) -> None:
    model = info(made(jina_v3_tasks))
    assert tuple(model.adapters) == TASKS
    assert model.task_adapters == {task: TaskAdapter(task, f"{task}: ") for task in TASKS}
    assert model.default_adapter == "text-matching", "as the reference serves it"
    assert not model.lora_modules


def test_jina_v3_for_transformers_has_the_same_instructions(made: Callable[[Any], Path]) -> None:
    model = info(made(jina_v3_hf))
    assert set(model.task_adapters) == {"retrieval.query", "separation", "text-matching"}
    assert model.task_adapters["retrieval.query"].prompt.startswith("Represent the query")
    assert model.task_adapters["separation"].prompt == ""
    assert model.default_adapter == "text-matching"


def test_jina_v5_marks_queries_and_documents(made: Callable[[Any], Path]) -> None:
    model = info(made(jina_v5_tasks))
    assert set(model.adapters) == set(V5_TASKS)
    assert model.task_adapters["retrieval.query"] == TaskAdapter("retrieval", "Query: ")
    assert model.task_adapters["retrieval.passage"] == TaskAdapter("retrieval", "Document: ")
    assert model.task_adapters["clustering"] == TaskAdapter("clustering", "Document: ")
    assert model.default_adapter == "retrieval"


def test_the_default_is_the_users(made: Callable[[Any], Path]) -> None:
    assert info(made(jina_v3_tasks), jina_task="separation").default_adapter == "separation"
    assert info(made(jina_v3_tasks), jina_task=None).default_adapter is None
    assert info(made(jina_v5_tasks), jina_task="retrieval.query").default_adapter == "retrieval"
    with pytest.raises(
        ConfigError, match=r"jina_task 'cooking' is none of .*classification, retrieval\.passage"
    ):
        info(made(jina_v3_tasks), jina_task="cooking")


def test_a_checkpoint_saved_without_them_has_none(made: Callable[[Any], Path], tmp_path: Path) -> None:
    """Planted: config.json still names what the weights do not hold."""
    jina_v3_tasks(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({k: w for k, w in load_file(path).items() if ".0.lora_" not in k}, path, {"format": "pt"})
    model = info(tmp_path)
    assert (model.adapters, model.task_adapters, model.default_adapter) == ({}, {}, None)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [({"lora_adaptations": list(TASKS[:3])}, "two stacks of 3 tasks"), ({"lora_rank": 2}, "is of rank 4")],
)
def test_stacks_that_do_not_fit_are_refused(
    made: Callable[[Any], Path], overrides: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        info(made(jina_v3_tasks), **overrides)


def test_a_users_adapter_may_not_take_a_tasks_name(made: Callable[[Any], Path], tmp_path: Path) -> None:
    folder = made(jina_v5_tasks)
    modules = {"separation": str(folder / "adapters" / "retrieval")}
    config = EngineConfig(model=str(made(jina_v3_tasks)), cpu_workers=1, lora_modules=modules)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="a task of this model has its name already"):
        build(config)


def test_most_models_have_no_tasks(checkpoint: Callable[[str], Path]) -> None:
    model = info(checkpoint("bert"))
    assert (model.adapters, model.task_adapters, model.default_adapter) == ({}, {}, None)
