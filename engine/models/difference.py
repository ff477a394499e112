"""How far apart two results are that ought to be the same, relative to the second. Each guard has its own bound."""

from __future__ import annotations

from torch import Tensor


def apart(new: Tensor, old: Tensor) -> float:
    """As a whole; NaN where either is."""
    return float(_norms(new.flatten(), old.flatten()))


def tokens_apart(new: Tensor, old: Tensor) -> Tensor:
    """[..., H] → float32 [...], token by token: a few may differ by more where rounding sends them to other experts."""
    return _norms(new, old)


def _norms(new: Tensor, old: Tensor) -> Tensor:
    wide = old.float()
    apart: Tensor = (new.float() - wide).norm(dim=-1) / wide.norm(dim=-1).clamp_min(1e-12)
    return apart
