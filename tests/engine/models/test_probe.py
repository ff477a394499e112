"""The isolation probe finds planted leaks, and nothing where there is none."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from carpool.engine.build import Parts, build
from carpool.engine.config import EngineConfig
from carpool.engine.models import attention
from carpool.engine.models.backbone import Backbone
from carpool.engine.models.probe import Probe
from carpool.engine.packing import PackedBatch
from carpool.kernels.layout import Layout
from carpool.kernels.reference import varlen_attention

LEAK = "texts of one batch change each other's results"
WINDOWS = {"mistral": 8, "gemma2": 8, "modernbert": 8}


def fault(backbone: Backbone, family: str, max_model_len: int = 128) -> str:
    limits = [WINDOWS[family]] if family in WINDOWS else []
    return Probe(vocab_size=60, max_model_len=max_model_len, limits=limits).fault(backbone) or ""


@pytest.fixture(scope="module")
def parts(checkpoint: Callable[[str], Path]) -> Callable[[str], Parts]:
    """A family's model as it is loaded: it is probed before surgery."""

    @cache
    def built(family: str) -> Parts:
        config = EngineConfig(model=str(checkpoint(family)), cpu_workers=1, dtype="float32", surgery=False)
        return build(config)

    return built


def copy_of(parts: Callable[[str], Parts], family: str) -> Backbone:
    return parts(family).runners[0]._backbone.replica()


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("max_model_len", [1, 2, 128])
def test_every_family_passes(family: str, max_model_len: int, parts: Callable[[str], Parts]) -> None:
    assert not fault(copy_of(parts, family), family, max_model_len)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [(f, d) for f in tiny.FAMILIES for d in ("bfloat16", "float16") if (f, d) != ("gemma2", "float16")],
)
def test_rounding_is_not_taken_for_a_leak(family: str, dtype: Any, checkpoint: Callable[[str], Path]) -> None:
    model = build(EngineConfig(model=str(checkpoint(family)), dtype=dtype, cpu_workers=1)).model
    assert model.packing == "packed"


@pytest.mark.parametrize(
    ("limits", "lengths"),
    [((), [9, 100, 1, 30, 9, 24]), ((8,), [9, 16, 1, 30, 9, 24]), ((8, 300), [9, 16, 600, 1, 30, 9, 24]),
     ((4096,), [9, 100, 1, 30, 9, 24])],
)  # fmt: skip
def test_lengths_straddle_what_may_happen_beyond_a_limit(limits: tuple[int, ...], lengths: list[int]) -> None:
    """... unless that took minutes. Short texts stand on both sides of a long one."""
    probe = Probe(vocab_size=60, max_model_len=8192, limits=limits)
    assert [len(ids) for ids in probe.sequences] == lengths


# ── leaks ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_attention_over_the_whole_row_is_found(
    family: str, parts: Callable[[str], Parts], monkeypatch: pytest.MonkeyPatch
) -> None:
    def leaks(query: Tensor, key: Tensor, value: Tensor, row: Layout, **options: Any) -> Tensor:
        return varlen_attention(query, key, value, [(len(query), 1)], **options)

    monkeypatch.setattr(attention, "varlen_attention", leaks)
    assert LEAK in fault(copy_of(parts, family), family)


