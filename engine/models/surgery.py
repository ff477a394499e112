"""Surgery: leaf modules of a loaded model are swapped for faster ones that compute the same.

Each swap is checked on random input against the module it replaces and undone if it disagrees, so a change in
transformers can cost speed but not correctness. What was swapped is reported by the engine.

On a CPU: linear layers keep their weights in the blocked layout that oneDNN multiplies from (it would reorder
them on every call otherwise), and a GELU that directly follows one is computed inside it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# oneDNN's name for each GELU, by the function that it must agree with.
_GELUS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": F.gelu,
    "tanh": partial(F.gelu, approximate="tanh"),
}


class PackedLinear(nn.Module):
    """x [..., in] → [..., out], optionally through a GELU. `weight` is opaque: oneDNN's blocked layout."""

    def __init__(self, linear: nn.Linear, gelu: str | None = None) -> None:
        """`gelu`: None, "none" (the exact one) or "tanh" (its approximation)."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().contiguous())
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = linear.bias
        self._post = ("none", "") if gelu is None else ("gelu", gelu)

    def forward(self, x: Tensor) -> Tensor:
        operation, variant = self._post
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, operation, [], variant)
        return out


def operate(model: nn.Module) -> dict[str, int]:
    """Swap what can be swapped, in place; returns how many of each kind were."""
    device = next(model.parameters()).device
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return {}
    with torch.inference_mode(False), torch.no_grad():
        fused = sum(_fuse_gelu(module) for module in list(model.modules()))
        packed = sum(_pack_linears(module) for module in list(model.modules()))
    return {"linear_gelu": fused, "linear": packed}


def _fuse_gelu(parent: nn.Module) -> bool:
    """If `parent` holds linear layers and a GELU right behind one of them, make the two one."""
    activations = [(name, gelu) for name, child in parent.named_children() if (gelu := _gelu_variant(child))]
    linears = [(name, child) for name, child in parent.named_children() if type(child) is nn.Linear]
    if len(activations) != 1 or not linears:
        return False
    (act_name, variant), act = activations[0], getattr(parent, activations[0][0])
    for name, linear in linears:
        x = _sample(linear)
        try:
            before = parent(x)
            setattr(parent, name, PackedLinear(linear, variant))
            setattr(parent, act_name, nn.Identity())
            if _agree(parent(x), before):
                return True
        except Exception:  # a parent of another shape: nothing to fuse
            pass
        setattr(parent, name, linear)
        setattr(parent, act_name, act)
    return False


def _pack_linears(parent: nn.Module) -> int:
    """Replace each linear layer directly below `parent` whose packed twin agrees with it."""
    packed = 0
    for name, child in list(parent.named_children()):
        if type(child) is nn.Linear:  # not a subclass: that computes something more
            x = _sample(child)
            try:
                twin = PackedLinear(child)
                agrees = _agree(twin(x), child(x))
            except RuntimeError:  # a shape or dtype that oneDNN does not take on this CPU
                agrees = False
            if agrees:
                setattr(parent, name, twin)
                packed += 1
    return packed


def _gelu_variant(module: nn.Module) -> str | None:
    """Which GELU a module without parameters computes, by asking it."""
    if next(module.parameters(), None) is not None or next(module.children(), None) is not None:
        return None
    x = torch.linspace(-4, 4, 257)
    try:
        y = module(x)
    except Exception:
        return None
    matches = [
        name
        for name, gelu in _GELUS.items()
        if isinstance(y, Tensor) and torch.allclose(y, gelu(x), atol=1e-6)
    ]
    return matches[0] if matches else None


def _sample(linear: nn.Linear) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 5, linear.in_features, generator=generator)
    return x.to(linear.weight.dtype)


def _agree(new: Tensor, old: Tensor) -> bool:
    """Within what two orders of summation may differ by in this dtype."""
    if not isinstance(new, Tensor) or new.shape != old.shape or new.dtype != old.dtype:
        return False
    scale = old.float().abs().max().clamp_min(1e-6)
    bound = 1e-5 if old.dtype == torch.float32 else 2e-2
    return bool((new.float() - old.float()).abs().max() <= bound * scale)
