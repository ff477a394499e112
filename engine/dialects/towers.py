"""Models of texts and images of which we serve the text side: CLIP, SigLIP.

Their config.json describes both towers; ours is `text_config`, with the layer behind it that leads into the space
that they share.
"""

from __future__ import annotations

from typing import Any

from carpool.engine.dialects.dialect import Config, Dialect


def _clip(config: Config) -> dict[str, Any]:
    text = dict(config.get("text_config") or config)
    projected = config.get("model_type") == "clip" or any(
        name.endswith("WithProjection") for name in config.get("architectures") or ()
    )
    # Published files leave out what is as in the first model.
    text = {"hidden_size": 512, "vocab_size": 49408, "max_position_embeddings": 77, **text}
    if projected:
        width = config.get("projection_dim") or text.get("projection_dim") or 512
        text["output_projection"] = {"width": width, "prefix": "text_projection.", "bias": False}
    return {**text, "model_type": "clip_text_model", "architectures": ["CLIPTextModel"], "pooling": "last"}


def _siglip(config: Config) -> dict[str, Any]:
    text = {"hidden_size": 768, "vocab_size": 32000, "max_position_embeddings": 64}
    text |= dict(config.get("text_config") or config)
    width = text.get("projection_size") or text["hidden_size"]
    return {
        **text,
        "model_type": "siglip_text_model",
        "architectures": ["SiglipTextModel"],
        "pooling": "last",
        "output_projection": {"width": width, "prefix": "text_model.head.", "bias": True},
        "pads_prompts": True,  # trained on rows of 64 only: the result is read off the last one, pad or not
    }


CLIP = Dialect("clip", lambda config: config.get("model_type") in ("clip", "clip_text_model"), _clip)
SIGLIP = Dialect(
    "siglip", lambda config: config.get("model_type") in ("siglip", "siglip_text_model"), _siglip
)
