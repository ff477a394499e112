"""The reference's command line where ours differs: what has another name, what is old, what is refused.

What carpool has no part for stands in `engine/reference_options.py`. So a `vllm serve` command starts here
unchanged, or says in one sentence why it does not.
"""

from __future__ import annotations

from typing import Any

from carpool.engine.config import CONVERT_OF_TASK
from carpool.engine.errors import ConfigError

OLD_NAMES = {"override_pooler_config": "pooler_config"}
OTHER_NAMES = {
    "ac": "attention_config",
    "api_server_count": "api_workers",
    "asc": "api_workers",
    "cc": "compilation_config",
    "dp": "data_parallel_size",
    "dpa": "data_parallel_address",
    "dpb": "data_parallel_backend",
    "dpe": "data_parallel_external_lb",
    "dph": "data_parallel_hybrid_lb",
    "dpl": "data_parallel_size_local",
    "dpm": "data_parallel_multi_port_external_lb",
    "dpn": "data_parallel_rank",
    "dpp": "data_parallel_rpc_port",
    "dpr": "data_parallel_start_rank",
    "ep": "enable_expert_parallel",
    "kv_cache_memory": "kv_cache_memory_bytes",
    "max_num_queued_tokens": "max_queued_tokens",
    "n": "nnodes",
    "o": "optimization_level",
    "q": "quantization",
    "r": "node_rank",
    "sc": "speculative_config",
}
# Switches that say the contrary of ours.
OPPOSITES = {"disable_fastapi_docs": "docs", "disable_uvicorn_access_log": "access_log"}
MODEL_KEYS = ("rope_scaling", "rope_theta")  # once flags, of keys of config.json
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
