"""TanhInt8: the last step of perplexity-ai/pplx-embed, whose vectors are whole numbers from -127 to 127."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TanhInt8(nn.Module):
    """x float32 [B, D] → 127 tanh(x), rounded, as float32. Not of unit length: compared by cosine."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.round(torch.tanh(x) * 127)
