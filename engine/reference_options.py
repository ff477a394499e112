"""Options of the reference that decide nothing here: taken from its scripts and command lines, with one notice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from carpool.engine.errors import ConfigError

# Name → whether a value follows. carpool decides these itself, always does them, or has nothing they change.
WITHOUT_MEANING: Mapping[str, bool] = {
    **dict.fromkeys(
        (
            "async_scheduling",
            "disable_cascade_attn",
            "disable_custom_all_reduce",
            "disable_fastapi_docs",
            "disable_frontend_multiprocessing",
            "disable_hybrid_kv_cache_manager",
            "disable_log_requests",
            "disable_log_stats",
            "disable_uvicorn_access_log",
            "enable_flash_late_interaction",
            "enable_force_include_usage",
            "enable_log_requests",
            "enable_lora",
            "enable_lora_bias",
            "enable_request_id_headers",
            "enable_server_load_tracking",
            "enforce_eager",
            "fully_sharded_loras",
            "log_error_stack",
            "use_tqdm_on_load",
        ),
        False,
    ),
    **dict.fromkeys(
        (
            "code_revision",
            "compilation_config",
            "config_format",
            "cpu_offload_gb",
            "disable_access_log_for_endpoints",
            "distributed_executor_backend",
            "generation_config",
            "h11_max_header_count",
            "h11_max_incomplete_event_size",
            "kv_cache_dtype",
            "limit_mm_per_prompt",
            "load_format",
            "lora_dtype",
            "lora_extra_vocab_size",
            "max_cpu_loras",
            "max_log_len",
            "max_logprobs",
            "max_lora_cls_labels",
            "max_lora_rank",
            "max_loras",
            "max_parallel_loading_workers",
            "mm_processor_cache_gb",
            "model_impl",
            "num_gpu_blocks_override",
            "prefix_caching_hash_algo",
            "renderer_num_workers",
            "scheduling_policy",
            "seed",
            "swap_space",
            "tokenizer_mode",
            "uvicorn_log_level",
        ),
        True,
    ),
}
ONE_ONLY = {
    "tensor_parallel_size": "tensor_parallel_size",
    "tp": "tensor_parallel_size",
    "pipeline_parallel_size": "pipeline_parallel_size",
    "pp": "pipeline_parallel_size",
}


def require_one(name: str, value: Any) -> None:
    """Refuse a model that is to be split."""
    if str(value) != "1":
        flag = "--" + ONE_ONLY[name].replace("_", "-")
        raise ConfigError(f"{flag} must be 1, got {value}: a model is not split over devices here.")
