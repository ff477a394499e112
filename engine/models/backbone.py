"""Backbone: a transformers model that runs packed rows. `forward(PackedBatch) -> hidden [T, H]` is the seam."""

from __future__ import annotations

import copy
import inspect
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, PreTrainedConfig

from carpool.engine.models.attention import layout
from carpool.engine.models.lora import base_layer, riding
from carpool.engine.packing import PackedBatch


class Backbone:
    """One replica: its own modules, configuration and buffers over weights that all replicas share."""

    packing: Literal["packed", "padded"] = "packed"

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        takes = inspect.signature(module.forward).parameters
        anything = any(p.kind is p.VAR_KEYWORD for p in takes.values())
        self._extra: dict[str, Any] = {"use_cache": False} if "use_cache" in takes else {}
        self._takes_positions = anything or "position_ids" in takes
        # GPT-2 takes them as well and embeds them as if they were words.
        self._takes_types = "token_type_ids" in takes and any(
            isinstance(base_layer(getattr(child, "token_type_embeddings", None)), nn.Embedding)
            for child in module.modules()
        )
        self._pad_id = _position_pad_id(module)

    def forward(self, batch: PackedBatch) -> Tensor:
        """[T, H] in the model's dtype: the last layer's output, after the model's final norm."""
        inputs: dict[str, Any] = {"input_ids": batch.input_ids[None], **self._extra}
        if self._takes_positions:
            inputs["position_ids"] = self._positions(batch)[None]
        if self._takes_types:
            types = batch.token_type_ids
            inputs["token_type_ids"] = (
                torch.zeros_like(batch.input_ids)[None] if types is None else types[None]
            )
        with layout(batch), riding(batch.adapters, batch.lengths):
            hidden: Tensor = self.module(**inputs).last_hidden_state
        return hidden[0]

    def _positions(self, batch: PackedBatch) -> Tensor:
        """int64 [T]. RoBERTa counts from its pad id + 1 and skips pad tokens, wherever they stand."""
        if self._pad_id is None:
            return batch.position_ids
        real = (batch.input_ids != self._pad_id).long()
        count = real.cumsum(0)
        starts = batch.cu_seqlens[:-1].long()
        before = (count - real)[starts]  # tokens counted before each sequence began
        lengths = batch.cu_seqlens.diff().long()
        return (count - torch.repeat_interleave(before, lengths, output_size=len(real))) * real + self._pad_id

    def replica(self) -> Backbone:
        """A second one for another thread: weights aliased, everything else copied."""
        return Backbone(self._copied())

    def _copied(self) -> nn.Module:
        shared: dict[int, Any] = {id(weight): weight for weight in self.module.parameters()}
        return copy.deepcopy(self.module, shared)

    @property
    def hidden_size(self) -> int:
        """H: the width of what `forward` returns."""
        return hidden_size(self.module.config)

    @property
    def is_causal(self) -> bool:
        """Whether its attention layers look only backwards by their class's nature, whatever this one was told."""
        if getattr(self.module.config.get_text_config(), "use_bidirectional_attention", None) is True:  # type: ignore[union-attr,operator]
            return True  # Gemma 3, whose layers say what they were told
        natures = [getattr(module, "is_causal", None) for module in self.module.modules()]
        if any(nature is not None for nature in natures):
            return any(natures)
        # No attention layer says: a recurrent model, or one of the oldest classes. What it is trained for tells.
        kind = type(self.module.config)
        return kind in MODEL_FOR_CAUSAL_LM_MAPPING and kind not in MODEL_FOR_MASKED_LM_MAPPING

    @property
    def max_positions(self) -> int | None:
        """Tokens that a table of learned positions has rows for; None where positions are computed."""
        for module in self.module.modules():
            table = base_layer(getattr(module, "position_embeddings", None))
            if isinstance(table, nn.Embedding):
                return table.num_embeddings - (0 if self._pad_id is None else self._pad_id + 1)
        return None


def hidden_size(config: PreTrainedConfig) -> int:
    """H of a model of this configuration."""
    text = config.get_text_config()
    # OPT's last layer may be followed by a projection to the width of its word vectors.
    return int(text.word_embed_proj_dim if text.model_type == "opt" else text.hidden_size)


def _position_pad_id(module: nn.Module) -> int | None:
    """The pad id that offsets positions in the RoBERTa family; None elsewhere."""
    for child in module.modules():
        table = base_layer(getattr(child, "position_embeddings", None))
        if isinstance(table, nn.Embedding) and isinstance(getattr(child, "padding_idx", None), int):
            return int(child.padding_idx)  # type: ignore[arg-type]
    return None
