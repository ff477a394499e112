"""A packed forward pass never makes the host wait for the device: lengths and bounds are the host's from the start.

There is no device here. What would wait on one is told by the operations that are called (tests/support/waiting.py).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import tiny
from carpool.engine.build import build
from carpool.engine.config import EngineConfig
from carpool.engine.models.backbone import Backbone
from carpool.engine.packing import PackedBatch, pack_ids
from carpool.kernels import ops
from carpool.kernels.attention import Place
from waiting import HostWaits, without_waiting
from zoo import MEMBERS

CPU = torch.device("cpu")
BARE = Place("cuda", (9, 0), None, "there is none", "there is none", "there is none")
FAMILIES = (*tiny.FAMILIES, "mpnet")
ZOO = (
    "sentence-transformers/sentence-t5-base",
    "google/umt5-base",
    "microsoft/deberta-v3-base",
    "microsoft/deberta-v2-xlarge",
    "microsoft/deberta-base-mnli",
    "jina-embeddings-v2-base-en",
    "junnyu/roformer_chinese_base",
    "google/rembert",
    "google/mobilebert-uncased",
    "LiquidAI/LFM2-350M",
    "google/gemma-3-270m",
    "openai-community/gpt2",
    "Alibaba-NLP/gte-base-en-v1.5",
    "nomic-ai/nomic-embed-text-v1",
    "jinaai/jina-embeddings-v3",
    "intfloat/multilingual-e5-base, adapted",
)


def batch(vocab_size: int, backbone: Backbone, adapters: list[int] | None = None) -> PackedBatch:
    generator = torch.Generator().manual_seed(5)
    ids = [torch.randint(5, vocab_size, (n,), generator=generator).tolist() for n in (3, 21, 21, 1)]
    several = getattr(backbone.module.config, "type_vocab_size", 0) > 1
    types = [None, 7, None, None] if several else None
    return pack_ids(ids, CPU, types, adapters, [2, None, None, None])


def runs_without_waiting(backbone: Backbone, row: PackedBatch) -> None:
    with torch.inference_mode():
        expected = backbone.forward(row)
        with without_waiting():
            out = backbone.forward(row)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_of_the_families(
    family: str, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EngineConfig(model=str(checkpoint(family)), dtype="float32", cpu_workers=1, surgery=False)
    parts = build(config)
    # By torch's own operations, which all show here.
    monkeypatch.setattr(ops, "place", lambda _: BARE)
    assert parts.model.packing == "packed"
    backbone = parts.runners[0]._backbone
    runs_without_waiting(backbone, batch(60, backbone))


@pytest.mark.parametrize("name", ZOO)
def test_of_the_zoo(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    member = next(member for member in MEMBERS if member.name == name)
    member.make(tmp_path)
    config = {"model": str(tmp_path), "dtype": "float32", "cpu_workers": 1, "surgery": False}
    parts = build(EngineConfig(**{**config, **member.options}))
    monkeypatch.setattr(ops, "place", lambda _: BARE)
    assert parts.model.packing == "packed"
    slots = [len(parts.model.adapters), 0, 1, 1] if parts.model.adapters else None
    backbone = parts.runners[0]._backbone
    runs_without_waiting(backbone, batch(40, backbone, slots))


# ── the guard guarded ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.numpy(),
        lambda x: int(x[0]),
        lambda x: bool((x > 0).all()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.where(x > 0),
        lambda x: x.masked_select(x > 0),
        lambda x: x.unique(),
        lambda x: x.bincount(),
        lambda x: torch.repeat_interleave(x, x),
        lambda x: x.index_put_((x > 0,), x[:3]),
        lambda x: torch.arange(x[2]),
        lambda x: torch.tensor([1, 2], device=x.device),
    ],
)
def test_what_waits_is_found(waits: Callable[[Tensor], object]) -> None:
    with pytest.raises(HostWaits), without_waiting():
        waits(torch.arange(4))


def test_what_does_not_wait_is_let_pass() -> None:
    x = torch.arange(4)
    with without_waiting():
        torch.repeat_interleave(x, x, output_size=6)
        x[torch.arange(2)].masked_fill(x[:2] > 0, 3)
        torch.where(x > 0, x, 0).cumsum(0).to(torch.float32).softmax(0)


def test_a_model_that_waits_is_found(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: positions found by a mask of bools."""
    config = EngineConfig(model=str(checkpoint("bert")), dtype="float32", cpu_workers=1, surgery=False)
    backbone = build(config).runners[0]._backbone
    monkeypatch.setattr(backbone, "_positions", lambda row: row.position_ids[row.input_ids >= 0])
    with pytest.raises(HostWaits, match="an index of bools"):
        runs_without_waiting(backbone, batch(60, backbone))
