"""The reference's command line where ours differs: what has another name, what is old, what is refused.

What carpool has no part for stands in `engine/reference_options.py`. So a `vllm serve` command starts here
unchanged, or says in one sentence why it does not; and so do the options of `text-embeddings-router` and of
`infinity_emb`.
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
    "batch_size": "max_num_seqs",
    "cc": "compilation_config",
    "cors_allow_origin": "allowed_origins",
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
    "hostname": "host",
    "huggingface_hub_cache": "download_dir",
    "kv_cache_memory": "kv_cache_memory_bytes",
    "max_batch_requests": "max_num_seqs",
    "max_batch_tokens": "max_num_batched_tokens",
    "max_num_queued_tokens": "max_queued_tokens",
    "model_id": "model",
    "n": "nnodes",
    "o": "optimization_level",
    "p": "port",
    "payload_limit": "max_body_size",
    "proxy_root_path": "root_path",
    "q": "quantization",
    "r": "node_rank",
    "sc": "speculative_config",
    "url_prefix": "root_path",
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
