"""Agreement: whether two engines mean the same vectors, asked before either is timed."""

from __future__ import annotations

import numpy as np

from contestants import Vectors

_LEAST = {"float32": 0.99999, "int8": 0.98}  # cosine
_LEAST_IN_16_BITS = 0.999


def agreed_cosine(who: str, dtype: str, vectors: Vectors, reference: Vectors) -> float:
    """The lowest cosine of the rows of two [B, D]. Raises SystemExit if it is too low for `dtype`."""
    lengths = np.linalg.norm(vectors, axis=1) * np.linalg.norm(reference, axis=1)
    lowest = float(((vectors * reference).sum(axis=1) / lengths).min())
    least = _LEAST.get(dtype, _LEAST_IN_16_BITS)
    if not lowest >= least:  # nor if it is no number
        raise SystemExit(f"{who} has other vectors than the reference: cosine {lowest:.6f}, not {least}")
    return lowest
