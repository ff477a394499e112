"""jina-embeddings-v5: one name for two backbones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny
from carpool.engine.build import build
from carpool.engine.checkpoint import Checkpoint
from carpool.engine.config import EngineConfig, PoolerConfig
from carpool.engine.errors import ConfigError
from zoo import decoders_translated as zoo


@pytest.mark.parametrize(
    ("make", "native"), [(zoo.jina_v5_small, "Qwen3Model"), (zoo.jina_v5_nano, "EuroBertModel")]
)
def test_its_keys_tell_which(make: Callable[[Path], Any], native: str, tmp_path: Path) -> None:
    make(tmp_path)
    checkpoint = Checkpoint.read(tmp_path, {}, PoolerConfig())
    assert (checkpoint.dialect, checkpoint.architectures, checkpoint.pooling) == (
        "jina-v5",
        (native,),
        ("last",),
    )
    assert checkpoint.config["task_names"][0] == "retrieval"  # who reads adapters needs them


def test_doubt_ends_in_a_refusal_and_not_in_nonsense(tmp_path: Path) -> None:
    """Planted: EuroBERT's weights without the keys that tell."""
    zoo.jina_v5_nano(tmp_path)
    tiny.edit_json(tmp_path / "config.json", clf_pooling=..., mask_token_id=...)
    with pytest.raises(ConfigError, match=r"lacks .* of the weights .*k_norm"):
        build(EngineConfig(model=str(tmp_path)))


def test_widths_are_those_it_was_trained_for(tmp_path: Path) -> None:
    zoo.jina_v5_small(tmp_path)
    assert Checkpoint.read(tmp_path, {}, PoolerConfig()).matryoshka.allowed == (8, 16, 32)
