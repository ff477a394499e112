"""InternLM2 is Llama under other names: its config.json differs in one key, its weights in all.

internlm/internlm2-1_8b-reward, -7b-reward, -20b-reward.
"""

from __future__ import annotations

from typing import Any

from carpool.engine.dialects.dialect import Config, Dialect


def _speaks(config: Config) -> bool:
    return config.get("model_type") == "internlm2"


def _translate(config: Config) -> dict[str, Any]:
    translated = {key: value for key, value in config.items() if key not in ("auto_map", "bias")}
    return {
        **translated,
        "model_type": "llama",
        "architectures": [
            name.replace("InternLM2", "Llama", 1) for name in config.get("architectures") or ()
        ],
        "attention_bias": bool(config.get("bias", True)),  # of wqkv and wo; the feed-forward layers have none
    }


INTERNLM2 = Dialect("internlm2", _speaks, _translate)
