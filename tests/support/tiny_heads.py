"""Tiny checkpoints with heads, beside those of `tiny`: classifiers, cross-encoders, reward models and rerankers.

Each is saved by transformers' own class, so config.json and the names of the weights are those of published ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from tiny import HIDDEN, byte_bpe, edit_json, inflate, save_tokenizer, unigram, wordpiece

MOODS = ("negative", "neutral", "positive")
STEP = "<extra_0>"
EOD = "<|endoftext|>"
# As published rerankers of causal models ask their question.
SCORE_TEMPLATE = (
    "{{ instruction | default('judge') }}: "
    "{{ messages | selectattr('role', 'eq', 'query') | map(attribute='content') | first }} ? "
    "{{ messages | selectattr('role', 'eq', 'document') | map(attribute='content') | first }} ="
)


def _save(path: Path, auto: Any, model_type: str, labels: tuple[str, ...] | int = 0, **config: Any) -> None:
    """`labels`: their names, or how many there are, of no names."""
    path.mkdir(parents=True, exist_ok=True)
    named = {"num_labels": labels} if isinstance(labels, int) else {"id2label": dict(enumerate(labels))}
    sizes = {
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
    }
    made = AutoConfig.for_model(model_type, **{**sizes, **named, **config})
    model = auto.from_config(made)
    inflate(model)
    model.save_pretrained(path)


def _bert(
    path: Path, labels: tuple[str, ...] | int, auto: Any = AutoModelForSequenceClassification, **config: Any
) -> None:
    tokenizer = wordpiece()
    _save(
        path, auto, "bert", labels, **{"vocab_size": tokenizer.get_vocab_size(), "pad_token_id": 0, **config}
    )
    _save_wordpiece(tokenizer, path)


def _save_wordpiece(tokenizer: Tokenizer, path: Path) -> None:
    save_tokenizer(tokenizer, path, pad="[PAD]", tokenizer_class="BertTokenizer", model_max_length=128,
                   unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")  # fmt: skip


def bert_3(path: Path) -> None:
    """Three moods, one of which applies."""
    _bert(path, MOODS, problem_type="single_label_classification")


def bert_2(path: Path) -> None:
    """Two labels without names; config.json then says nothing of them."""
    _bert(path, 2)


def bert_multilabel(path: Path) -> None:
    """Any of four labels applies."""
    _bert(path, ("a", "b", "c", "d"), problem_type="multi_label_classification")


def bert_regression(path: Path) -> None:
    """One number of any size."""
    _bert(path, 1, problem_type="regression")


def bert_cross(path: Path) -> None:
    """A cross-encoder that, as ms-marco's, wants its logit as it is."""
    _bert(path, 1, sentence_transformers={"activation_fn": "torch.nn.modules.linear.Identity"})


def bert_tokens(path: Path) -> None:
    """A label a token."""
    _bert(path, ("O", "B-PER", "I-PER", "B-LOC", "I-LOC"), AutoModelForTokenClassification)


def albert_3(path: Path) -> None:
    """Its pooler is a bare layer, its embeddings are narrower than its layers."""
    tokenizer = wordpiece()
    _save(path, AutoModelForSequenceClassification, "albert", MOODS, vocab_size=tokenizer.get_vocab_size(),
          embedding_size=16, pad_token_id=0)  # fmt: skip
    _save_wordpiece(tokenizer, path)


def distilbert_2(path: Path) -> None:
    """A head of its own, ReLU in the middle, and no token types."""
    tokenizer = wordpiece()
    _save(path, AutoModelForSequenceClassification, "distilbert", ("NEGATIVE", "POSITIVE"), dim=HIDDEN, hidden_dim=48,
          n_layers=2, n_heads=4, vocab_size=tokenizer.get_vocab_size(), pad_token_id=0)  # fmt: skip
    _save_wordpiece(tokenizer, path)


def _xlmr(path: Path, labels: tuple[str, ...] | int) -> None:
    tokenizer = unigram()
    _save(path, AutoModelForSequenceClassification, "xlm-roberta", labels, vocab_size=tokenizer.get_vocab_size(),
          max_position_embeddings=130, type_vocab_size=1, pad_token_id=1, bos_token_id=0, eos_token_id=2)  # fmt: skip
    save_tokenizer(tokenizer, path, pad="<pad>", tokenizer_class="PreTrainedTokenizerFast", model_max_length=128,
                   bos_token="<s>", eos_token="</s>", cls_token="<s>", sep_token="</s>", unk_token="<unk>")  # fmt: skip


def xlmr_cross(path: Path) -> None:
    """A cross-encoder like bge-reranker: one label, two separators, a sigmoid."""
    _xlmr(path, 1)


def _byte_level(
    path: Path, tokenizer: Tokenizer, auto: Any, model_type: str, pad: str, labels: Any, **config: Any
) -> None:
    _save(path, auto, model_type, labels, **{"vocab_size": tokenizer.get_vocab_size(), **config})
    save_tokenizer(tokenizer, path, pad=pad, tokenizer_class="PreTrainedTokenizerFast", model_max_length=128,
                   eos_token=pad)  # fmt: skip


