"""The oracle: a checkpoint run by stock transformers, one text at a time, pooled and finished by hand.

Nothing of carpool is imported here: what the two have in common is torch and the model's own code.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel


class Oracle:
    """`modes` are sentence-transformers' names; `activations` belong to the Dense folders, in order."""

    def __init__(
        self,
        path: Path,
        modes: Seq[str] = (),
        *,
        normalize: bool = True,
        activations: Seq[Any] = (),
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.path, self.modes, self.normalize, self.activations = path, modes, normalize, activations
        self.model: Any = AutoModel.from_pretrained(path, dtype=dtype, attn_implementation="eager").eval()
        self._tokenizer = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def ids(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text).ids)

    @torch.no_grad()
    def hidden(self, ids: list[int]) -> Tensor:
        """float32 [tokens, H] of these ids alone."""
        row = torch.tensor([ids])
        hidden: Tensor = self.model(input_ids=row, attention_mask=torch.ones_like(row)).last_hidden_state
        return hidden[0].float()

    @torch.no_grad()
    def embed(self, ids: list[int]) -> Tensor:
        """float32 [D]."""
        vector = torch.cat([self._pool(self.hidden(ids), mode) for mode in self.modes])
        for i, activation in enumerate(self.activations, start=2):
            folder = self.path / f"{i}_Dense"
            assert json.loads((folder / "config.json").read_text())["in_features"] == len(vector)
            weights = load_file(folder / "model.safetensors")
            vector = activation(weights["linear.weight"] @ vector + weights["linear.bias"])
        return vector / vector.norm() if self.normalize else vector

    @staticmethod
    def _pool(rows: Tensor, mode: str) -> Tensor:
        weights = torch.arange(1.0, len(rows) + 1)[:, None]
        return {
            "cls": rows[0],
            "lasttoken": rows[-1],
            "mean": rows.mean(0),
            "max": rows.max(0).values,
            "mean_sqrt_len_tokens": rows.sum(0) / math.sqrt(len(rows)),
            "weightedmean": (rows * weights).sum(0) / weights.sum(),
        }[mode]
