"""Rehearsal: what is seen of a forward pass, and that replaying it disturbs nothing."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from carpool.engine.models.surgery.rehearsal import Rehearsal, small_batch, submodule

X = torch.randn(1, 7, 16, generator=torch.Generator().manual_seed(1))


class Writes(nn.Module):
    """Scribbles over its input."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16)

    def forward(self, x: Tensor, *, factor: float = 1.0) -> tuple[Tensor, None]:
        return self.inner(x.mul_(2)) * factor, None


@torch.no_grad()
def test_a_module_is_played_on_what_it_was_given_as_often_as_one_likes() -> None:
    model = nn.Sequential(Writes())
    seen = Rehearsal.of(model, lambda: model[0](X.clone(), factor=3.0))
    once = seen.play("0", model[0])
    assert torch.equal(seen.play("0", model[0]), once)


@torch.no_grad()
def test_a_change_that_changes_the_answer_is_undone() -> None:
    writes = Writes()
    inner = writes.inner
    seen = Rehearsal.of(writes, lambda: writes(X.clone()))
    assert not seen.swap("", writes, {"inner": nn.Linear(16, 16)})
    assert not seen.swap("", writes, {"inner": nn.Linear(8, 16)})  # which raises
    assert not seen.swap("never called", writes, {"inner": inner})
    assert writes.inner is inner
    assert seen.swap("", writes, {"inner": nn.Sequential(inner)})


def test_watching_ends_with_the_rehearsal_also_where_it_fails() -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    with pytest.raises(RuntimeError):
        Rehearsal.of(model, lambda: model(X[..., :3]))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_it_keeps_no_module_alive() -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    seen = Rehearsal.of(model, lambda: model(X))
    weight = weakref.ref(model[0].weight)
    model[0] = nn.Identity()
    gc.collect()
    assert weight() is None
    assert seen.heard


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x) + self.b(x)
        out: Tensor = self.c(y) + self.d(x)
        return out


def test_choirs_are_layers_called_one_after_the_other_with_one_input() -> None:
    model = Layers()
    assert list(Rehearsal.of(model, lambda: model(X)).choirs()) == [("a", "b")]


def test_layers_that_are_not_always_called_together_are_none() -> None:
    model = Layers()
    assert list(Rehearsal.of(model, lambda: (model(X), model.a(X))).choirs()) == []


def test_a_module_that_was_replaced_with_its_parent_is_gone() -> None:
    child = nn.Identity()
    model = nn.Sequential(nn.Sequential(child))
    assert submodule(model, "0.0") is child
    model[0] = nn.Identity()
    assert submodule(model, "0.0") is None


def test_the_small_batch_fits_every_vocabulary() -> None:
    batch = small_batch(4, torch.device("cpu"))
    assert batch.num_tokens == 8
    assert int(batch.input_ids.max()) < 4
