"""What michaelfeil's Infinity answers where its clients ask at our paths: classes and ranks in its own shapes.

Its requests are ours but for `raw_scores`, which its clients always send and no other client does: that tells them.
"""

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, Struct, UnsetType

from carpool.server.protocol.tei import TeiPrediction
from carpool.server.protocol.usage import Usage


class InfinityClassifyResponse(Struct, kw_only=True, gc=False):
    """`data`: of each text its classes, the likeliest first."""

    id: str
    object: Literal["classify"] = "classify"
    created: int
    model: str
    data: list[list[TeiPrediction]]
    usage: Usage


class InfinityRanked(Struct, gc=False):
    """Voyage's are the same."""

    index: int
    relevance_score: float
    document: str | UnsetType = UNSET


class InfinityRerankResponse(Struct, kw_only=True, gc=False):
    id: str
    object: Literal["rerank"] = "rerank"
    created: int
    model: str
    results: list[InfinityRanked]
    usage: Usage