def modernbert_mean(path: Path) -> None:
    """Its classifier was trained on the mean of all rows, and config.json says so."""
    tokenizer = byte_bpe(before=["[CLS]"], after=["[SEP]"], pad="[PAD]")
    _byte_level(path, tokenizer, AutoModelForSequenceClassification, "modernbert", "[PAD]", MOODS,
                classifier_pooling="mean", num_hidden_layers=4, local_attention=8, pad_token_id=0, bos_token_id=1,
                eos_token_id=2, cls_token_id=1, sep_token_id=2)  # fmt: skip


_CAUSAL: Mapping[str, Any] = {
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def eurobert_late(path: Path) -> None:
    """Bidirectional; its classifier takes the mean of the logits of all rows."""
    tokenizer = byte_bpe(before=["<s>"], after=[EOD], pad=EOD)
    _byte_level(path, tokenizer, AutoModelForSequenceClassification, "eurobert", EOD, MOODS,
                classifier_pooling="late", mask_token_id=0, **_CAUSAL)  # fmt: skip


def _qwen2(path: Path, labels: Any, auto: Any = AutoModelForSequenceClassification, **config: Any) -> None:
    tokenizer = byte_bpe()
    _byte_level(path, tokenizer, auto, "qwen2", EOD, labels, **{**_CAUSAL, **config})


def qwen2_3(path: Path) -> None:
    """A causal model's last token, scored; nobody thought of a pad token."""
    _qwen2(path, MOODS, pad_token_id=None)


def qwen2_cross(path: Path) -> None:
    """A causal model with one label: query and document are one text."""
    _qwen2(path, 1)


def _with_reward_head(path: Path, architecture: str, labels: int) -> None:
    """Qwen2.5-Math-RM and -PRM: a backbone and `score` = linear, ReLU, linear."""
    tokenizer = byte_bpe()
    tokenizer.add_special_tokens([STEP])
    _byte_level(path, tokenizer, AutoModel, "qwen2", EOD, labels, **_CAUSAL)
    generator = torch.Generator().manual_seed(3)
    weights = {f"model.{name}": weight for name, weight in load_file(path / "model.safetensors").items()}
    for layer, width in ((0, HIDDEN), (2, labels)):
        weights[f"score.{layer}.weight"] = torch.randn(width, HIDDEN, generator=generator) * 0.3
        weights[f"score.{layer}.bias"] = torch.randn(width, generator=generator)
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    edit_json(path / "config.json", architectures=[architecture])


def qwen2_reward(path: Path) -> None:
    """A reward a token."""
    _with_reward_head(path, "Qwen2ForRewardModel", 1)


def qwen2_prm(path: Path) -> None:
    """Good or bad, at each step tag."""
    _with_reward_head(path, "Qwen2ForProcessRewardModel", 2)


def qwen3_lm(path: Path) -> None:
    """A language model that knows yes, no, + and -; a reranker or a judge of steps, if it is told so."""
    tokenizer = byte_bpe()
    tokenizer.add_tokens(["yes", "no"])
    tokenizer.add_special_tokens([STEP])
    _byte_level(path, tokenizer, AutoModelForCausalLM, "qwen3", EOD, 2, **_CAUSAL)


def gemma2_lm(path: Path) -> None:
    """A language model whose logits are soft-capped behind its head."""
    tokenizer = byte_bpe(before=["<bos>"], pad="<pad>")
    tokenizer.add_special_tokens([STEP])
    _byte_level(path, tokenizer, AutoModelForCausalLM, "gemma2", "<pad>", 2, final_logit_softcapping=1.0,
                query_pre_attn_scalar=8, **_CAUSAL)  # fmt: skip


def gemma3_both_ways(path: Path) -> None:
    """Looks both ways, and is scored at its last token all the same."""
    tokenizer = byte_bpe(before=["<bos>"], pad="<pad>")
    _byte_level(path, tokenizer, AutoModelForSequenceClassification, "gemma3_text", "<pad>", MOODS,
                use_bidirectional_attention=True, query_pre_attn_scalar=8, sliding_window=8, **_CAUSAL)  # fmt: skip


CLASSIFIERS: dict[str, Callable[[Path], None]] = {
    make.__name__: make
    for make in (
        bert_2,
        bert_3,
        bert_multilabel,
        bert_regression,
        bert_cross,
        albert_3,
        distilbert_2,
        xlmr_cross,
        modernbert_mean,
        eurobert_late,
        qwen2_3,
        qwen2_cross,
        gemma3_both_ways,
    )
}
FAMILIES: dict[str, Callable[[Path], None]] = {
    **CLASSIFIERS,
    **{make.__name__: make for make in (bert_tokens, qwen2_reward, qwen2_prm, qwen3_lm, gemma2_lm)},
}
