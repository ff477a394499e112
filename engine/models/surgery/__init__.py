"""Surgery: modules of a loaded model are swapped for faster ones that compute the same.

Each swap is checked against what it replaces, on random input or on what the module was given in a rehearsal, and
undone if it disagrees: a change in transformers can cost speed but not correctness. What was swapped is counted by
kind and reported by the engine. A file here is one kind of swap.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from carpool.engine.errors import ConfigError
from carpool.engine.models.attention import layout
from carpool.engine.models.backbone import Backbone
from carpool.engine.models.difference import tokens_apart
from carpool.engine.models.surgery.conv1d import as_linear
from carpool.engine.models.surgery.gated_mlp import GatedMLP, gated
from carpool.engine.models.surgery.joint_linear import join
from carpool.engine.models.surgery.leaves import replace_linears
from carpool.engine.models.surgery.linear_gelu import fuse_gelu
from carpool.engine.models.surgery.native_linear import fits, native
from carpool.engine.models.surgery.native_linear8 import fits8
from carpool.engine.models.surgery.packed_linear import packed
from carpool.engine.models.surgery.rehearsal import Rehearsal, small_batch, submodule
from carpool.engine.models.surgery.residual_norm import ResidualNorm, residual_norm
from carpool.engine.models.surgery.rms_norm import RMSNorm, fused_norm
from carpool.engine.models.surgery.rotary import turn

KINDS = (
    "conv1d",
    "rms_norm",
    "residual_norm",
    "rotary",
    "gated_mlp",
    "joint_linear",
    "linear_gelu",
    "native_linear",
    "linear",
)
_WHOLE: Mapping[type[nn.Module], str] = {  # what takes a module's place as a whole
    RMSNorm: "rms_norm",
    ResidualNorm: "residual_norm",
    GatedMLP: "gated_mlp",
}
_MAY_CHANGE = 1e-3  # relative: what rounding grows to in a deep model of float32
_MAY_CHANGE_16_BIT = 0.1


def operate(backbone: Backbone, *, vocab_size: int, pack: bool = True) -> dict[str, int]:
    """Swap what can be swapped, in place; returns how many of each kind were.

    `pack`: also lay linear layers out for the CPU; not where they are to be quantised. Raises ConfigError if the model
    does not run as before: it reaches past its modules for something that a swap has moved.
    """
    model = backbone.module
    device = next(model.parameters()).device
    batch = small_batch(vocab_size, device)
    before: list[Tensor] = []
    with torch.inference_mode(False), torch.no_grad():
        turned_round = turn_round(model)  # first, so that all else finds linear layers there
        rehearsal = Rehearsal.of(
            model, lambda: before.append(backbone.forward(batch)), scene=lambda: layout(batch)
        )
        swapped = swap_modules(model, rehearsal, pack=pack)
        swapped["conv1d"] = turned_round
        if pack:
            swapped["native_linear"], _ = replace_linears(model, rehearsal, native)
        if pack and device.type == "cpu" and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
            swapped["linear"], _ = replace_linears(model, rehearsal, packed)
        try:
            whole = all(weight.dtype == torch.float32 for weight in model.parameters())
            after = backbone.forward(batch)
            fault = _fault(after, before[0], _MAY_CHANGE if whole else _MAY_CHANGE_16_BIT)
        except Exception as error:
            fault = f"{type(error).__name__}: {error}"
    if fault:
        raise ConfigError(
            f"{type(model).__name__} does not run as before with its modules fused ({fault}): serve it with "
            "--no-surgery."
        )
    return {kind: swapped[kind] for kind in KINDS}


def turn_round(model: nn.Module) -> int:
    """Make every Conv1D a linear layer; returns how many."""
    count = 0
    for parent in model.modules():
        for name, child in list(parent.named_children()):
            if (linear := as_linear(child)) is not None:
                setattr(parent, name, linear)
                count += 1
    return count


def swap_modules(model: nn.Module, rehearsal: Rehearsal, *, pack: bool = True) -> Counter[str]:
    """All kinds but the packing of linear layers, which comes last since it hides their weights; `pack`: if it does."""
    swapped: Counter[str] = Counter()
    choirs: dict[str, list[list[str]]] = {}
    for choir in rehearsal.choirs():
        parents = {_parent(path)[0] for path in choir}
        if len(parents) == 1:
            choirs.setdefault(parents.pop(), []).append([_parent(path)[1] for path in choir])
    # By path, not by module: a list of modules would keep the replaced ones, and their weights, until the end.
    for path in [path for path, _ in model.named_modules()]:
        module = submodule(model, path)
        if module is None:
            continue
        parent, name = _parent(path)
        fused: nn.Module | None = gated(path, module, rehearsal) or fused_norm(path, module, rehearsal)
        if fused is None:
            fused = residual_norm(path, module, rehearsal, fits if pack else fits8)
        if fused is not None and path:
            setattr(model.get_submodule(parent), name, fused)
            swapped[_WHOLE[type(fused)]] += 1
            continue
        swapped["rotary"] += turn(path, module, rehearsal)
        swapped["linear_gelu"] += fuse_gelu(path, module, rehearsal)
        for names in choirs.get(path, ()):
            swapped["joint_linear"] += join(path, module, names, rehearsal)
    return swapped


def _parent(path: str) -> tuple[str, str]:
    """The path of the module that holds it, and its name there."""
    parent, _, name = path.rpartition(".")
    return parent, name


def _fault(after: Tensor, before: Tensor, bound: float) -> str | None:
    """By the median token: where there are experts, rounding may send a token to others of them."""
    difference = float(tokens_apart(after, before).median())
    return None if difference <= bound else f"its results change by {difference:.1e}"
