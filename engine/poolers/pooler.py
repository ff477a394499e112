"""Pooler: hidden states of a packed batch to one result a sequence, whatever mix of tasks rides in it.

A pooler is a method (which rows) and the heads behind it (what becomes of them). All of it is float32.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from carpool.engine.checkpoint import PoolingMode
from carpool.engine.poolers.methods import METHODS
from carpool.engine.sequence import Sequence
from carpool.kernels.reference import cut_and_normalize


class Pooler:
    """`modes` are concatenated; `dense` follows; then Matryoshka cut and normalisation by each one's params."""

    def __init__(
        self, modes: Seq[PoolingMode], dense: Seq[nn.Module], normalize: bool, dimensions: int | None
    ) -> None:
        self._methods = [METHODS[mode] for mode in modes]
        self._dense = nn.Sequential(*dense)
        self._normalize = normalize
        self._dimensions = dimensions

    def __call__(
        self, hidden: Tensor, cu_seqlens: Tensor, sequences: Seq[Sequence]
    ) -> list[NDArray[np.float32]]:
        """hidden [T, H], cu_seqlens [B+1] → for each sequence float32 [D], or [tokens, D] for a token task."""
        results: list[NDArray[np.float32] | None] = [None] * len(sequences)
        whole = [i for i, seq in enumerate(sequences) if seq.task == "embed"]
        if whole:
            vectors = self._vectors(hidden, cu_seqlens)
            if len(whole) < len(sequences):
                vectors = vectors[whole]
            for i, row in zip(whole, self._finish(vectors, [sequences[i] for i in whole]), strict=True):
                results[i] = row
        bounds = cu_seqlens.tolist()
        for i, seq in enumerate(sequences):
            if seq.task == "token_embed":
                rows = self._dense(hidden[bounds[i] : bounds[i + 1]].float())
                results[i] = np.stack(self._finish(rows, [seq] * len(rows)))
        return [result for result in results if result is not None]

    def _vectors(self, hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
        """float32 [B, D]."""
        pooled = [method(hidden, cu_seqlens) for method in self._methods]
        vectors: Tensor = self._dense(pooled[0] if len(pooled) == 1 else torch.cat(pooled, dim=1))
        return vectors

    def _finish(self, vectors: Tensor, sequences: Seq[Sequence]) -> list[NDArray[np.float32]]:
        """Cut and normalise each row as its request asks: one pass, one copy to the host, then views."""
        native = vectors.shape[1]
        widths = [seq.params.dimensions or self._dimensions or native for seq in sequences]
        wanted = [seq.params.use_activation for seq in sequences]
        normalize = [self._normalize if wish is None else wish for wish in wanted]
        device = vectors.device
        finished = cut_and_normalize(
            vectors, torch.tensor(widths, device=device), torch.tensor(normalize, device=device)
        )
        host: NDArray[np.float32] = finished.cpu().numpy()
        return [row[:width] for row, width in zip(host, widths, strict=True)]
