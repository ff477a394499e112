"""All layers of a BERT as one native call, where each is an `EncoderLayer` of native products.

Of a short text the steps between the products take longer than they do, and while Python goes through them it keeps
other threads, the event loop's among them, from running (docs/log.md). Results are the same to the bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from carpool.engine.models.attention import under_way, watched
from carpool.engine.models.backbone import Backbone
from carpool.engine.models.surgery.agreement import holds
from carpool.engine.models.surgery.encoder_layer import EncoderLayer
from carpool.engine.models.surgery.native_linear import NativeLinear
from carpool.engine.models.surgery.rehearsal import small_batch
from carpool.kernels import native_encoder, twins_cpu


class Encoder(nn.Module):
    """hidden [1, T, H] → [1, T, H], as `layers` one after the other. It stands in their list, alone."""

    def __init__(self, layers: nn.ModuleList, run: native_encoder.Encoder) -> None:
        super().__init__()
        self.layers = layers
        self.run = run  # no module: a copy of the model has the same

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        row = under_way()
        left = list(self.layers)
        if not (row.unseen or row.kept or watched()):
            # Of the last one only what is wanted is computed behind its attention (`last_layer`).
            count = len(left) - (row.wanted is not None)
            hidden, left = self.run(hidden[0], row.runs, count)[None], left[count:]
        for layer in left:
            hidden = layer(hidden)
        return hidden


def unite(backbone: Backbone, *, vocab_size: int) -> int:
    """Swap every list of such layers for one of these, in place; returns how many were. For after `straighten`."""
    model = backbone.module
    lists = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    dtype = next(model.parameters()).dtype
    found = [(path, layers, united) for path, layers in lists if (united := _united(layers, dtype))]
    if not found:
        return 0
    batch = small_batch(vocab_size, torch.device("cpu"))
    with torch.inference_mode(False), torch.no_grad():
        before = backbone.forward(batch)
        _put(model, [(path, nn.ModuleList([united])) for path, _, united in found])
        if holds(lambda: backbone.forward(batch), before, torch.equal):
            return len(found)
    _put(model, [(path, layers) for path, layers, _ in found])
    return 0


def _put(model: nn.Module, lists: list[tuple[str, nn.ModuleList]]) -> None:
    for path, layers in lists:
        above, _, name = path.rpartition(".")
        setattr(model.get_submodule(above), name, layers)


def _united(layers: nn.ModuleList, dtype: torch.dtype) -> Encoder | None:
    described = [_described(layer) for layer in layers]
    if len(described) < 2 or None in described:
        return None
    try:
        run = native_encoder.Encoder([layer for layer in described if layer is not None], dtype)
    except ValueError:  # they do not fit each other
        return None
    return Encoder(layers, run)


def _described(layer: nn.Module) -> twins_cpu.EncoderLayer | None:
    """What the kernel has to know of it; None of what is not an `EncoderLayer` of four native products."""
    if not isinstance(layer, EncoderLayer) or not isinstance(layer.up, NativeLinear):
        return None
    joint, out, down = layer.joint, layer.out.dense, layer.down.dense
    if not (
        isinstance(joint, NativeLinear) and isinstance(out, NativeLinear) and isinstance(down, NativeLinear)
    ):
        return None
    return twins_cpu.EncoderLayer(
        joint.panels(),
        out.panels(),
        layer.up.panels(),
        down.panels(),
        layer.out.norm,
        layer.down.norm,
        layer.up.gelu,
        heads=joint.out_features // 3 // layer.size,
        scale=layer.kind["scale"],
        window=layer.kind["window"],
        softcap=layer.kind["softcap"],
    )
