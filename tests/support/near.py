"""Tensors to begin with, and whether what came of them is near enough to what should have."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def rand(*shape: int, seed: int = 0) -> Tensor:
    """float32, the same every time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(found: Tensor, expected: Any, room: float = 1e-5) -> None:
    """In float64, whatever shape the expected numbers come in."""
    exact = expected if isinstance(expected, Tensor) else torch.tensor(np.array(expected))
    exact = exact.double().reshape(found.shape)
    torch.testing.assert_close(found.double(), exact, rtol=room, atol=room)
