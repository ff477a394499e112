"""What the reference's LLM has beside pooling, and what is done here instead."""

from __future__ import annotations

from collections.abc import Mapping

_NO_TEXT = "carpool runs pooling models and generates no text: try LLM.encode."
_WEIGHTS = "weights are read once: call LLM.close() and make another of the new folder."
_MEMORY = (
    "an LLM holds its weights as long as it lives: LLM.close() lets them go, and another reads them again."
)
_MODULES = "modules are exchanged for faster ones at load: ask transformers for the model, LLM.encode for its results."
_PROFILE = "no profiler is built in: py-spy or perf look at this process from outside."

ABSENT: Mapping[str, str] = {
    **dict.fromkeys(
        (
            "beam_search",
            "enqueue",
            "enqueue_chat",
            "get_default_sampling_params",
            "preprocess_chat",
            "wait_for_completion",
        ),
        _NO_TEXT,
    ),
    **dict.fromkeys(("apply_model", "collective_rpc"), _MODULES),
    **dict.fromkeys(
        ("llm_engine", "engine_class"), "there is one engine, and what is known of it is LLM.model_info."
    ),
    **dict.fromkeys(("sleep", "wake_up"), _MEMORY),
    **dict.fromkeys(("start_profile", "stop_profile"), _PROFILE),
    **dict.fromkeys(
        (
            "finish_weight_update",
            "init_weight_transfer_engine",
            "start_weight_update",
            "update_weights",
        ),
        _WEIGHTS,
    ),
    "get_metrics": "metrics are a server's, at GET /metrics; an LLM's answers say num_cached_tokens.",
    "reset_mm_cache": "prompts are texts or token ids, so nothing is kept of images.",
    "from_engine_args": "LLM takes the engine's options as keywords.",
    "set_tokenizer": "give it at the start: LLM(tokenizer=…).",
}
