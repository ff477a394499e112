"""SPLADE: a weight for each entry of the vocabulary, out of the logits of a masked language model."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from carpool.engine.poolers.pooler import Rows, token_rows
from carpool.engine.sequence import Sequence
from carpool.engine.side_files import Splade

_MOST_LOGITS = 1 << 23  # at a time, 32 MiB of float32: 274 tokens of BERT's vocabulary, 33 of XLM-RoBERTa's


class SpladePool:
    """[V] a text, none below 0. There is nothing in it to normalise or to cut."""

    def __init__(self, head: nn.Module, width: int, splade: Splade) -> None:
        """`head` takes float32 rows [R, H] to logits [R, `width`]."""
        self._head = head
        self._width = width
        self._splade = splade

    def __call__(
        self, hidden: Tensor, cu_seqlens: Tensor, places: Seq[int], sequences: Seq[Sequence]
    ) -> Rows:
        rows, lengths = token_rows(cu_seqlens, places)
        sums = self._splade.strategy == "sum"
        # Where a weight begins, as a maximum and as a sum: ReLU leaves nothing below.
        pooled = torch.zeros(len(places), self._width, device=hidden.device)
        step = max(1, _MOST_LOGITS // self._width)
        for start in range(0, len(rows), step):
            logits = torch.relu(self._head(hidden[rows[start : start + step]].float()))
            for text, part in _parts(lengths, start, len(logits)):
                if sums:
                    pooled[text] += self._squash(logits[part]).sum(0)
                else:
                    torch.maximum(pooled[text], logits[part].amax(0), out=pooled[text])
        weights = pooled if sums else self._squash(pooled)  # of a maximum, the logarithm can be taken last
        return list(self._largest(weights).cpu().numpy())

    def _squash(self, weights: Tensor) -> Tensor:
        weights = weights.log1p()
        return weights.log1p() if self._splade.twice else weights

    def _largest(self, weights: Tensor) -> Tensor:
        most = self._splade.most
        if most is None or most >= self._width:
            return weights
        top = weights.topk(most, dim=1)
        return torch.zeros_like(weights).scatter_(1, top.indices, top.values)


def _parts(lengths: Seq[int], start: int, count: int) -> Iterator[tuple[int, slice]]:
    """Which of the `count` rows from `start` on belong to which text; places within those rows."""
    for text, (first, end) in enumerate(pairwise(accumulate(lengths, initial=0))):
        low, high = max(first - start, 0), min(end - start, count)
        if low < high:
            yield text, slice(low, high)
