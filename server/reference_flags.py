"""The reference's command line where ours differs: what is old, what is refused.

What has no meaning here stands in `engine/reference_options.py`. So a `vllm serve` command starts here
unchanged, or says in one sentence why it does not.
"""

from __future__ import annotations

from typing import Any

from carpool.engine.config import CONVERT_OF_TASK
from carpool.engine.errors import ConfigError

OLD_NAMES = {"override_pooler_config": "pooler_config"}
SHORT_NAMES = {"dp": "data_parallel_size"}
GENERATIVE = ("generate", "draft", "transcription")


def runner_and_convert(task: Any) -> dict[str, str]:
    """What the older `--task` asks for, in today's options."""
    refuse_generation("task", task)
    if task not in CONVERT_OF_TASK:
        raise ConfigError(f"--task must be one of {', '.join(CONVERT_OF_TASK)}, got {task}.")
    return {"runner": "pooling", "convert": CONVERT_OF_TASK[task]}


def refuse_generation(name: str, value: Any) -> None:
    if value in GENERATIVE:
        raise ConfigError(f"--{name} {value}: carpool serves pooling models only and generates no text.")
