"""Panels of 8-bit integers: a layer's weights rounded, in the order in which kernels/cpu/linear8.cpp reads them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from carpool.kernels.panels import COLUMNS

_STEPS = 127  # of weights, from 0 to a row's largest
_GROUP = 4  # inputs that are multiplied at a time


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """float [out, in] → int8 [out, in] and, for each row, what one step of it stands for: float32 [out, 1]."""
    wide = weight.float()
    step = wide.abs().amax(1, keepdim=True).div_(_STEPS).clamp_min_(1e-20)
    return (wide / step).round_().to(torch.int8), step


@dataclass(frozen=True, slots=True)
class Panels8:
    """`weight` int8 [P, in / 4, 64, 4]; `step` of an output, `sum` (what an input of ones becomes) and `bias` float32
    [P * 64]: zeros behind the last output.
    """

    weight: Tensor
    step: Tensor
    sum: Tensor
    bias: Tensor
    inputs: int
    outputs: int

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> Panels8:
        """weight float [out, in], bias [out]; both sides multiples of 16."""
        outputs, inputs = weight.shape
        if not weight.is_floating_point() or outputs % 16 or inputs % 16:
            raise ValueError(
                f"panels of int8 are of floats [16·n, 16·m], not {weight.dtype} [{outputs}, {inputs}]"
            )
        whole, step = quantized(weight.detach())
        behind = -outputs % COLUMNS
        rows = F.pad(whole, (0, 0, 0, behind)).view(-1, COLUMNS, inputs // _GROUP, _GROUP)
        start = step.new_zeros(outputs) if bias is None else bias.detach().float()
        step, total, start = (F.pad(x, (0, behind)) for x in (step[:, 0], whole.sum(1) * step[:, 0], start))
        return cls(rows.transpose(1, 2).contiguous(), step, total, start, inputs, outputs)

    def unpacked(self) -> Tensor:
        """The weight int8 [out, in] again."""
        return self.weight.transpose(1, 2).reshape(-1, self.inputs)[: self.outputs]
