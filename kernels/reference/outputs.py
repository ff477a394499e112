"""Vectors as they are given out: cut, of unit length, in the type that was asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Output = Literal["float32", "float16", "bfloat16", "int8", "binary"]
OUTPUTS: Mapping[Output, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "binary": torch.uint8,
}


def cut_and_normalize(vectors: Tensor, widths: Tensor, normalize: Tensor) -> Tensor:
    """Matryoshka: row i keeps its first widths[i] components (the rest become 0), then gets unit length if asked.

    vectors float32 [B, D], widths int64 [B], normalize bool [B] → float32 [B, D]. L2 with eps 1e-12.
    """
    looks = vectors.device.type == "cpu"  # elsewhere the host would wait for the answer
    if not looks or int(widths.min()) < vectors.shape[1]:
        column = torch.arange(vectors.shape[1], device=vectors.device)
        vectors = vectors.masked_fill(column[None, :] >= widths[:, None], 0.0)
    if looks and not normalize.any():
        return vectors
    length = vectors.norm(dim=1).clamp_min(1e-12)
    return vectors / torch.where(normalize, length, torch.ones_like(length))[:, None]


def finish_rows(vectors: Tensor, widths: Tensor, normalize: Tensor, output: Output) -> tuple[Tensor, Tensor]:
    """Cut and normalise float32 rows [R, H], then cast: rows and float32 scales [R].

    int32 widths and bool normalize [R]. int8 [R, H] are whole numbers from -127 to 127, to be multiplied by their row's
    scale; scales are 1 for all other outputs. binary is uint8 [R, ceil(H / 8)]: a bit a component, the first one the
    highest, set from 0 upwards and for none from the width on.
    """
    ones = vectors.new_ones(len(vectors))
    if not len(vectors):
        size = -(-vectors.shape[1] // 8) if output == "binary" else vectors.shape[1]
        return vectors.new_empty((0, size), dtype=OUTPUTS[output]), ones
    finished = cut_and_normalize(vectors, widths.long(), normalize)
    if output == "int8":
        most = finished.abs().amax(1)
        # The whole numbers are of the row before it got its length, so that they are rounded once only.
        cut = cut_and_normalize(vectors, widths.long(), torch.zeros_like(normalize))
        factor = 127 / cut.abs().amax(1).clamp_min(1e-30)
        return (cut * factor[:, None]).round().nan_to_num(0).clamp(-127, 127).to(torch.int8), most / 127
    if output == "binary":
        column = torch.arange(vectors.shape[1], device=vectors.device)
        bits = (finished >= 0) & (column[None, :] < widths[:, None])
        bits = F.pad(bits, (0, -bits.shape[1] % 8)).view(len(bits), -1, 8)
        weight = 2 ** torch.arange(7, -1, -1, device=vectors.device)
        return (bits * weight).sum(2).to(torch.uint8), ones
    return finished.to(OUTPUTS[output]), ones
