"""Task names: what callers of the offline engine say, and the engine's tasks that they mean."""

from __future__ import annotations

from collections.abc import Mapping

from carpool.engine.errors import UnsupportedTask
from carpool.engine.model_info import ModelInfo, ScoreType
from carpool.engine.params import Task

# What `pooling_task` may say: the first of these that the model does.
_MEANINGS: Mapping[str, tuple[Task, ...]] = {
    "embed": ("embed",),
    "classify": ("classify",),
    "token_embed": ("token_embed",),
    "sparse_embed": ("sparse_embed",),
    "token_classify": ("token_classify",),
    "encode": ("token_embed", "token_classify"),  # the older name of both
    "reward": ("token_classify",),
    "score": ("classify",),  # until it got a method of its own
}
_API = {
    "embed": ("Embedding", "embed"),
    "token_embed": ("Embedding", "embed"),
    "classify": ("Classification", "classify"),
    "token_classify": ("Classification", "classify"),
    "reward": ("Reward", "reward"),
}
# What scores are made of.
TASK_OF_SCORES: Mapping[ScoreType, Task] = {
    "cross-encoder": "classify",
    "bi-encoder": "embed",
    "late-interaction": "token_embed",
    "listwise": "token_embed",
}
_PLUGIN = "No IOProcessor plugin installed. carpool has none: send texts or token ids."


def tasks_of(name: str | None, model: ModelInfo) -> tuple[Task, ...]:
    """The engine's tasks for what the caller named, joined by `&`; None is what the model is for."""
    if name is None:
        return (model.default_task,)
    parts = name.split("&") if isinstance(name, str) else [name]
    return tuple(dict.fromkeys(_task(part, model) for part in parts))


def _task(name: str, model: ModelInfo) -> Task:
    if name == "plugin":
        raise UnsupportedTask(_PLUGIN, "pooling_task")
    if not isinstance(name, str) or name not in _MEANINGS:
        raise UnsupportedTask(f"pooling_task={name!r} is not one of {', '.join(_MEANINGS)}.", "pooling_task")
    found = next((task for task in _MEANINGS[name] if task in model.tasks), None)
    if found is not None:
        return found
    if name in _API:
        api, convert = _API[name]
        raise UnsupportedTask(
            f"{api} API is not supported by this model. Try converting the model using `--convert {convert}`."
        )
    raise UnsupportedTask(
        f"Unsupported task: {name!r} Supported tasks: {', '.join(sorted(model.tasks))}.", "pooling_task"
    )
