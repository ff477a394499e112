"""Whose prompts can be run in parts: who can is found fit, who cannot is not, and planted faults are found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flash
import tiny
from carpool.engine.build import Parts, build
from carpool.engine.cache.storage import Storage
from carpool.engine.config import EngineConfig
from carpool.engine.models import attention
from carpool.engine.models.backbone import Backbone
from carpool.engine.models.paged import (
    CannotPage,
    number_layers,
    pageable_layers,
    paged_attention_chosen,
)
from carpool.engine.packing import PackedBatch
from carpool.kernels import native, ops, varlen
from carpool.kernels.attention import Place
from zoo import MEMBERS

CAUSAL = ("qwen2", "qwen3", "mistral", "gemma2")
BARE = Place(
    "cuda", (9, 0), None, "CuPy is not installed: pip install it", None, "has not been tried on pages"
)
CHUNKS = "comes out otherwise in chunks"
BEHIND = "comes out otherwise behind another's beginning"


def fault(backbone: Backbone, max_model_len: int = 128, block_size: int = 16) -> str | None:
    """Why it cannot be, None if it can."""
    try:
        pageable_layers(
            backbone, vocab_size=60, max_model_len=max_model_len, block_size=block_size, limits=[8]
        )
    except CannotPage as why:
        return str(why)
    return None


def copy_of(parts: Callable[[str], Parts], family: str) -> Backbone:
    return parts(family).runners[0]._backbone.replica()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_those_that_look_back_only_can(family: str, parts: Callable[[str], Parts]) -> None:
    found = fault(copy_of(parts, family))
    assert found is None if family in CAUSAL else found is not None and found.endswith("looks ahead")


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_is_not_taken_for_a_fault(
    family: str, dtype: Any, checkpoint: Callable[[str], Path]
) -> None:
    if (family, dtype) == ("gemma2", "float16"):
        pytest.skip("Gemma 2 overflows in float16, and is not run in it")
    built = build(EngineConfig(model=str(checkpoint(family)), dtype=dtype, cpu_workers=1))
    assert fault(built.runners[0]._backbone) is None


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("google/gemma-3-270m", None),
        ("openai-community/gpt2", None),
        ("microsoft/Phi-3-mini-4k-instruct", None),
        ("Qwen2 with windows in its upper layers", None),
        ("sentence-transformers/paraphrase-albert-small-v2", "one layer attends more than once"),
        ("sentence-transformers/sentence-t5-base", "looks ahead"),
        ("google/embeddinggemma-300m", "looks ahead"),
    ],
)
def test_families_of_the_zoo(name: str, why: str | None, tmp_path: Path) -> None:
    next(member for member in MEMBERS if member.name == name).make(tmp_path)
    built = build(EngineConfig(model=str(tmp_path), dtype="float32", cpu_workers=1))
    found = fault(built.runners[0]._backbone)
    assert found is None if why is None else found is not None and why in found


@pytest.mark.parametrize(
    ("max_model_len", "found"),
    [(1, "no prompt is longer than a block of 16 tokens"), (16, "no prompt is longer than a block of 16 tokens"),
     (17, None), (33, None)],
)  # fmt: skip
def test_however_short_prompts_are(
    max_model_len: int, found: str | None, parts: Callable[[str], Parts]
) -> None:
    assert fault(copy_of(parts, "qwen3"), max_model_len) == found


@pytest.mark.parametrize("block_size", [1, 5, 64])
def test_whatever_a_block_holds(block_size: int, parts: Callable[[str], Parts]) -> None:
    assert fault(copy_of(parts, "mistral"), block_size=block_size) is None


# ── layers ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("family", CAUSAL)
def test_every_layer_that_attends_has_its_number_and_copies_have_it_too(
    family: str, parts: Callable[[str], Parts]
) -> None:
    backbone = copy_of(parts, family)
    kept = number_layers(backbone)
    assert [(layer.heads, layer.size, layer.dtype) for layer in kept] == [(2, 8, torch.float32)] * 2
    for one in (backbone, backbone.replica()):
        numbers = [getattr(layer, attention.NUMBER, None) for layer in one.module.modules()]
        assert [number for number in numbers if number is not None] == [0, 1]


class Attending(Backbone):
    """Two layers that ask for what they are told to, `times` each."""

    def __init__(self, times: int = 1, **asked: Any) -> None:
        self.module = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self._times, self._asked = times, asked

    def forward(self, batch: PackedBatch) -> Tensor:
        x = torch.ones(1, 2, batch.num_tokens, 8)
        with attention.layout(batch):
            for layer in self.module.children():
                for _ in range(self._times):
                    attention.packed_attention(layer, x, x, x, None, **self._asked)
        return x[0, 0]


@pytest.mark.parametrize(
    ("backbone", "why"),
    [
        (Attending(times=0), "no layer attends"),
        (Attending(times=2), "one layer attends more than once"),
        (Attending(is_causal=False), "Linear looks ahead"),
        (Attending(position_bias=torch.ones(2, 3)), "Linear minds distances"),
    ],
)
def test_what_cannot_be_kept_is_said(backbone: Backbone, why: str) -> None:
    with pytest.raises(CannotPage, match=why):
        number_layers(backbone)
    assert fault(backbone) == why


def test_who_is_padded_cannot(parts: Callable[[str], Parts]) -> None:
    backbone = copy_of(parts, "qwen3")
    backbone.packing = "padded"
    assert fault(backbone) == "it is not packed"


@pytest.mark.parametrize("block_size", [1, 16])
def test_what_serves_attention_to_what_is_kept_is_said(
    block_size: int, parts: Callable[[str], Parts], monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = copy_of(parts, "gemma2")
    storage = Storage.of(number_layers(backbone), 2, block_size, torch.device("cpu"))
    (choice,) = set(paged_attention_chosen(backbone, storage).elements())
    assert choice.by == "torch"
    assert "heads of 8" in str(choice) or native.library is None
    monkeypatch.setattr(ops, "place", lambda _: BARE)
    monkeypatch.setattr(varlen, "implementation", lambda: flash.varlen_attn)
    made = paged_attention_chosen(backbone, storage)
    assert sum(made.values()) == 2
    (choice,) = made
    assert choice.by == "gather"
    assert choice.notice is not None


# ── planted faults ───────────────────────────────────────────────────────────────────────────────────────────


def test_a_token_that_hears_of_the_one_before_past_attention_is_found(
    parts: Callable[[str], Parts], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a convolution would, which minds where sequences begin and knows nothing of parts."""
    honest = Backbone.forward

    def convolves(self: Backbone, batch: PackedBatch) -> Tensor:
        hidden = honest(self, batch)
        begins = batch.cu_seqlens[:-1].long()
        return hidden + 0.3 * hidden.roll(1, 0).index_fill(0, begins, 0)

    monkeypatch.setattr(Backbone, "forward", convolves)
    assert CHUNKS in (fault(copy_of(parts, "qwen3")) or "")


