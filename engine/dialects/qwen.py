"""Qwen with code of its own.

Qwen3 that looks both ways, pooled by the mean: voyageai/voyage-4-nano, perplexity-ai/pplx-embed-v1-*.
Qwen2 whose code computes what transformers' does: Qwen2.5-Math-RM and -PRM, gte-Qwen2-*-instruct (`is_causal: false`).
"""

from __future__ import annotations

from typing import Any

from carpool.engine.dialects.dialect import Config, Dialect
from carpool.engine.errors import ConfigError

_VOYAGE = ("VoyageQwen3BidirectionalEmbedModel", "Qwen3BidirectionalModel")


def _speaks(config: Config) -> bool:
    if config.get("model_type") == "bidirectional_pplx_qwen3":
        return True
    return config.get("model_type") == "qwen3" and (
        bool(config.get("use_bidirectional_attention")) or _is_voyage(config)
    )


def _translate(config: Config) -> dict[str, Any]:
    translated = {key: value for key, value in config.items() if key != "auto_map"}
    translated |= {"model_type": "qwen3", "is_causal": False}
    if any(name.endswith("ForSequenceClassification") for name in config.get("architectures") or ()):
        return translated
    translated |= {"architectures": ["Qwen3Model"], "pooling": "mean"}
    if config["model_type"] == "qwen3":  # with a linear layer behind it, as wide as it is said to have labels
        width = translated.pop("num_labels", None) or len(translated.pop("id2label", None) or ())
        translated.pop("label2id", None)
        if not width and _is_voyage(config):
            raise ConfigError(
                "config.json does not say how wide this model's embeddings are: name it with "
                """--hf-overrides '{"num_labels": 2048}'."""
            )
        if width:
            translated["output_projection"] = {"width": int(width), "prefix": "linear.", "bias": False}
    return translated


def _is_voyage(config: Config) -> bool:
    return any(name in _VOYAGE for name in config.get("architectures") or ()) or any(
        str(code).rpartition(".")[2] in _VOYAGE for code in dict(config.get("auto_map") or {}).values()
    )


BIDIRECTIONAL_QWEN3 = Dialect("qwen3-bidirectional", _speaks, _translate)


def _files(config: Config) -> set[str]:
    """Of code, that config.json names."""
    return {str(name).partition(".")[0] for name in dict(config.get("auto_map") or {}).values()}


def _is_plain(config: Config) -> bool:
    return config.get("model_type") == "qwen2" and bool(
        _files(config) & {"modeling_qwen", "modeling_qwen2_rm"}
    )


def _without_code(config: Config) -> dict[str, Any]:
    # The embedding models' code looks both ways unless it is told otherwise.
    own = {"is_causal": False} if "modeling_qwen" in _files(config) else {}
    return {**own, **{key: value for key, value in config.items() if key != "auto_map"}}


PLAIN_QWEN2 = Dialect("qwen2", _is_plain, _without_code)
