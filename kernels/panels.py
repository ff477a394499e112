"""Panels: a linear layer's weights in the order in which kernels/cpu/linear.cpp reads them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

COLUMNS = 64  # outputs a panel, as linear.cpp has it
HALF = COLUMNS // 2  # of which a gated panel's first are gates


@dataclass(frozen=True, slots=True)
class Panels:
    """`weight` bfloat16 [P, in / 2, 64, 2], `bias` float32 [P * 64]: zeros behind the last output.

    `gated`: the outputs are 32 gates, 32 ups, and so on by turns; `outputs` counts both.
    """

    weight: Tensor
    bias: Tensor
    inputs: int
    outputs: int
    gated: bool = False

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, *, gated: bool = False) -> Panels:
        """weight bfloat16 [out, in], bias [out]; `out` a multiple of 16, `in` even."""
        outputs, inputs = weight.shape
        if weight.dtype != torch.bfloat16 or outputs % 16 or inputs % 2:
            raise ValueError(f"panels are of bfloat16 [16·n, 2·m], not {weight.dtype} [{outputs}, {inputs}]")
        behind = -outputs % COLUMNS
        rows = F.pad(weight.detach(), (0, 0, 0, behind)).view(-1, COLUMNS, inputs // 2, 2)
        start = weight.new_zeros(outputs) if bias is None else bias.detach()
        return cls(
            rows.transpose(1, 2).contiguous(), F.pad(start.float(), (0, behind)), inputs, outputs, gated
        )

    @classmethod
    def of_pair(cls, gate: Tensor, up: Tensor, gate_bias: Tensor | None, up_bias: Tensor | None) -> Panels:
        """gate and up bfloat16 [F, in], biases [F]; F a multiple of 32."""
        if gate.shape != up.shape or len(gate) % HALF:
            raise ValueError(
                f"gates and ups are as many, a multiple of {HALF}, not {len(gate)} and {len(up)}"
            )
        bias = None
        if gate_bias is not None or up_bias is not None:
            zeros = gate.new_zeros(len(gate))
            bias = _by_turns(zeros if gate_bias is None else gate_bias, zeros if up_bias is None else up_bias)
        return cls.of(_by_turns(gate, up), bias, gated=True)

    def unpacked(self) -> tuple[Tensor, Tensor]:
        """The weight [out, in] and the bias float32 [out] again; by turns where gated."""
        rows = self.weight.transpose(1, 2).reshape(-1, self.inputs)
        return rows[: self.outputs], self.bias[: self.outputs]


def _by_turns(gate: Tensor, up: Tensor) -> Tensor:
    """[F, ...] and [F, ...] → [2F, ...], 32 of each by turns."""
    return torch.stack([half.reshape(-1, HALF, *half.shape[1:]) for half in (gate, up)], 1).flatten(0, 2)