def test_positions_that_begin_anew_with_every_part_are_found(
    parts: Callable[[str], Parts], monkeypatch: pytest.MonkeyPatch
) -> None:
    def anew(self: Backbone, batch: PackedBatch) -> Tensor:
        return torch.cat([torch.arange(length) for length in batch.lengths])

    monkeypatch.setattr(Backbone, "_positions", anew)
    assert CHUNKS in (fault(copy_of(parts, "qwen3")) or "")


def test_keys_that_are_not_written_are_found(
    parts: Callable[[str], Parts], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "kv_write", lambda *_: None)
    assert CHUNKS in (fault(copy_of(parts, "qwen3")) or "")


def test_keys_that_are_written_after_others_have_read_are_found(
    parts: Callable[[str], Parts], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only those of the same batch: a prompt alone finds what its own chunks wrote before."""

    def late(keys: Tensor, values: Tensor, slots: Tensor, *pages: Tensor) -> None:
        kept = attention.under_way().kept
        assert kept is not None
        first = 0 if kept.past is None else kept.past.start
        ops.kv_write(keys[first:], values[first:], slots[first:], *pages)

    monkeypatch.setattr(attention, "kv_write", late)
    assert BEHIND in (fault(copy_of(parts, "qwen3")) or "")


@pytest.mark.parametrize(
    ("family", "forgets"), [("mistral", "window"), ("gemma2", "window"), ("gemma2", "softcap")]
)
def test_what_a_layer_asks_for_and_does_not_get_over_pages_is_found(
    family: str, forgets: str, parts: Callable[[str], Parts], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgetful(*args: Any, **kind: Any) -> Tensor:
        return ops.paged_attention(*args, **{**kind, forgets: None})

    monkeypatch.setattr(attention, "paged_attention", forgetful)
    assert CHUNKS in (fault(copy_of(parts, family)) or "")


def test_a_model_that_raises_cannot(parts: Callable[[str], Parts], monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("no such kernel.\nmore")

    monkeypatch.setattr(attention, "paged_attention", breaks)
    assert fault(copy_of(parts, "qwen3")) == "no such kernel"
