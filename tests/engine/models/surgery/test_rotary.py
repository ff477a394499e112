"""Rotary positions: fused where halves are turned into each other; transformers' own function is left as it is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.cohere import modeling_cohere
from transformers.models.glm import modeling_glm
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.llama import modeling_llama
from transformers.models.modernbert import modeling_modernbert
from transformers.models.qwen3 import modeling_qwen3

from carpool.engine.build import build
from carpool.engine.config import EngineConfig
from carpool.engine.models.surgery import rotary
from carpool.engine.models.surgery.rehearsal import Rehearsal
from carpool.engine.models.surgery.rotary import rotate, turn
from carpool.kernels import native, native_rows
from carpool.kernels.launch import Launch
from emu.backend import Emulated

GENERATOR = torch.Generator().manual_seed(1)
Q, K = torch.randn(1, 4, 9, 16, generator=GENERATOR), torch.randn(1, 2, 9, 16, generator=GENERATOR)


def angles(size: int) -> tuple[Tensor, Tensor]:
    cos, sin = torch.randn(2, 1, 9, size, generator=torch.Generator().manual_seed(2))
    return cos, sin


@pytest.mark.parametrize(
    ("module", "size"),
    [(modeling_llama, 16), (modeling_modernbert, 16), (modeling_gpt_neox, 16), (modeling_gpt_neox, 8)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_says_what_transformers_function_says(module: Any, size: int, dtype: torch.dtype) -> None:
    cos, sin = (x.to(dtype) for x in angles(size))
    q, k = Q.to(dtype), K.to(dtype)
    bound = 1e-6 if dtype == torch.float32 else 2e-2
    for ours, theirs in zip(rotate(q, k, cos, sin), module.apply_rotary_pos_emb(q, k, cos, sin), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=bound, atol=bound)
    token_first = rotate(q.transpose(1, 2), k.transpose(1, 2), cos, sin, unsqueeze_dim=2)
    for ours, theirs in zip(token_first, rotate(q, k, cos, sin), strict=True):
        assert torch.equal(ours.transpose(1, 2), theirs)


@pytest.mark.skipif(native.library is None, reason="the native kernels were not built")
@pytest.mark.parametrize("size", [64, 32])
@pytest.mark.parametrize("heads_at", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_cpu_a_kernel_turns_heads_wherever_they_are(
    size: int, heads_at: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts of one product's rows, and each head's query and key beside each other, as GPT-NeoX has them."""
    calls = 0
    honest = native_rows.rotary

    def noted(*args: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return honest(*args)

    monkeypatch.setattr(native_rows, "rotary", noted)
    cos, sin = (x.to(dtype) for x in angles(size))
    joint = torch.randn(1, 9, 6 * 64, generator=torch.Generator().manual_seed(3)).to(dtype)
    bound = 1e-6 if dtype == torch.float32 else 2e-2
    beside = joint.view(1, 9, 3, 128).chunk(2, -1)
    for q, k in (joint[..., :256].view(1, 9, 4, 64), joint[..., 256:].view(1, 9, 2, 64)), beside:
        theirs = modeling_gpt_neox.apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        given = (q.transpose(1, 2), k.transpose(1, 2)) if heads_at == 1 else (q, k)
        for turned, expected in zip(rotate(*given, cos, sin, heads_at), theirs, strict=True):
            turned = turned if heads_at == 1 else turned.transpose(1, 2)
            torch.testing.assert_close(turned, expected, rtol=bound, atol=bound)
    assert calls == 4


@pytest.mark.parametrize("size", [16, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_device_a_kernel_turns_heads_where_they_are(
    size: int, dtype: torch.dtype, emulated: Emulated, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are parts of one product's rows, and nothing is copied before the kernel reads them."""
    launched: list[Launch] = []
    honest = emulated.run

    def run(launch: Launch) -> None:
        launched.append(launch)
        honest(launch)

    monkeypatch.setattr(emulated, "run", run)
    cos, sin = (x.to(dtype) for x in angles(size))
    joint = torch.randn(1, 9, 4 * 16 + 2 * 16, generator=torch.Generator().manual_seed(3)).to(dtype)
    q, k = joint[..., :64].view(1, 9, 4, 16), joint[..., 64:].view(1, 9, 2, 16)
    ours = rotate(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    theirs = modeling_gpt_neox.apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    bound = 1e-6 if dtype == torch.float32 else 2e-2
    for turned, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(turned, expected, rtol=bound, atol=bound)
        assert turned.transpose(1, 2).is_contiguous()
    for turned, expected in zip(rotate(q, k, cos, sin, unsqueeze_dim=2), ours, strict=True):
        assert torch.equal(turned, expected.transpose(1, 2))
    read = [x.data_ptr() for launch in launched if isinstance(x := launch.arguments[0], Tensor)]
    assert read == 2 * [q.data_ptr(), k.data_ptr()]


def one_head() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q and k of a single head, [1, 1, 9, 32] in rows of 64; torch gives that dimension the stride it likes."""
    joint = torch.randn(1, 9, 64, generator=torch.Generator().manual_seed(3))
    q, k = (x.unsqueeze(1) for x in joint.chunk(2, -1))
    assert q.movedim(1, 2).stride(2) != 32
    return q, k, *angles(32)


def test_on_a_device_one_head_has_no_gaps(emulated: Emulated, caplog: pytest.LogCaptureFixture) -> None:
    q, k, cos, sin = one_head()
    for turned, expected in zip(
        rotate(q, k, cos, sin), modeling_llama.apply_rotary_pos_emb(q, k, cos, sin), strict=True
    ):
        torch.testing.assert_close(turned, expected, rtol=1e-6, atol=1e-6)
    assert emulated.ran == {"rotary"}
    assert not caplog.records


@pytest.mark.skipif(native.library is None, reason="the native kernels were not built")
def test_on_a_cpu_one_head_has_no_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotary, "_rotate", None)  # torch's way is not taken
    q, k, cos, sin = one_head()
    for turned, expected in zip(
        rotate(q, k, cos, sin), modeling_llama.apply_rotary_pos_emb(q, k, cos, sin), strict=True
    ):
        torch.testing.assert_close(turned, expected, rtol=1e-6, atol=1e-6)


def test_on_a_device_heads_between_which_others_lie_are_brought_together(emulated: Emulated) -> None:
    """GPT-NeoX has each head's query, key and value beside each other."""
    cos, sin = angles(16)
    q, k, _ = torch.randn(1, 4, 9, 48, generator=torch.Generator().manual_seed(3)).chunk(3, -1)
    theirs = modeling_gpt_neox.apply_rotary_pos_emb(q, k, cos, sin)
    for turned, expected in zip(rotate(q, k, cos, sin), theirs, strict=True):
        torch.testing.assert_close(turned, expected, rtol=1e-6, atol=1e-6)
    assert emulated.ran == {"rotary"}


@pytest.mark.parametrize("module", [modeling_cohere, modeling_glm])
def test_neighbours_turned_into_each_other_are_another_convention(module: Any) -> None:
    assert not rotary._does_the_same(module.apply_rotary_pos_emb)


class Attention(nn.Module):
    """As transformers' files have it: the function is a global, and the class calls it."""

    def forward(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        return q.sum(1) + k.sum(1)


def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
    return CONVENTION(q, k, cos, sin)


CONVENTION: Callable[..., Any] = modeling_llama.apply_rotary_pos_emb


@pytest.fixture(autouse=True)
def fresh_classes() -> None:
    rotary._turned.cache_clear()


def turned(monkeypatch: pytest.MonkeyPatch, convention: Callable[..., Any]) -> tuple[Attention, bool]:
    monkeypatch.setitem(globals(), "CONVENTION", convention)
    attention = Attention()
    rehearsal = Rehearsal.of(attention, lambda: attention(Q, K, *angles(16)))
    return attention, turn("", attention, rehearsal)


def test_a_layer_gets_a_class_of_its_own_that_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    attention, done = turned(monkeypatch, modeling_llama.apply_rotary_pos_emb)
    assert done
    assert type(attention).__name__ == "Attention"
    assert isinstance(attention, Attention)
    expected = Attention()(Q, K, *angles(16))
    monkeypatch.setitem(globals(), "CONVENTION", None)  # nobody calls it any more
    torch.testing.assert_close(attention(Q, K, *angles(16)), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(copy.deepcopy(attention)(Q, K, *angles(16)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "convention", [modeling_glm.apply_rotary_pos_emb, lambda q, k, cos, sin: (q * cos, k * cos)]
)
def test_a_layer_of_another_convention_is_left(
    convention: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    attention, done = turned(monkeypatch, convention)
    assert not done
    assert type(attention) is Attention


def test_a_class_that_does_not_say_the_same_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotary, "_does_the_same", lambda function: True)
    attention, done = turned(monkeypatch, modeling_glm.apply_rotary_pos_emb)
    assert not done
    assert type(attention) is Attention


def test_transformers_own_classes_and_functions_stay_as_they_are(checkpoint: Callable[[str], Path]) -> None:
    """What else runs in this process, and a model served with --no-surgery, has nothing of it."""
    function, forward = modeling_qwen3.apply_rotary_pos_emb, modeling_qwen3.Qwen3Attention.forward
    parts = build(EngineConfig(model=str(checkpoint("qwen3")), dtype="float32", cpu_workers=1))
    assert parts.model.surgery["rotary"] == 2
    assert modeling_qwen3.apply_rotary_pos_emb is function
    assert modeling_qwen3.Qwen3Attention.forward is forward
    assert forward.__globals__[rotary.NAME] is function
