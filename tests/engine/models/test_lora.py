"""LoRA layers: each row gets its own adapter's delta, exactly, and nothing gets any where none rides."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from carpool.engine.models.lora import (
    Delta,
    LoraEmbedding,
    LoraLinear,
    attach,
    base_layer,
    idle_layers,
    merge,
    riding,
    segments,
    weight_shape,
)
from carpool.engine.models.surgery.leaves import replace_linears
from carpool.engine.models.surgery.packed_linear import packed
from carpool.engine.models.surgery.rehearsal import Rehearsal

WIDE, NARROW = 12, 8  # in, out
SLOTS, LENGTHS = [1, 0, 0, 2, 3, 1], [3, 1, 4, 2, 5, 2]


def delta(out: int, inner: int, rank: int, seed: int) -> Delta:
    generator = torch.Generator().manual_seed(seed)
    return Delta(
        torch.randn(rank, inner, generator=generator), 0.3 * torch.randn(out, rank, generator=generator)
    )


def truth(layer: nn.Module, deltas: dict[int, Delta], x: Tensor) -> Tensor:
    """Every sequence through a layer of its own, into which its adapter was merged."""
    rows = []
    for slot, own in zip(SLOTS, torch.split(x, LENGTHS), strict=True):
        merged = copy.deepcopy(layer)
        if slot in deltas:
            merge(merged, deltas[slot])
        rows.append(merged(own))
    return torch.cat(rows)


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D, nn.Embedding])
@torch.no_grad()
def test_each_row_gets_its_own_adapter(kind: type) -> None:
    """Ranks differ; the adapter in slot 2 has nothing for this layer."""
    torch.manual_seed(0)
    layer = Conv1D(NARROW, WIDE) if kind is Conv1D else kind(WIDE, NARROW)
    shape = weight_shape(layer)
    assert shape == (NARROW, WIDE)
    deltas = {1: delta(*shape, 4, 1), 3: delta(*shape, 2, 3)}
    total = sum(LENGTHS)
    x = torch.randint(WIDE, (total,)) if kind is nn.Embedding else torch.randn(total, WIDE)
    expected = truth(layer, deltas, x)
    model = nn.ModuleDict({"layer": layer})
    for slot, own in deltas.items():
        attach(model, slot, {"layer": own})
    with riding(SLOTS, LENGTHS):
        together = model["layer"](x[None])[0]
    assert torch.allclose(together, expected, atol=1e-5)
    assert not torch.allclose(together, layer(x), atol=0.1)
    assert torch.equal(model["layer"](x[None])[0], layer(x)), "nobody rides outside"
    assert base_layer(model["layer"]) is layer


def test_runs_of_one_adapter_are_one_segment() -> None:
    assert segments(SLOTS, LENGTHS) == ((1, 0, 3), (0, 3, 8), (2, 8, 10), (3, 10, 15), (1, 15, 17))
    assert segments([0, 0], [2, 3]) == ()
    assert segments([2, 2], [2, 3]) == ((2, 0, 5),)


@torch.no_grad()
def test_a_batch_on_the_bare_model_costs_nothing() -> None:
    """What the base returns is handed on, not copied."""
    out = torch.zeros(1, 3, NARROW)

    class Same(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return out

    layer = LoraLinear(Same(WIDE, NARROW), "layer")
    layer.add(1, layer.fitted(delta(NARROW, WIDE, 2, 0), torch.device("cpu")))
    with riding([0, 0], [1, 2]):
        assert layer(torch.zeros(1, 3, WIDE)) is out


@torch.no_grad()
def test_rows_of_unknown_owners_raise() -> None:
    """Planted: a layer that is fed something else than the batch's tokens."""
    layer = LoraLinear(nn.Linear(WIDE, NARROW), "layer")
    layer.add(1, layer.fitted(delta(NARROW, WIDE, 2, 0), torch.device("cpu")))
    with riding([1], [3]), pytest.raises(RuntimeError, match="got 5 rows for a batch of 3"):
        layer(torch.zeros(1, 5, WIDE))


def test_the_weight_cannot_be_taken_past_the_adapters() -> None:
    layer = LoraLinear(nn.Linear(WIDE, NARROW), "layer")
    assert layer.weight is layer.base.weight
    assert layer.taken
    layer.add(1, layer.fitted(delta(NARROW, WIDE, 2, 0), torch.device("cpu")))
    with pytest.raises(AttributeError, match="it takes the weight of layer without running it"):
        layer.weight  # noqa: B018


@torch.no_grad()
def test_gemmas_scaled_embedding_scales_its_adapters_too() -> None:
    class Scaled(nn.Embedding):
        embed_scale = torch.tensor(3.0)

        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) * self.embed_scale

    table = Scaled(WIDE, NARROW)
    own = delta(NARROW, WIDE, 2, 0)
    expected = (table.weight + own.matrix().T) * 3
    layer = LoraEmbedding(table, "words")
    layer.add(1, layer.fitted(own, torch.device("cpu")))
    with riding([1], [WIDE]):
        assert torch.allclose(layer(torch.arange(WIDE)[None])[0], expected, atol=1e-5)


@torch.no_grad()
def test_surgery_packs_the_base_and_leaves_the_adapter() -> None:
    model = nn.Sequential(nn.Linear(WIDE, NARROW))
    attach(model, 1, {"0": delta(NARROW, WIDE, 2, 0)})
    x = torch.randn(1, 4, WIDE)
    with riding([1], [4]):
        before = model(x)
        assert replace_linears(model, Rehearsal.of(model, lambda: model(x)), packed) == (1, 0)
        assert torch.allclose(model(x), before, atol=1e-5)
    assert isinstance(model[0], LoraLinear)
    assert type(model[0].base) is not nn.Linear


def test_a_replica_shares_the_adapters_weights() -> None:
    model = nn.Sequential(nn.Linear(WIDE, NARROW))
    attach(model, 1, {"0": delta(NARROW, WIDE, 2, 0)})
    twin = copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})
    assert [id(w) for w in twin.parameters()] == [id(w) for w in model.parameters()]
    assert sum(1 for _ in model.parameters()) == 4


@torch.no_grad()
def test_threads_do_not_see_each_others_riders() -> None:
    layer = LoraLinear(nn.Linear(WIDE, NARROW), "layer")
    layer.add(1, layer.fitted(delta(NARROW, WIDE, 2, 0), torch.device("cpu")))
    x = torch.randn(1, 3, WIDE)
    bare = layer(x)
    seen: list[Tensor] = []
    with riding([1], [3]):
        thread = threading.Thread(target=lambda: seen.append(layer(x)))
        thread.start()
        thread.join()
        assert not torch.allclose(layer(x), bare)
    assert torch.equal(seen[0], bare)


def test_layers_that_are_never_run_are_told() -> None:
    model = nn.ModuleDict({name: nn.Linear(WIDE, NARROW) for name in "ab"})
    attach(model, 1, {name: delta(NARROW, WIDE, 2, 0) for name in "ab"})
    with idle_layers(model) as idle:
        model["a"](torch.zeros(1, WIDE))
    assert idle == {"b"}
    assert not model["a"]._forward_hooks
