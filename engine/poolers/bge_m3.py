"""BGE-M3's heads: beside a text's vector, a vector and a weight for each token, of one forward pass.

They lie beside the backbone as `colbert_linear.pt` and `sparse_linear.pt`. The marks that the tokenizer puts around a
text take no part as they do elsewhere: the first has no vector, neither has a weight.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from carpool.engine.errors import ConfigError
from carpool.engine.packing import PackedBatch
from carpool.engine.poolers.pooler import Pool, Pooled, Rows
from carpool.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Marks:
    """The tokens that the tokenizer begins and ends a text with; `unweighted` are all that say nothing of a text.

    `listed` stand behind the documents and the query of a listwise reranker's prompt, `step` behind a step of a
    process reward model's.
    """

    first: int | None
    last: int | None
    unweighted: frozenset[int]
    listed: frozenset[int] = frozenset()
    step: int | None = None

    @classmethod
    def of(cls, fast: Any) -> Marks:
        """`fast` is a tokenizer of transformers."""
        names = ("cls_token_id", "eos_token_id", "pad_token_id", "unk_token_id")
        ids = {name: getattr(fast, name) for name in names}
        said = frozenset(token for token in ids.values() if token is not None)
        return cls(ids["cls_token_id"], ids["eos_token_id"], said)


class UnmarkedPool:
    """Results of tokens less those of the first and the last, where they are those of `first` and `last`.

    `flat`: results of one number a token are a row of numbers, [tokens].
    """

    def __init__(self, pool: Pool, first: int | None, last: int | None, flat: bool = False) -> None:
        self._pool = pool
        self._first = first
        self._last = last
        self._flat = flat

    def __call__(
        self, hidden: Tensor, packed: PackedBatch, places: Seq[int], sequences: Seq[Sequence]
    ) -> Pooled:
        pooled = self._pool(hidden, packed, places, sequences)
        return pooled.then(lambda rows: self._unmarked(rows, sequences))

    def _unmarked(self, rows: Rows, sequences: Seq[Sequence]) -> Rows:
        kept = []
        for row, seq in zip(rows, sequences, strict=True):
            start = int(seq.token_ids[0] == self._first)
            end = len(row) - int(seq.token_ids[-1] == self._last)
            kept.append(row[start:end, 0] if self._flat else row[start:end])
        return kept


def load_linear(path: Path, in_features: int, device: torch.device) -> nn.Linear:
    """A linear layer saved as a pickle of its weight and its bias, in float32."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        weight, bias = tensors["weight"].float(), tensors["bias"].float()
    except Exception as error:  # not there, damaged, or a pickle that is not safe to load
        raise ConfigError(f"BGE-M3's {path.name} cannot be read: {type(error).__name__}.") from error
    if weight.ndim != 2 or weight.shape[1] != in_features or bias.shape != weight.shape[:1]:
        raise ConfigError(
            f"BGE-M3's {path.name} has a weight of shape {tuple(weight.shape)} and a bias of {tuple(bias.shape)} for "
            f"hidden states of {in_features}."
        )
    linear = nn.Linear(in_features, len(weight))
    linear.weight.data, linear.bias.data = weight, bias
    return linear.to(device).requires_grad_(False).eval()
