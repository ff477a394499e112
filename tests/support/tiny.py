"""Tiny seeded checkpoints, made on the spot: one per family of models, in the file layout of published ones.

Weights are random and inflated: a token that sees its neighbour in the packed row, a wrong position or a wrong
pooling then changes results by O(1) and not in the fourth decimal. Every tokenizer.json is saved with truncation
and padding switched on, as many published ones are, so that whoever forgets to clear them is caught.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

WORDS = ["the", "cat", "sat", "on", "a", "mat", "rain", "in", "spain", "falls", "where", "ice", "cream", "un", "able",
         "ly", "ing", "ed", "night", "day", "war", "and", "peace"]  # fmt: skip
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,!?-'"
HIDDEN = 32

# Texts that between them are of length 1, of equal lengths, longer than every sliding window, empty, and foreign.
TEXTS = [
    "the cat sat on a mat",
    "a",
    "rain in spain falls where the cat sat",
    "ice cream",
    "war and peace, night and day! " * 8,
    "",
    "unable",
    "day night",
    "the rain sat on the cat, and the cat was not able to be where the ice cream falls in spain at night",
    "naïve Ünïcode 雨 ☂",
]


# ── tokenizers ───────────────────────────────────────────────────────────────────────────────────────────────


def wordpiece() -> Tokenizer:
    """BERT: [PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3, [MASK] 4; [CLS] text [SEP]; lower case."""
    entries = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *("##" + c for c in LETTERS)]
    entries += [word for word in WORDS if len(word) > 1] + ["##able", "##ing"]
    vocab = {entry: i for i, entry in enumerate(dict.fromkeys(entries))}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return tokenizer


def unigram() -> Tokenizer:
    """XLM-RoBERTa: <s> 0, <pad> 1, </s> 2, <unk> 3; <s> text </s>."""
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    pieces += [(c, -6.0) for c in LETTERS] + [("▁" + word, -4.0) for word in WORDS]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=3, byte_fallback=False))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return tokenizer


def byte_bpe(before: Seq[str] = (), after: Seq[str] = (), pad: str = "<|endoftext|>") -> Tokenizer:
    """Byte-level BPE (Qwen, ModernBERT, Mistral …) with the given special tokens around each text."""
    specials = list(dict.fromkeys([pad, *before, *after]))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {entry: i for i, entry in enumerate([*specials, *alphabet])}
    merges = []
    for word in WORDS:
        left = "Ġ"
        for letter in word:
            if left + letter not in vocab:
                vocab[left + letter] = len(vocab)
                merges.append((left, letter))
            left += letter
    for blank in ("Ġ", "Ċ"):  # runs of blanks become one token each, as in real vocabularies
        for length in (1, 2, 4):
            vocab.setdefault(blank * length * 2, len(vocab))
            merges.append((blank * length, blank * length))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    if before or after:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join([*before, "$A", *after]),
            special_tokens=[(name, vocab[name]) for name in specials],
        )
    return tokenizer


def save_tokenizer(
    tokenizer: Tokenizer, path: Path, *, pad: str, tokenizer_class: str, **config: Any
) -> None:
    """tokenizer.json and tokenizer_config.json, with a truncation and a padding that must not be obeyed."""
    tokenizer.enable_truncation(6)
    tokenizer.enable_padding(length=6, pad_id=tokenizer.token_to_id(pad), pad_token=pad)
    tokenizer.save(str(path / "tokenizer.json"))
    write_json(
        path / "tokenizer_config.json", {"tokenizer_class": tokenizer_class, "pad_token": pad, **config}
    )


# ── sentence-transformers' side files ────────────────────────────────────────────────────────────────────────

_OLD = "sentence_transformers.models."
_NEW = {
    "Transformer": "sentence_transformers.base.modules.transformer.Transformer",
    "Pooling": "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
    "Dense": "sentence_transformers.base.modules.dense.Dense",
    "Normalize": "sentence_transformers.sentence_transformer.modules.normalize.Normalize",
}
_OLD_MODES = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
ST_MODES = tuple(_OLD_MODES)


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1))


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON object in place; a change to `...` removes the key."""
    value = {**json.loads(path.read_text()), **changes}
    write_json(path, {key: item for key, item in value.items() if item is not ...})


def sentence_transformers_files(
    path: Path,
    modes: Seq[str] = ("mean",),
    *,
    dialect: str = "old",
    dense: Seq[tuple[int, int, str]] = (),
    normalize: bool = True,
    max_seq_length: int | None = None,
    lowercase: bool = False,
    prompts: Mapping[str, str] | None = None,
) -> None:
    """modules.json and what it names, in the dialect before version 6 ("old") or since ("new").

    `modes` are the new names; `dense` lists (in, out, activation's class name in torch.nn.modules).
    """
    kinds = ["Transformer", "Pooling", *["Dense"] * len(dense), *["Normalize"] * normalize]
    modules = [
        {
            "idx": i,
            "name": str(i),
            "path": f"{i}_{kind}" if i else "",
            "type": _OLD + kind if dialect == "old" else _NEW[kind],
        }
        for i, kind in enumerate(kinds)
    ]
    write_json(path / "modules.json", modules)
    pooling: dict[str, Any]
    if dialect == "old":
        pooling = {
            "word_embedding_dimension": HIDDEN,
            **{key: mode in modes for mode, key in _OLD_MODES.items()},
        }
    else:
        pooling = {
            "embedding_dimension": HIDDEN,
            "pooling_mode": modes[0] if len(modes) == 1 else list(modes),
        }
    write_json(path / "1_Pooling" / "config.json", {**pooling, "include_prompt": True})
    generator = torch.Generator().manual_seed(11)
    for i, (inner, outer, activation) in enumerate(dense, start=2):
        folder = path / f"{i}_Dense"
        write_json(
            folder / "config.json",
            {"in_features": inner, "out_features": outer, "bias": True, "activation_function": activation},
        )
        weight = torch.randn(outer, inner, generator=generator) * inner**-0.5
        bias = torch.randn(outer, generator=generator)
        save_file({"linear.weight": weight, "linear.bias": bias}, folder / "model.safetensors")
    write_json(
        path / "sentence_bert_config.json", {"max_seq_length": max_seq_length, "do_lower_case": lowercase}
    )
    write_json(path / "config_sentence_transformers.json", {"prompts": dict(prompts or {})})


# ── families ─────────────────────────────────────────────────────────────────────────────────────────────────


def inflate(model: nn.Module, seed: int = 0) -> None:
    """Weights so large that attention is peaked and every difference shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim >= 2:
                weight.copy_(noise * (0.5 if "embed" in name else 1.2 * weight.shape[-1] ** -0.5))
            elif "norm" in name.lower() and name.endswith("weight"):
                weight.add_(0.1 * noise)
            else:
                weight.copy_(0.1 * noise)


def _save_model(path: Path, model_type: str, *, causal_lm: bool = False, **config: Any) -> None:
    path.mkdir(parents=True, exist_ok=True)
    made = AutoConfig.for_model(
        model_type,
        **{
            "hidden_size": HIDDEN,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            **config,
        },
    )
    model = (AutoModelForCausalLM if causal_lm else AutoModel).from_config(made)
    inflate(model)
    model.save_pretrained(path)


def bert(path: Path) -> None:
    """MEAN and Normalize; the everyday embedding model."""
    tokenizer = wordpiece()
    _save_model(path, "bert", vocab_size=tokenizer.get_vocab_size(), pad_token_id=0)
    save_tokenizer(tokenizer, path, pad="[PAD]", tokenizer_class="BertTokenizer", model_max_length=128,
                   unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")  # fmt: skip
    sentence_transformers_files(path)


def xlmr(path: Path) -> None:
    """Positions that start behind the pad id; CLS; no sentence-transformers files."""
    tokenizer = unigram()
    _save_model(path, "xlm-roberta", vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=130,
                type_vocab_size=1, pad_token_id=1, bos_token_id=0, eos_token_id=2)  # fmt: skip
    save_tokenizer(tokenizer, path, pad="<pad>", tokenizer_class="PreTrainedTokenizerFast", model_max_length=128,
                   bos_token="<s>", eos_token="</s>", cls_token="<s>", sep_token="</s>", unk_token="<unk>")  # fmt: skip


def roberta(path: Path) -> None:
    """The same layout under its older name, with CLS named by sentence-transformers' new dialect."""
    tokenizer = unigram()
    _save_model(path, "roberta", vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=130,
                type_vocab_size=1, pad_token_id=1, bos_token_id=0, eos_token_id=2)  # fmt: skip
    save_tokenizer(tokenizer, path, pad="<pad>", tokenizer_class="PreTrainedTokenizerFast", model_max_length=128,
                   bos_token="<s>", eos_token="</s>", cls_token="<s>", sep_token="</s>", unk_token="<unk>")  # fmt: skip
    sentence_transformers_files(path, ["cls"], dialect="new", max_seq_length=100)


def _byte_level(path: Path, tokenizer: Tokenizer, model_type: str, pad: str, **config: Any) -> None:
    _save_model(path, model_type, vocab_size=tokenizer.get_vocab_size(), **config)
    save_tokenizer(
        tokenizer,
        path,
        pad=pad,
        tokenizer_class="PreTrainedTokenizerFast",
        model_max_length=128,
        eos_token=pad,
    )


_GROUPED = {
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def qwen2(path: Path) -> None:
    """Causal, saved as a language model; no side files: LAST by its class."""
    tokenizer = byte_bpe(after=["<|endoftext|>"])
    _byte_level(path, tokenizer, "qwen2", "<|endoftext|>", causal_lm=True, **_GROUPED)


def qwen3(path: Path) -> None:
    """Causal, query and key norms, LAST by sentence-transformers, widths down to 8 allowed."""
    tokenizer = byte_bpe(after=["<|endoftext|>"])
    _byte_level(path, tokenizer, "qwen3", "<|endoftext|>", is_matryoshka=True, **_GROUPED)
    sentence_transformers_files(path, ["lasttoken"], prompts={"query": "Instruct: find\nQuery: "})


def mistral(path: Path) -> None:
    """Causal with a sliding window that most texts exceed."""
    tokenizer = byte_bpe(before=["<s>"], after=["</s>"], pad="</s>")
    _byte_level(path, tokenizer, "mistral", "</s>", sliding_window=8, **_GROUPED)
    sentence_transformers_files(path, ["weightedmean"], dialect="new", normalize=False)


def modernbert(path: Path) -> None:
    """Bidirectional; layers alternate between everything and a window of 4 on each side."""
    tokenizer = byte_bpe(before=["[CLS]"], after=["[SEP]"], pad="[PAD]")
    _byte_level(path, tokenizer, "modernbert", "[PAD]", num_hidden_layers=4, local_attention=8,
                pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)  # fmt: skip
    sentence_transformers_files(path, ["mean"], dense=[(HIDDEN, 48, "torch.nn.modules.activation.Tanh")])


def gemma2(path: Path) -> None:
    """Causal with soft-capped scores, a sliding window in every other layer and (1 + w) norms."""
    tokenizer = byte_bpe(before=["<bos>"], pad="<pad>")
    _byte_level(path, tokenizer, "gemma2", "<pad>", sliding_window=8, query_pre_attn_scalar=8,
                attn_logit_softcapping=2.0, **_GROUPED)  # fmt: skip
    sentence_transformers_files(path, ["mean"])


def mpnet(path: Path) -> None:
    """Computes its attention by itself, past transformers' registry: packed by a patch of ours, else padded."""
    tokenizer = unigram()
    _save_model(
        path, "mpnet", vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=130, pad_token_id=1
    )
    save_tokenizer(
        tokenizer, path, pad="<pad>", tokenizer_class="PreTrainedTokenizerFast", model_max_length=128
    )


FAMILIES: dict[str, Callable[[Path], None]] = {
    make.__name__: make for make in (bert, xlmr, roberta, qwen2, qwen3, mistral, modernbert, gemma2)
}