@pytest.mark.parametrize("layer", range(2))
def test_a_leak_in_a_single_layer_is_found(
    layer: int, parts: Callable[[str], Parts], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def leaks(query: Tensor, key: Tensor, value: Tensor, row: Layout, **options: Any) -> Tensor:
        nonlocal calls
        calls += 1
        whole = [(len(query), 1)] if calls % 2 == layer else row.runs
        return varlen_attention(query, key, value, whole, **options)

    monkeypatch.setattr(attention, "varlen_attention", leaks)
    assert LEAK in fault(copy_of(parts, "bert"), "bert")


@pytest.mark.parametrize("family", WINDOWS)
@pytest.mark.parametrize("side", [1, -1])
def test_a_leak_of_texts_longer_than_the_window_is_found(
    family: str, side: int, parts: Callable[[str], Parts], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Short texts are isolated; a long one sees the token beside it, behind or ahead."""

    def leaks(query: Tensor, key: Tensor, value: Tensor, row: Layout, **options: Any) -> Tensor:
        out = varlen_attention(query, key, value, row.runs, **options)
        lengths = torch.tensor([length for length, count in row.runs for _ in range(count)])
        ends = lengths.cumsum(0)
        at = torch.where(torch.tensor(side) > 0, ends - 1, ends - lengths)[lengths > WINDOWS[family]]
        at = at[(at + side >= 0) & (at + side < len(out))]
        out[at] += value[at + side].mean(1, keepdim=True)
        return out

    monkeypatch.setattr(attention, "varlen_attention", leaks)
    assert LEAK in fault(copy_of(parts, family), family)


@pytest.mark.parametrize("family", ["bert", "xlmr"])
def test_positions_that_run_on_into_the_next_text_are_found(
    family: str, parts: Callable[[str], Parts], monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = copy_of(parts, family)
    monkeypatch.setattr(Backbone, "_positions", lambda self, batch: torch.arange(batch.num_tokens) % 128)
    assert LEAK in fault(backbone, family)


def test_a_token_that_sees_only_its_neighbours_last_is_found(
    parts: Callable[[str], Parts], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a convolution over the row would."""
    honest = Backbone.forward

    def leaks(self: Backbone, batch: PackedBatch) -> Tensor:
        hidden = honest(self, batch)
        return hidden + 0.3 * hidden.roll(1, 0).index_fill(0, torch.tensor([0]), 0)

    monkeypatch.setattr(Backbone, "forward", leaks)
    assert LEAK in fault(copy_of(parts, "bert"), "bert")


# ── memory ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_result_that_changes_with_every_call_is_found(
    parts: Callable[[str], Parts], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Backbone.forward
    calls = 0

    def counts(self: Backbone, batch: PackedBatch) -> Tensor:
        nonlocal calls
        calls += 1
        return honest(self, batch) + 0.1 * calls

    monkeypatch.setattr(Backbone, "forward", counts)
    assert fault(copy_of(parts, "bert"), "bert")


def test_a_result_that_changes_with_the_longest_text_so_far_is_found(
    parts: Callable[[str], Parts], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once the longest was seen everything agrees with everything, and not with what was said before."""
    honest = Backbone.forward
    longest = 0

    def remembers(self: Backbone, batch: PackedBatch) -> Tensor:
        nonlocal longest
        longest = max(longest, batch.max_seqlen)
        return honest(self, batch) * (1 + longest / 100)

    monkeypatch.setattr(Backbone, "forward", remembers)
    assert "changes with what was asked before" in fault(copy_of(parts, "bert"), "bert")


# ── layers that go their own way ─────────────────────────────────────────────────────────────────────────────


class Deaf(nn.Module):
    """An attention layer of which no token hears another: nothing leaks, and nothing attends."""

    is_causal = False

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Linear(tiny.HIDDEN, tiny.HIDDEN)

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        return self.value(hidden), None


@pytest.mark.parametrize("layers", [[0], [1], [0, 1]])
def test_a_layer_that_does_not_ask_the_registry_is_found_though_nothing_leaks(
    layers: list[int], parts: Callable[[str], Parts]
) -> None:
    backbone = copy_of(parts, "bert")
    module: Any = backbone.module
    for i in layers:
        module.encoder.layer[i].attention.self = Deaf()
    assert "Deaf does not attend through transformers' attention registry" in fault(backbone, "bert")


def test_a_model_without_any_attention_is_found_though_nothing_leaks(parts: Callable[[str], Parts]) -> None:
    backbone = copy_of(parts, "bert")
    module: Any = backbone.module
    module.encoder.layer = nn.ModuleList()
    assert "the model does not attend" in fault(backbone, "bert")


# ── wrong in company and alone alike ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("drops", ["softcap", "window", "causal"])
def test_what_our_attention_leaves_out_of_account_is_found(
    drops: str, parts: Callable[[str], Parts], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgets(query: Tensor, key: Tensor, value: Tensor, row: Layout, **options: Any) -> Tensor:
        options[drops] = None
        return varlen_attention(query, key, value, row.runs, **options)

    monkeypatch.setattr(attention, "varlen_attention", forgets)
    assert "differ from those of transformers' own attention" in fault(copy_of(parts, "gemma2"), "gemma2")


def test_a_class_of_our_own_has_nothing_to_be_compared_with(parts: Callable[[str], Parts]) -> None:
    backbone = copy_of(parts, "bert")
    own = type("Bert", (type(backbone.module),), {"__module__": "carpool.engine.models.native.bert"})
    backbone.module.__class__ = own
    backbone.module.register_forward_hook(lambda module, given, output: _scaled(output))
    assert not fault(backbone, "bert")


def _scaled(output: Any) -> Any:
    output.last_hidden_state = output.last_hidden_state * (2 if attention._current.get() else 1)
    return output


def test_one_of_transformers_is_compared(parts: Callable[[str], Parts]) -> None:
    backbone = copy_of(parts, "bert")
    backbone.module.register_forward_hook(lambda module, given, output: _scaled(output))
    assert "(relative difference 1.0e+00)" in fault(backbone, "bert")


def test_the_model_is_left_as_it_was(parts: Callable[[str], Parts]) -> None:
    backbone = copy_of(parts, "gemma2")
    config: Any = backbone.module.config
    assert not fault(backbone, "gemma2")
    assert config._attn_implementation == attention.NAME


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_none_do_not_pass(
    number: float, parts: Callable[[str], Parts], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Backbone.forward
    monkeypatch.setattr(Backbone, "forward", lambda self, batch: honest(self, batch) * number)
    assert "computes in float32 is not finite" in fault(copy_of(parts, "bert"), "bert")


def test_a_model_that_tells_no_token_from_another_does_not_pass(parts: Callable[[str], Parts]) -> None:
    """Weights that were never written, as sparse files and broken downloads have them, are zeros."""
    backbone = copy_of(parts, "bert")
    for weight in backbone.module.parameters():
        weight.data = torch.zeros_like(weight)
    assert "makes the same of every token" in fault(backbone, "bert")


def test_what_raises_says_why_in_one_line(
    parts: Callable[[str], Parts], monkeypatch: pytest.MonkeyPatch
) -> None:
    def raises(self: Backbone, batch: PackedBatch) -> Tensor:
        raise RuntimeError("no kernel for this.\nSee the manual.")

    monkeypatch.setattr(Backbone, "forward", raises)
    assert fault(copy_of(parts, "bert"), "bert") == "no kernel for this"
