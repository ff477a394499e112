"""Task adapters: those that a checkpoint itself brings, one a task.

    jina-embeddings-v3          stacks of all tasks beside each weight, `X.parametrizations.weight.0.lora_A` and `_B`
    jina-embeddings-v3-hf       a PEFT folder a task, `retrieval_query/`
    jina-embeddings-v5, others  a PEFT folder a task, `adapters/retrieval/`

A task is more than its adapter: it puts its instruction before the text, as the checkpoint's own code does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from carpool.engine.checkpoint import Checkpoint
from carpool.engine.errors import ConfigError
from carpool.engine.models.adapter import Adapter, read_peft, refusal
from carpool.engine.models.lora import Delta
from carpool.engine.models.weights import stored
from carpool.engine.params import TaskAdapter

_STACKS = re.compile(r".+\.parametrizations\.weight\.0\.lora_[AB]$")
_QUERY, _PASSAGE = "retrieval.query", "retrieval.passage"
# As jina-embeddings-v3's config.json has them; its conversion for transformers left them behind.
_V3_INSTRUCTIONS = {
    _QUERY: "Represent the query for retrieving evidence documents: ",
    _PASSAGE: "Represent the document for retrieval: ",
}
_V3_TASKS = (_QUERY, _PASSAGE, "separation", "classification", "text-matching")


@dataclass(frozen=True, slots=True)
class TaskAdapters:
    """`adapters` in the order of their slots; `tasks` by the name that requests use; `default` is an adapter's name."""

    adapters: tuple[Adapter, ...] = ()
    tasks: Mapping[str, TaskAdapter] = field(default_factory=dict)
    default: str | None = None


def read_task_adapters(checkpoint: Checkpoint) -> TaskAdapters:
    """What the checkpoint brings; nothing for nearly all."""
    config = checkpoint.config
    if config.get("lora_adaptations"):
        names = [str(name) for name in config["lora_adaptations"]]
        instructions = {**_V3_INSTRUCTIONS, **(config.get("task_instructions") or {})}
        tasks = {name: TaskAdapter(name, str(instructions.get(name, ""))) for name in names}
        adapters = _stacked(checkpoint, names)
        return _with_default(checkpoint, adapters, tasks if adapters else {}, "text-matching")
    if config.get("model_type") == "jina_embeddings_v3":
        folders = {name: checkpoint.path / re.sub("[.-]", "_", name) for name in _V3_TASKS}
        instructions = {**_V3_INSTRUCTIONS, **checkpoint.prompts}
        tasks = {name: TaskAdapter(name, instructions.get(name, "")) for name in _V3_TASKS}
        return _of_folders(checkpoint, folders, tasks, "text-matching")
    folders = {
        path.parent.name: path.parent for path in checkpoint.path.glob("adapters/*/adapter_config.json")
    }
    return _of_folders(checkpoint, dict(sorted(folders.items())), _v5_tasks(checkpoint, folders), "retrieval")


def _v5_tasks(checkpoint: Checkpoint, names: Mapping[str, Path]) -> dict[str, TaskAdapter]:
    """jina-embeddings-v5 marks every text as a document unless it is told that it is a query."""
    if checkpoint.dialect != "jina-v5":
        return {name: TaskAdapter(name, checkpoint.prompts.get(name, "")) for name in names}
    document = checkpoint.prompts.get("document", "Document: ")
    tasks = {name: TaskAdapter(name, document) for name in names}
    if "retrieval" in names:
        tasks[_QUERY] = TaskAdapter("retrieval", checkpoint.prompts.get("query", "Query: "))
        tasks[_PASSAGE] = TaskAdapter("retrieval", document)
    return tasks


def _of_folders(
    checkpoint: Checkpoint, folders: Mapping[str, Path], tasks: Mapping[str, TaskAdapter], default: str
) -> TaskAdapters:
    there = {name: folder for name, folder in folders.items() if (folder / "adapter_config.json").is_file()}
    adapters = tuple(read_peft(name, folder) for name, folder in there.items())
    offered = {name: task for name, task in tasks.items() if task.adapter in there}
    return _with_default(checkpoint, adapters, offered, default)


def _with_default(
    checkpoint: Checkpoint, adapters: tuple[Adapter, ...], tasks: Mapping[str, TaskAdapter], default: str
) -> TaskAdapters:
    """What rides where no task is named: `jina_task` of the overrides, whose null is the bare model, or `default`."""
    asked = checkpoint.config.get("jina_task", default if default in tasks else None)
    if not tasks or asked is None:
        return TaskAdapters(adapters, tasks)
    if asked not in tasks:
        raise ConfigError(f"jina_task {asked!r} is none of this model's tasks: {', '.join(sorted(tasks))}.")
    return TaskAdapters(adapters, tasks, tasks[asked].adapter)


def _stacked(checkpoint: Checkpoint, names: list[str]) -> tuple[Adapter, ...]:
    """Stacks [tasks, r, in] and [tasks, out, r]; of an embedding [tasks, ids, r] and [tasks, r, H].

    Nothing for a checkpoint that was saved merged, or before it had any.
    """
    tensors = stored(checkpoint.path, _STACKS)
    if not tensors:
        return ()
    rank = int(checkpoint.config.get("lora_rank") or 4)
    scaling = float(checkpoint.config.get("lora_alpha") or 1) / rank
    by_path: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        path, _, side = key.rpartition(".parametrizations.weight.0.lora_")
        by_path.setdefault(path, {})[side] = tensor
    deltas: list[dict[str, Delta]] = [{} for _ in names]
    for path, sides in by_path.items():
        a, b = sides.get("A"), sides.get("B")
        if a is None or b is None or len(a) != len(names) or len(b) != len(names):
            raise refusal(names[0], f"{path} does not have two stacks of {len(names)} tasks")
        table = path.endswith("embeddings")
        for i, own in enumerate(deltas):
            down, up = (a[i].T, b[i].T) if table else (a[i], b[i])
            if len(down) != rank or up.shape[1] != rank:
                raise refusal(names[i], f"{path} is of rank {len(down)}, and config.json says {rank}")
            own[path] = Delta(down.float(), up.float() * scaling)
    return tuple(Adapter(name, own) for name, own in zip(names, deltas, strict=True))
