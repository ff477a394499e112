"""Panels: a linear layer's weights in the order in which kernels/cpu/linear.cpp reads them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

COLUMNS = 64  # outputs a panel, as linear.cpp has it


@dataclass(frozen=True, slots=True)
class Panels:
    """`weight` bfloat16 [P, in / 2, 64, 2], `bias` float32 [P * 64]: zeros behind the last output."""

    weight: Tensor
    bias: Tensor
    inputs: int
    outputs: int

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> Panels:
        """weight bfloat16 [out, in], bias [out]; `out` a multiple of 16, `in` even."""
        outputs, inputs = weight.shape
        if weight.dtype != torch.bfloat16 or outputs % 16 or inputs % 2:
            raise ValueError(f"panels are of bfloat16 [16·n, 2·m], not {weight.dtype} [{outputs}, {inputs}]")
        behind = -outputs % COLUMNS
        rows = F.pad(weight.detach(), (0, 0, 0, behind)).view(-1, COLUMNS, inputs // 2, 2)
        start = weight.new_zeros(outputs) if bias is None else bias.detach()
        return cls(rows.transpose(1, 2).contiguous(), F.pad(start.float(), (0, behind)), inputs, outputs)

    def unpacked(self) -> tuple[Tensor, Tensor]:
        """The weight [out, in] and the bias float32 [out] again."""
        rows = self.weight.transpose(1, 2).reshape(-1, self.inputs)
        return rows[: self.outputs], self.bias[: self.outputs]
