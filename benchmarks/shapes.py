"""Shapes: checkpoints with the shape of a known model and random weights, for what no bundled model has.

Speed does not depend on what the weights are. All use the bundled model's tokenizer.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ModernBertConfig,
    ModernBertModel,
    PreTrainedModel,
)

from carpool.engine.hub import locate

LONGEST = 8192  # tokens, of ModernBERT


def reranker(folder: Path) -> Path:
    """A cross-encoder of MiniLM's shape: six layers of 384, one score."""
    config = BertConfig.from_pretrained(locate(""))
    config.num_labels = 1
    return _saved(BertForSequenceClassification, config, folder)


def modernbert(folder: Path, layers: int) -> Path:
    """ModernBERT-base cut to `layers`: 768 wide, 12 heads of 64, every third layer sees everything, the rest 64 tokens
    to each side.
    """
    vocabulary = BertConfig.from_pretrained(locate("")).vocab_size
    config = ModernBertConfig(
        vocab_size=vocabulary,
        num_hidden_layers=layers,
        max_position_embeddings=LONGEST,
        pad_token_id=0,
        cls_token_id=101,
        sep_token_id=102,
        bos_token_id=101,
        eos_token_id=102,
    )
    return _saved(ModernBertModel, config, folder)


def _saved(kind: type[PreTrainedModel], config: object, folder: Path) -> Path:
    torch.manual_seed(1)
    kind(config).save_pretrained(folder)
    lent = locate("")
    for name in ("tokenizer.json", "special_tokens_map.json", "vocab.txt"):
        shutil.copy(lent / name, folder)
    # Without the bundled model's own limit of length.
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return folder
