"""Panels: a linear layer's weights in the order in which kernels/cpu/linear.cpp, or linear_amx.cpp, reads them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from carpool.kernels import native

COLUMNS = 64  # outputs a panel, as linear.cpp has it
FEW_COLUMNS = 16  # the same for float32 on AVX2, whose registers hold no more sums
TILE = 16  # outputs, and pairs of inputs, of a tile, as amx.h has it


_TOGETHER = {torch.float32: 1, torch.bfloat16: 2}  # inputs side by side: bfloat16 is multiplied in pairs


def columns(dtype: torch.dtype) -> int:
    """How many outputs a panel of this dtype has, for this CPU."""
    return FEW_COLUMNS if dtype == torch.float32 and native.level < native.AVX512 else COLUMNS


@dataclass(frozen=True, slots=True)
class Panels:
    """`weight` bfloat16 [P, in / 2, C, 2] or float32 [P, in, C, 1], `bias` float32 [P * C]: zeros behind the last one.

    C is `columns`. For AMX bfloat16 lies in tiles: weight [P, in / 32, 2, 16 pairs of inputs, 16 outputs, 2], zeros
    behind the last input too, and bias [P * 32].
    """

    weight: Tensor
    bias: Tensor
    inputs: int
    outputs: int

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> Panels:
        """weight float32 or bfloat16 [out, in], bias [out]; `out` a multiple of 16, `in` even if bfloat16."""
        outputs, inputs = weight.shape
        together = _TOGETHER.get(weight.dtype)
        if together is None or outputs % 16 or inputs % together:
            raise ValueError(
                "panels are of float32 [16·n, m] or bfloat16 [16·n, 2·m], "
                f"not {weight.dtype} [{outputs}, {inputs}]"
            )
        if weight.dtype == torch.bfloat16 and native.level >= native.AMX:
            return cls._of_tiles(weight, bias)
        wide = columns(weight.dtype)
        behind = -outputs % wide
        rows = F.pad(weight.detach(), (0, 0, 0, behind)).view(-1, wide, inputs // together, together)
        start = weight.new_zeros(outputs) if bias is None else bias.detach()
        return cls(rows.transpose(1, 2).contiguous(), F.pad(start.float(), (0, behind)), inputs, outputs)

    @classmethod
    def _of_tiles(cls, weight: Tensor, bias: Tensor | None) -> Panels:
        outputs, inputs = weight.shape
        behind = -outputs % (2 * TILE)
        rows = F.pad(weight.detach(), (0, -inputs % (2 * TILE), 0, behind))
        tiles = rows.view(len(rows) // (2 * TILE), 2, TILE, -1, TILE, 2).permute(0, 3, 1, 4, 2, 5)
        start = weight.new_zeros(outputs) if bias is None else bias.detach()
        return cls(tiles.contiguous(), F.pad(start.float(), (0, behind)), inputs, outputs)

    @property
    def tiled(self) -> bool:
        return self.weight.ndim == 6

    def unpacked(self) -> tuple[Tensor, Tensor]:
        """The weight [out, in] and the bias float32 [out] again."""
        if self.tiled:
            rows = self.weight.permute(0, 2, 4, 1, 3, 5).reshape(len(self.bias), -1)[:, : self.inputs]
        else:
            rows = self.weight.transpose(1, 2).reshape(-1, self.inputs)
        return rows[: self.outputs], self.bias[: self.outputs]
