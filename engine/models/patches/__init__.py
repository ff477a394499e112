"""Patches: layers of classes that bypass transformers' registry, or mix neighbouring tokens, done on a packed row.

A row of PATCHES names a model class and the file here that knows it. Its `apply` gives some modules of a loaded model
another class: the same weights in the same tree, with a forward that minds where sequences begin and end. The
isolation probe decides afterwards, as for any other model; `unpatch` gives the classes back.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module

from torch import nn

from carpool.engine.models.patches.layer import PackedLayer, stock_class

PATCHES: Mapping[str, str] = {  # by the name of the backbone's class; imported when it is needed
    "CLIPTextModel": "towers",
    "DebertaModel": "deberta",
    "DebertaV2Model": "deberta_v2",
    "Lfm2Model": "lfm2",
    "Lfm2MoeModel": "lfm2",
    "MPNetModel": "mpnet",
    "MT5EncoderModel": "t5",
    "MobileBertModel": "mobilebert",
    "RemBertModel": "rembert",
    "RoFormerModel": "roformer",
    "SiglipTextModel": "towers",
    "T5EncoderModel": "t5",
    "UMT5EncoderModel": "t5",
}


def patch(backbone: nn.Module) -> bool:
    """Apply the patch of this class, if there is one."""
    name = PATCHES.get(type(backbone).__name__)
    if name is not None:
        import_module(f"{__name__}.{name}").apply(backbone)
    return name is not None


def unpatch(backbone: nn.Module) -> bool:
    """Give every patched layer its own class again, if there are any."""
    layers = [module for module in backbone.modules() if isinstance(module, PackedLayer)]
    for layer in layers:
        layer.__class__ = stock_class(type(layer))
    return bool(layers)
