"""The isolation probe finds planted leaks, and nothing where there is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from carpool.engine.build import Parts, build
from carpool.engine.config import EngineConfig
from carpool.engine.errors import ConfigError
from carpool.engine.models import attention
from carpool.engine.models.backbone import Backbone
from carpool.engine.models.probe import check_isolation
from carpool.engine.packing import PackedBatch
from carpool.kernels.reference import varlen_attention


def probe(backbone: Backbone, family: str, **options: Any) -> None:
    window = {"mistral": 8, "gemma2": 8, "modernbert": 8}.get(family)
    check_isolation(backbone, **{"vocab_size": 60, "max_model_len": 128, "window": window, **options})


def copy_of(parts: Callable[[str], Parts], family: str) -> Backbone:
    return parts(family).runners[0]._backbone.replica()


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("max_model_len", [1, 2, 128])
def test_every_family_passes(family: str, max_model_len: int, parts: Callable[[str], Parts]) -> None:
    probe(copy_of(parts, family), family, max_model_len=max_model_len)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_is_not_taken_for_a_leak(family: str, dtype: Any, checkpoint: Callable[[str], Path]) -> None:
    build(EngineConfig(model=str(checkpoint(family)), dtype=dtype, cpu_workers=1))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_attention_over_the_whole_row_is_found(
    family: str, parts: Callable[[str], Parts], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = varlen_attention

    def leaks(query: Tensor, key: Tensor, value: Tensor, runs: object, **options: Any) -> Tensor:
        return honest(query, key, value, [(len(query), 1)], **options)

    monkeypatch.setattr(attention, "varlen_attention", leaks)
    with pytest.raises(ConfigError, match="change each other's results"):
        probe(copy_of(parts, family), family)


@pytest.mark.parametrize("layer", range(2))
def test_a_leak_in_a_single_layer_is_found(
    layer: int, parts: Callable[[str], Parts], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = varlen_attention
    calls = 0

    def leaks(query: Tensor, key: Tensor, value: Tensor, runs: Any, **options: Any) -> Tensor:
        nonlocal calls
        calls += 1
        whole = [(len(query), 1)] if calls % 2 == layer else runs
        return honest(query, key, value, whole, **options)

    monkeypatch.setattr(attention, "varlen_attention", leaks)
    with pytest.raises(ConfigError):
        probe(copy_of(parts, "bert"), "bert")


@pytest.mark.parametrize("family", ["bert", "xlmr"])
def test_positions_that_run_on_into_the_next_text_are_found(
    family: str, parts: Callable[[str], Parts], monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = copy_of(parts, family)
    monkeypatch.setattr(Backbone, "_positions", lambda self, batch: torch.arange(batch.num_tokens) % 128)
    with pytest.raises(ConfigError):
        probe(backbone, family)


def test_a_token_that_sees_only_its_neighbours_last_is_found(
    parts: Callable[[str], Parts], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a convolution over the row would."""
    honest = Backbone.forward

    def leaks(self: Backbone, batch: PackedBatch) -> Tensor:
        hidden = honest(self, batch)
        return hidden + 0.3 * hidden.roll(1, 0).index_fill(0, torch.tensor([0]), 0)

    monkeypatch.setattr(Backbone, "forward", leaks)
    with pytest.raises(ConfigError):
        probe(copy_of(parts, "bert"), "bert")


def test_numbers_that_are_none_do_not_pass(
    parts: Callable[[str], Parts], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Backbone.forward
    monkeypatch.setattr(Backbone, "forward", lambda self, batch: honest(self, batch) * float("nan"))
    with pytest.raises(ConfigError):
        probe(copy_of(parts, "bert"), "bert")


def test_a_model_that_computes_its_own_attention_is_refused(checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match="MPNetModel cannot be served packed"):
        build(EngineConfig(model=str(checkpoint("mpnet")), cpu_workers=1))
