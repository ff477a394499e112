"""The text side of models of texts and images; the reference is the whole published model."""

from __future__ import annotations

from collections.abc import Callable
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


class WholeReference:
    """The last token of the whole model's hidden states, given a text."""

    def __init__(self, folder: Path) -> None:
        self._model: Any = transformers.AutoModel.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()

    @torch.no_grad()
    def __call__(
        self, task: Task, ids: list[int], types: list[int] | None = None, adapter: str | None = None
    ) -> Tensor:
        row = torch.tensor([ids])
        hidden = self._model(input_ids=row, attention_mask=torch.ones_like(row)).last_hidden_state[0]
        return nn.functional.normalize(hidden[-1] if task == "embed" else hidden, dim=-1)


_LANGUAGE: dict[str, Any] = {
    **_TEXT,
    "vocab_size": 420,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
QWEN3_VISION: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "out_hidden_size": 32,
    "deepstack_visual_indexes": [0],
}
MARK_IDS = {
    "image_token_id": 410,
    "video_token_id": 411,
    "vision_start_token_id": 412,
    "vision_end_token_id": 413,
}


def _with_images(model: str, config: Callable[[], Any]) -> Callable[[Path], Reference]:
    def make(folder: Path) -> Reference:
        tokenizer = tiny.byte_bpe(after=["<|endoftext|>"])
        whole = getattr(transformers, model)(config()).eval()
        tiny.inflate(whole)
        whole.save_pretrained(folder)
        pad = "<|endoftext|>"
        tiny.save_tokenizer(
            tokenizer, folder, pad=pad, tokenizer_class="PreTrainedTokenizerFast", model_max_length=256
        )
        return WholeReference(folder)

    return make


def qwen3_vl() -> Any:
    return transformers.Qwen3VLConfig(
        text_config={**_LANGUAGE, "rope_parameters": MROPE},
        vision_config=QWEN3_VISION,
        **MARK_IDS,
    )


def gemma3() -> Any:
    return transformers.Gemma3Config(
        text_config={**_LANGUAGE, "sliding_window": 8, "query_pre_attn_scalar": 8},
        vision_config={**_VISION, "image_size": 28, "patch_size": 14},
        image_token_index=410,
        mm_tokens_per_image=4,
    )


MEMBERS: tuple[Member, ...] = (
    Member("openai/clip-vit-base-patch32", "CLIPModel", _clip, note="text tower"),
    Member(
        "google/siglip2-base-patch16-224", "SiglipModel", _siglip, note="text tower; prompts filled up to 64"
    ),
    Member(
        "Qwen/Qwen3-VL-Embedding-2B",
        "Qwen3VLForConditionalGeneration",
        _with_images("Qwen3VLForConditionalGeneration", qwen3_vl),
        ("embed", "token_embed"),
        note="texts",
    ),
    Member(
        "google/gemma-3-4b-pt",
        "Gemma3ForConditionalGeneration",
        _with_images("Gemma3ForConditionalGeneration", gemma3),
        ("embed", "token_embed"),
        note="texts",
    ),
)
