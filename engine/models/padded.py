"""PaddedBackbone: the fallback for models that cannot be packed. transformers' own attention, on [B, L] with a mask.

Sequences of near lengths share a call, padded on the right to the longest of them; for a model whose results change
with the padding only those of exactly equal lengths do, and nothing is padded at all. The hidden states are put back
into a packed row, so that nothing behind the backbone knows the difference.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from carpool.engine.models.backbone import Backbone
from carpool.engine.models.lora import riding
from carpool.engine.packing import PackedBatch
from carpool.engine.staging import upload

# The shortest of a group has at least this part of the tokens of its longest: at most a quarter of a call is padding.
_NEAR = 0.75


class PaddedBackbone(Backbone):
    """`attention` is one of transformers' own; `pads`: whether shorter sequences may be padded to longer ones."""

    packing = "padded"

    def __init__(self, module: nn.Module, *, attention: str, pads: bool) -> None:
        super().__init__(module)
        self._attention, self.pads = attention, pads
        for child in module.modules():
            config: Any = getattr(child, "config", None)
            if config is not None:
                config._attn_implementation = attention
        takes = inspect.signature(module.forward).parameters
        self._takes_mask = "attention_mask" in takes or any(p.kind is p.VAR_KEYWORD for p in takes.values())
        # Which id does not matter: it is masked. A model with a table of its own for it expects its own.
        self._pad_token = getattr(module.config.get_text_config(), "pad_token_id", None) or 0  # type: ignore[union-attr, operator]

    def forward(self, batch: PackedBatch) -> Tensor:
        """[T, H] in the model's dtype, as `Backbone.forward`."""
        lengths, starts = np.array(batch.lengths), np.array(batch.bounds)
        rows, places = [], []
        for group in self._groups(batch.lengths):
            shape = len(group), int(lengths[group].max())
            place = np.arange(shape[1])
            mask = place < lengths[group, None]  # [B, L], as everything here is found out on the host
            lies = np.where(mask, starts[group, None] + place, 0)
            index, real, kept, lay = upload(
                batch.input_ids.device, lies.ravel(), mask.ravel(), np.flatnonzero(mask), lies[mask]
            )
            slots = [batch.adapters[i] for i in group] if batch.adapters else []
            hidden = self._run(batch, index.view(shape), real.view(shape), slots)
            rows.append(hidden.flatten(0, 1)[kept])
            places.append(lay)
        together = torch.cat(rows)
        return torch.empty_like(together).index_copy_(0, torch.cat(places), together)

    def _run(self, batch: PackedBatch, index: Tensor, real: Tensor, slots: Seq[int]) -> Tensor:
        """index int64 and real bool [B, L]: where each token lies in the row, and whether it is one → [B, L, H]."""
        inputs: dict[str, Any] = {"input_ids": batch.input_ids[index].masked_fill(~real, self._pad_token)}
        if self._takes_mask:
            inputs["attention_mask"] = real.long()
        if self._takes_types:
            types = batch.token_type_ids
            inputs["token_type_ids"] = (
                torch.zeros_like(index) if types is None else types[index].masked_fill(~real, 0)
            )
        with riding(slots, [real.shape[1]] * len(real)):
            hidden: Tensor = self.module(**inputs, **self._extra).last_hidden_state
        return hidden

    def _groups(self, lengths: Seq[int]) -> Iterator[list[int]]:
        """The sequences that share a call: from the longest down, those near enough to the first of a group."""
        group: list[int] = []
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            if group and lengths[i] < lengths[group[0]] * (_NEAR if self.pads else 1):
                yield group
                group = []
            group.append(i)
        yield group

    def replica(self) -> PaddedBackbone:
        return PaddedBackbone(self._copied(), attention=self._attention, pads=self.pads)
