"""Text towers of models of texts and images; the reference is the whole published model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from torch import Tensor, nn

import tiny
from carpool.engine.params import Task
from zoo.member import Member, Reference


def _make(folder: Path, config: Any, model: Any, tokenizer: Tokenizer, pad: str) -> Any:
    whole = model(config).eval()
    tiny.inflate(whole)
    whole.save_pretrained(folder)
    length = config.text_config.max_position_embeddings
    tiny.save_tokenizer(
        tokenizer, folder, pad=pad, tokenizer_class="PreTrainedTokenizerFast", model_max_length=length
    )
    return whole


_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
_TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


class TowerReference:
    """The published model's text features of one row, which `pad_to` fills up with the pad token."""

    def __init__(self, whole: Any, pad_to: int = 0, pad_id: int = 0) -> None:
        self._whole = whole
        self._pad_to = pad_to
        self._pad_id = pad_id

    @torch.no_grad()
    def __call__(
        self, task: Task, ids: list[int], types: list[int] | None = None, adapter: str | None = None
    ) -> Tensor:
        row = torch.tensor([ids + [self._pad_id] * (self._pad_to - len(ids))])
        features = self._whole.get_text_features(input_ids=row)
        pooled: Tensor = features if isinstance(features, Tensor) else features.pooler_output
        return nn.functional.normalize(pooled[0], dim=0)


def _clip(folder: Path) -> Reference:
    tokenizer = tiny.byte_bpe(before=["<|startoftext|>"], after=["<|endoftext|>"], pad="<|endoftext|>")
    ids = {"bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 0}
    text = {**_TEXT, **ids, "vocab_size": tokenizer.get_vocab_size(), "max_position_embeddings": 77}
    config = transformers.CLIPConfig(text_config=text, vision_config=_VISION, projection_dim=24)
    return TowerReference(_make(folder, config, transformers.CLIPModel, tokenizer, "<|endoftext|>"))


def _siglip(folder: Path) -> Reference:
    tokenizer = tiny.byte_bpe(after=["</s>"], pad="</s>")
    ids = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    text = {**_TEXT, **ids, "vocab_size": tokenizer.get_vocab_size(), "max_position_embeddings": 64}
    config = transformers.SiglipConfig(text_config=text, vision_config=_VISION)
    return TowerReference(_make(folder, config, transformers.SiglipModel, tokenizer, "</s>"), pad_to=64)


MEMBERS: tuple[Member, ...] = (
    Member("openai/clip-vit-base-patch32", "CLIPModel", _clip, note="text tower"),
    Member(
        "google/siglip2-base-patch16-224", "SiglipModel", _siglip, note="text tower; prompts filled up to 64"
    ),
)
