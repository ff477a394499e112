"""Building: a model as an engine has it, for tests that look at its inside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from carpool.engine.blueprint import Blueprint
from carpool.engine.build import Parts, build
from carpool.engine.config import EngineConfig
from carpool.engine.models.backbone import Backbone


def built(path: Path, **config: Any) -> Parts:
    """In float32 with one worker, unless told otherwise."""
    return build(EngineConfig(**{"model": str(path), "dtype": "float32", "cpu_workers": 1, **config}))


def backbone(parts: Parts) -> Backbone:
    return parts.runners[0]._backbone


def planned(config: EngineConfig, *devices: torch.device) -> Blueprint:
    """A blueprint of which nothing but these is looked at."""
    unread: Any = None
    return Blueprint(
        config=config,
        devices=devices,
        checkpoint=unread,
        pairing=unread,
        architecture=unread,
        dtype=torch.float32,
        max_model_len=1,
        notices=(),
    )
