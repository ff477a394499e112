"""CLIP's and SigLIP's config.json: the text tower is found in it, whatever they leave out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from carpool.engine.build import build
from carpool.engine.config import EngineConfig
from carpool.engine.dialects import translate
from carpool.engine.params import TokenizationParams
from zoo.towers import MEMBERS


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            {"model_type": "clip", "projection_dim": 24, "text_config": {"hidden_size": 32}},
            {"hidden_size": 32, "vocab_size": 49408, "max_position_embeddings": 77,
             "output_projection": {"width": 24, "prefix": "text_projection.", "bias": False}},
        ),
        ({"model_type": "clip", "text_config": {}}, {"hidden_size": 512}),
        (
            {"model_type": "clip_text_model", "architectures": ["CLIPTextModelWithProjection"], "projection_dim": 24},
            {"output_projection": {"width": 24, "prefix": "text_projection.", "bias": False}},
        ),
        (
            {"model_type": "siglip", "text_config": {}},
            {"hidden_size": 768, "vocab_size": 32000, "max_position_embeddings": 64, "pads_prompts": True,
             "output_projection": {"width": 768, "prefix": "text_model.head.", "bias": True}},
        ),
        ({"model_type": "siglip", "text_config": {"projection_size": 24}},
         {"output_projection": {"width": 24, "prefix": "text_model.head.", "bias": True}}),
    ],
)  # fmt: skip
def test_the_text_tower_is_found(config: dict[str, Any], expected: dict[str, Any]) -> None:
    found, dialect = translate(config)
    assert dialect is not None
    assert {key: found[key] for key in expected} == expected
    assert found["pooling"] == "last"


def test_a_text_tower_alone_has_no_projection() -> None:
    found, _ = translate({"model_type": "clip_text_model", "architectures": ["CLIPTextModel"]})
    assert "output_projection" not in found


def test_siglip_fills_prompts_up_unless_it_is_told_not_to(tmp_path: Path) -> None:
    MEMBERS[1].make(tmp_path)
    tokenizer = build(EngineConfig(model=str(tmp_path), cpu_workers=1)).tokenizer
    (filled,) = tokenizer.prepare(["the cat"], TokenizationParams()).token_ids
    (short,) = tokenizer.prepare(["the cat"], TokenizationParams(padding="do_not_pad")).token_ids
    assert (len(filled), filled[: len(short)]) == (64, short)
    assert len(short) < 10
