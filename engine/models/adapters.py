"""Adapters: all that are loaded beside one model, fitted onto its layers and its head.

Slots count from 1: first the checkpoint's own, a task each, then the user's. An adapter's names are those of the class
it was trained on, which may hold our backbone below a prefix, or a head that we keep apart.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from carpool.engine.checkpoint import Checkpoint
from carpool.engine.config import EngineConfig
from carpool.engine.errors import ConfigError
from carpool.engine.hub import locate
from carpool.engine.models.adapter import Adapter, read_peft, refusal
from carpool.engine.models.backbone import Backbone
from carpool.engine.models.difference import apart
from carpool.engine.models.loader import Loaded
from carpool.engine.models.lora import (
    Delta,
    adapt_all,
    adapted_layers,
    attach,
    base_layer,
    give_back_taken,
    idle_layers,
    merge,
    weight_shape,
)
from carpool.engine.models.task_adapters import read_task_adapters
from carpool.engine.packing import pack_ids
from carpool.engine.params import TaskAdapter
from carpool.engine.poolers.classifier import ReplayedHead

# BERT's own pooler belongs to the head; for embeddings nobody reads it.
_POOLER = re.compile(r"(^|\.)pooler(\.|$)")
# Layers of jina-embeddings-v3 as its own code names them, and as transformers does.
_FLASH = re.compile(r"^encoder\.layers\.(\d+)\.(mixer\.Wqkv|mixer\.out_proj|mlp\.fc[12])$")
_FLASH_LAYERS = {
    "mixer.Wqkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mixer.out_proj": ("self_attn.o_proj",),
}


@dataclass(frozen=True, slots=True)
class Adapters:
    """`slots` by name, from 1. `heads` are those that an adapter brings, by its slot."""

    slots: Mapping[str, int] = field(default_factory=dict)
    lora_modules: Mapping[str, str] = field(default_factory=dict)  # name → path, of the user's
    tasks: Mapping[str, TaskAdapter] = field(default_factory=dict)
    default: str | None = None
    heads: Mapping[int, nn.Module] = field(default_factory=dict)


def load_adapters(checkpoint: Checkpoint, config: EngineConfig, loaded: Loaded) -> Adapters:
    """Read them all and put them on the model, in place. Raises ConfigError, naming adapter and reason."""
    own = read_task_adapters(checkpoint)
    users = {module.name: module.path for module in config.lora_modules}
    for name in users:
        if name in own.tasks or name in {adapter.name for adapter in own.adapters}:
            raise refusal(name, "a task of this model has its name already; choose another")
    found = {
        name: locate(path, download_dir=config.download_dir, what="adapter") for name, path in users.items()
    }
    every = [*own.adapters, *(read_peft(name, folder) for name, folder in found.items())]
    heads: dict[int, nn.Module] = {}
    for slot, adapter in enumerate(every, start=1):
        deltas, head = fitted(adapter, loaded)
        attach(loaded.backbone.module, slot, deltas)
        if head is not None:
            heads[slot] = head
    slots = {adapter.name: slot for slot, adapter in enumerate(every, start=1)}
    return Adapters(slots, users, own.tasks, own.default, heads)


def make_room(backbone: Backbone, *, vocab_size: int) -> None:
    """Make the model's layers ones that adapters can be put on later. To be done before surgery."""
    model = backbone.module
    adapt_all(model)
    low = min(5, vocab_size - 1)
    with torch.inference_mode():
        backbone.forward(pack_ids([[low] * 3, [low]], next(model.parameters()).device))
    give_back_taken(model)


def check_adapters(backbone: Backbone, chosen: Seq[int], *, vocab_size: int, max_model_len: int) -> None:
    """Raise ConfigError unless every layer that has something of the `chosen` slots is run, and these, mixed, come out
    as each does alone.
    """
    device = next(backbone.module.parameters()).device
    generator = torch.Generator().manual_seed(7)
    slots = [0, *chosen, chosen[-1], 0, chosen[0]]
    lengths = [min(3 + 5 * (i % 3), max_model_len) for i in range(len(slots))]
    low = min(5, vocab_size - 1)
    ids = [torch.randint(low, vocab_size, (n,), generator=generator).tolist() for n in lengths]
    name = type(backbone.module).__name__
    try:
        with torch.inference_mode(), idle_layers(backbone.module, chosen) as idle:
            mixed = torch.split(backbone.forward(pack_ids(ids, device, adapters=slots)), lengths)
            alone = [
                backbone.forward(pack_ids([own], device, adapters=[slot]))
                for own, slot in zip(ids, slots, strict=True)
            ]
    except Exception as error:
        raise ConfigError(f"{name} cannot be served with adapters: {error}.") from error
    if idle:
        raise ConfigError(
            f"{name} cannot be served with adapters on {min(idle)}: it takes that layer's weights without running it."
        )
    if not all(single.isfinite().all() for single in alone):
        raise ConfigError(
            f"{name} cannot be served with adapters: with one of them its numbers are not finite."
        )
    for together, single in zip(mixed, alone, strict=True):
        difference = apart(together, single)
        if not difference <= (1e-3 if single.dtype == torch.float32 else 3e-2):
            raise ConfigError(
                f"{name} cannot be served with adapters: texts on different ones change each other's results "
                f"(relative difference {difference:.1e})."
            )


# ── fitting ──────────────────────────────────────────────────────────────────────────────────────────────────


