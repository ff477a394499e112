"""Agreement: when two ways to compute the same have computed the same."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Of the largest component: what two orders of summation may differ by.
_BOUND = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def agree(new: Tensor, old: Tensor) -> bool:
    """Of one shape and dtype, and within what rounding in that dtype explains."""
    if not isinstance(new, Tensor) or new.shape != old.shape or new.dtype != old.dtype:
        return False
    scale = old.float().abs().max().clamp_min(1e-6)
    bound = _BOUND.get(old.dtype, 1e-5)
    return bool((new.float() - old.float()).abs().max() <= bound * scale)


def holds(
    forward: Callable[[], Tensor], before: Tensor, likeness: Callable[[Tensor, Tensor], bool] = agree
) -> bool:
    """Whether a model says the like of what it said before something in it was swapped; one that raises does not."""
    try:
        return likeness(forward(), before)
    except Exception:  # it is not what it looked like: it reaches into what was swapped
        return False
