"""Joint linear layers: one product for all that read the same input, and a refusal wherever they do not quite."""

from __future__ import annotations

import copy
import gc
import threading
import traceback
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from carpool.engine.models.surgery import swap_modules
from carpool.engine.models.surgery.joint_linear import FirstLinear, NextLinear, joined
from carpool.engine.models.surgery.rehearsal import Rehearsal

X = torch.randn(1, 7, 16, generator=torch.Generator().manual_seed(1))


class Attention(nn.Module):
    """Grouped heads: query is wider than key and value."""

    def __init__(self, biases: tuple[bool, bool, bool] = (True, True, True)) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Linear(16, width, bias=bias) for width, bias in zip((24, 8, 8), biases, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return torch.cat((q, k * 2, v * 3), -1)


class ValueFirst(Attention):
    def forward(self, x: Tensor) -> Tensor:
        v, q, k = self.v_proj(x), self.q_proj(x), self.k_proj(x)
        return torch.cat((q, k * 2, v * 3), -1)


class OtherInput(Attention):
    """Key reads something equal, and yet another tensor."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.q_proj(x), self.k_proj(x.clone()), self.v_proj(x)), -1)


class QueryTwice(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return torch.cat((q + self.q_proj(x.flip(1)), k, v), -1)


class PastTheLayer(Attention):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.k_proj.weight.sum()


class Subclass(Attention):
    def __init__(self) -> None:
        super().__init__()

        class Doubled(nn.Linear):
            def forward(self, input: Tensor) -> Tensor:
                return 2 * super().forward(input)

        self.k_proj = Doubled(16, 8)


def operated(module: nn.Module, x: Tensor = X) -> tuple[Tensor, int]:
    """Seed the module and swap; what it said before, and how many groups were joined."""
    tiny.inflate(module)
    module.eval().requires_grad_(False)
    expected = module(x)
    rehearsal = Rehearsal.of(module, lambda: module(x))
    return expected, swap_modules(module, rehearsal)["joint_linear"]


@pytest.mark.parametrize("biases", [(True, True, True), (False, False, False), (True, False, True)])
@pytest.mark.parametrize("kind", [Attention, ValueFirst])
def test_layers_that_read_one_input_become_one(
    kind: type[Attention], biases: tuple[bool, bool, bool]
) -> None:
    module = kind(biases)
    weights = [module.q_proj.weight, module.k_proj.weight, module.v_proj.weight]
    expected, joint = operated(module)
    assert joint == 1
    assert sum(isinstance(child, FirstLinear) for child in module.children()) == 1
    assert sum(isinstance(child, NextLinear) for child in module.children()) == 2
    torch.testing.assert_close(module(X), expected, rtol=1e-6, atol=1e-6)
    assert sum(p.numel() for p in module.parameters() if p.ndim == 2) == sum(map(torch.numel, weights))


@pytest.mark.parametrize("kind", [OtherInput, QueryTwice, PastTheLayer])
def test_layers_that_do_not_are_left_alone(kind: type[Attention]) -> None:
    module = kind()
    before = list(module.children())
    expected, joint = operated(module)
    assert joint == 0
    assert list(module.children()) == before
    assert torch.equal(module(X), expected)


def test_a_subclass_of_linear_computes_something_more_and_stays() -> None:
    module = Subclass()
    own = module.k_proj
    expected, _ = operated(module)
    assert module.k_proj is own
    torch.testing.assert_close(module(X), expected, rtol=1e-6, atol=1e-6)


def test_layers_of_shared_modules_that_are_called_again_and_again() -> None:
    """ALBERT's layers are all the same module."""

    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Attention()
            self.back = nn.Linear(40, 16)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = self.back(self.attention(x))
            return x

    module = Again()
    expected, joint = operated(module)
    assert joint == 1
    torch.testing.assert_close(module(X), expected, rtol=1e-5, atol=1e-5)


def made() -> Attention:
    module = Attention()
    assert operated(module)[1] == 1
    return module


@pytest.mark.parametrize(
    "wrong",
    [
        lambda m: m.k_proj(X),  # before the first
        lambda m: (m.q_proj(X), m.v_proj(X)),  # out of turn
        lambda m: (m.q_proj(X), m.k_proj(X.clone())),  # another input
        lambda m: (m.q_proj(X), m.k_proj(X), m.k_proj(X)),  # twice
        lambda m: (m.q_proj(X), copy.deepcopy(m).k_proj(X)),  # another replica's
    ],
)
def test_another_order_than_at_load_is_an_error_and_no_number(wrong: Callable[[Attention], object]) -> None:
    module = made()
    with pytest.raises(RuntimeError, match="another order than at load"):
        wrong(module)
    module(X)  # and nothing is left of it
    assert not vars(X)


def test_nothing_is_kept_after_the_last_layer() -> None:
    module = made()
    module(X)
    assert not vars(X)


def test_nothing_is_kept_of_a_batch_that_failed_half_way() -> None:
    """Its halves, run next, are to have the room."""
    module = made()
    held: list[weakref.ref[Tensor]] = []

    def fails(x: Tensor) -> None:
        module.q_proj(x)
        held.extend(weakref.ref(one) for one in gc.get_objects() if type(one) is Tensor and one._is_view())
        raise torch.OutOfMemoryError("in between")

    before = {id(one) for one in gc.get_objects() if type(one) is Tensor and one._is_view()}
    try:
        fails(X.clone())
    except torch.OutOfMemoryError as error:
        traceback.clear_frames(error.__traceback__)
    left = [view for one in held if (view := one()) is not None and id(view) not in before]
    assert len(held) >= len(before) + 2, "key and value were there"
    assert not left


def test_each_thread_has_its_own() -> None:
    """Two threads in step: each is between query and key when the other one is."""
    one = made()
    two = copy.deepcopy(one, {id(weight): weight for weight in one.parameters()})
    inputs = {one: X, two: X + 1}
    expected = {module: module(x) for module, x in inputs.items()}
    step, results = threading.Barrier(2), {}

    def run(module: Attention) -> None:
        x = inputs[module]
        q = module.q_proj(x)
        step.wait()
        k = module.k_proj(x)
        step.wait()
        results[module] = torch.cat((q, k * 2, module.v_proj(x) * 3), -1)

    threads = [threading.Thread(target=run, args=(module,)) for module in inputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for module in inputs:
        torch.testing.assert_close(results[module], expected[module])


def test_a_copy_is_a_replica_of_its_own_over_the_same_weights() -> None:
    one = made()
    two = copy.deepcopy(one, {id(weight): weight for weight in one.parameters()})
    following: Any = two.k_proj
    assert following.first is two.q_proj
    assert two.q_proj is not one.q_proj
    assert [id(weight) for weight in one.parameters()] == [id(weight) for weight in two.parameters()]
    assert torch.equal(two(X), one(X))


def test_the_weights_are_one_below_the_other() -> None:
    layers = [nn.Linear(4, 2), nn.Linear(4, 3, bias=False)]
    linear = joined(layers)
    assert torch.equal(linear.weight, torch.cat([layer.weight for layer in layers]))
    assert torch.equal(linear.bias, torch.cat([layers[0].bias, torch.zeros(3)]))
