"""StretchingBackbone: rotary positions whose frequencies follow the longest prompt of a call (dynamic, longrope).

Up to the length that the model was trained for they stand still, and all prompts share a row as ever. Longer ones
share a row only with those of exactly their length: a result then depends on nothing but the prompt itself. What
transformers keeps of a long call for the next is put back after it.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from carpool.engine.models.backbone import Backbone
from carpool.engine.packing import PackedBatch, select


def stretches_beyond(config: PreTrainedConfig) -> int | None:
    """Tokens up to which the rotary frequencies of this model stand still; None for one that never stretches."""
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    each = [
        rope,
        *(layer for layer in rope.values() if isinstance(layer, dict)),
    ]  # one for all, or one a layer type
    positions = getattr(text, "max_position_embeddings", None) or 0
    return min(
        (
            min(positions, int(own.get("original_max_position_embeddings") or positions))
            for own in each
            if "dynamic" in (kind := str(own.get("rope_type"))) or kind == "longrope"
        ),
        default=None,
    )


class StretchingBackbone(Backbone):
    """`inner` runs what may ride together; `limit`: tokens up to which everything may."""

    def __init__(self, inner: Backbone, limit: int) -> None:
        super().__init__(inner.module)
        self.packing = inner.packing
        self._inner, self.limit = inner, limit
        # As it is before any call. Buffers are replaced and not written to, or else made anew by every call.
        self._fresh = [
            (module, {**vars(module), "_buffers": dict(module._buffers)})
            for module in inner.module.modules()
            if hasattr(module, "rope_type")
        ]

    def forward(self, batch: PackedBatch) -> Tensor:
        """[T, H] in the model's dtype, as `Backbone.forward`."""
        groups: defaultdict[int, list[int]] = defaultdict(list)
        for i, length in enumerate(batch.lengths):
            groups[max(length, self.limit)].append(i)
        if len(groups) == 1:
            return self._alike(batch)
        rows, places = [], []
        for group in groups.values():
            alike, place = select(batch, group)
            rows.append(self._alike(alike))
            places.append(place)
        together = torch.cat(rows)
        return torch.empty_like(together).index_copy_(0, torch.cat(places), together)

    def _alike(self, batch: PackedBatch) -> Tensor:
        """Sequences within the limit, or all of one length."""
        try:
            return self._inner.forward(batch)
        finally:
            if batch.max_seqlen > self.limit:
                self._forget()

    def _forget(self) -> None:
        for module, fresh in self._fresh:
            state: dict[str, Any] = vars(module)
            state.clear()
            state.update({**fresh, "_buffers": dict(fresh["_buffers"])})

    def replica(self) -> StretchingBackbone:
        return StretchingBackbone(self._inner.replica(), self.limit)