def fitted(
    adapter: Adapter, loaded: Loaded, *, late: bool = False
) -> tuple[dict[str, Delta], nn.Module | None]:
    """The adapter's deltas by the names of the backbone's layers, and its head if it changes that. `late`: only layers
    for which there is room take any more.
    """
    model, head = loaded.backbone.module, loaded.head
    known = adapted_layers(model)
    own: ReplayedHead | None = None
    deltas: dict[str, Delta] = {}
    for path, delta in adapter.deltas.items():
        places = {} if _POOLER.search(path) else _in_backbone(adapter, model, known, path, delta, late)
        if late and (full := places.keys() - known.keys()):
            raise refusal(
                adapter.name, f"it targets {min(full)}, which no adapter can be put on while the model serves"
            )
        deltas |= places
        if places:
            continue
        if own is None and isinstance(head, ReplayedHead):
            own = copy.deepcopy(head)
        layer = None if own is None else _submodule(own, f"_full.{path}")
        if isinstance(layer, nn.Linear):
            _check_shape(adapter, path, layer, delta)
            merge(layer, delta)
        elif not _POOLER.search(path):
            raise refusal(
                adapter.name, f"it targets {path}, which {type(model).__name__} has no such layer for"
            )
    for path, weight in adapter.saved.items():
        if _is_copy(model, path, weight) or (head is None and _POOLER.search(path)):
            continue
        if not isinstance(head, ReplayedHead):
            raise refusal(
                adapter.name,
                f"it brings {path}, and this model serves no head that could be exchanged for it: adapters of "
                "classifiers need a *ForSequenceClassification checkpoint",
            )
        if own is None:
            own = copy.deepcopy(head)
        _exchange(adapter, own, path, weight)
    return deltas, own


def _in_backbone(
    adapter: Adapter, model: nn.Module, known: Mapping[str, nn.Module], path: str, delta: Delta, late: bool
) -> dict[str, Delta]:
    """The layers that `path` means, with what each gets; none if the backbone has no such layer. The `known` ones are
    found by the names that they had before surgery.
    """
    for name in _names(model, path):
        flash = _FLASH.match(name)
        leaves = _FLASH_LAYERS.get(flash[2], (flash[2],)) if flash else ()
        split = [f"layers.{flash[1]}.{leaf}" for leaf in leaves] if flash else [name]
        layers = [known.get(part) or _submodule(model, part) for part in split]
        if None in layers:
            continue
        ups = delta.up.chunk(len(split))
        found = {part: Delta(delta.down, up) for part, up in zip(split, ups, strict=True)}
        for part, layer in zip(split, layers, strict=True):
            assert layer is not None
            if part in known or not late:
                _check_shape(adapter, part, layer, found[part])
            _check_alone(adapter, model, part)
        return found
    return {}


def _names(model: nn.Module, path: str) -> Iterator[str]:
    """What the backbone may call what a class around it calls `path`, the likeliest first."""
    yield path
    prefix = getattr(model, "base_model_prefix", "")
    if prefix and path.startswith(f"{prefix}."):
        yield path.removeprefix(f"{prefix}.")
    yield path.partition(".")[2]


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name) if name else None
    except AttributeError:
        return None


def _check_shape(adapter: Adapter, path: str, layer: nn.Module, delta: Delta) -> None:
    shape = weight_shape(layer)
    if shape is None:
        raise refusal(adapter.name, f"it targets {path}, a {type(layer).__name__}, and only linear layers and "
                                    "embeddings can be adapted")  # fmt: skip
    if shape != delta.shape:
        raise refusal(
            adapter.name,
            f"{path} is a layer of {shape[1]} to {shape[0]} and the adapter's is of {delta.shape[1]} to "
            f"{delta.shape[0]}: it was trained on another model",
        )


def _check_alone(adapter: Adapter, model: nn.Module, path: str) -> None:
    """DeBERTa projects positions by the layers that project its tokens, and does it once, ahead of all requests."""
    parent, _, leaf = path.rpartition(".")
    if leaf in ("query_proj", "key_proj") and getattr(_submodule(model, parent), "share_att_key", False):
        raise refusal(
            adapter.name,
            f"it targets {path}, which {type(model).__name__} projects its table of positions by as well: the table is "
            "made once, without adapters; target value_proj and dense layers",
        )


def _is_copy(model: nn.Module, path: str, weight: Tensor) -> bool:
    """Whether it is the base's own weight, which PEFT saves along where an embedding is adapted."""
    layer, _, leaf = path.rpartition(".")
    for name in _names(model, layer):
        if (found := base_layer(_submodule(model, name))) is not None:
            own = getattr(found, leaf, None)
            if isinstance(own, Tensor) and own.shape == weight.shape:
                return torch.equal(own, weight.to(own))
    return False


@torch.no_grad()
def _exchange(adapter: Adapter, head: ReplayedHead, path: str, weight: Tensor) -> None:
    own = dict(head.named_parameters()).get(f"_full.{path}")
    if own is None:
        raise refusal(
            adapter.name, f"it brings {path} (modules_to_save), and only a classifier's head is exchanged"
        )
    if own.shape != weight.shape:
        raise refusal(
            adapter.name,
            f"its {path} is of shape {list(weight.shape)} and the model's of {list(own.shape)}: all adapters of a "
            "classifier share its labels",
        )
    own.copy_(weight)
