"""Embedding models made of language models, in the layout of the hub, beside sentence-transformers."""

from __future__ import annotations

from functools import partial
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, processors

import tiny
from carpool.engine.config import PoolerConfig
from zoo.member import Member
from zoo.sentence import Dense, member


def llama_words(eos: bool) -> Tokenizer:
    """Llama 2 and Mistral: <unk> 0, <s> 1, </s> 2, bytes, pieces that begin with a blank's sign; <s> before a text."""
    entries = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *tiny.LETTERS]
    vocab = {entry: i for i, entry in enumerate(entries)}
    merges = []
    for word in tiny.WORDS:
        left = "▁"
        for letter in word:
            if left + letter not in vocab:
                vocab[left + letter] = len(vocab)
                merges.append((left, letter))
            left += letter
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if eos else "<s> $A",
        pair="<s> $A <s> $B:1",
        special_tokens=[("<s>", 1), ("</s>", 2)],
    )
    return tokenizer


_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}
_MISTRAL: dict[str, Any] = {
    **_SIZES,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "sliding_window": 8,
    "tokenizer": {
        "tokenizer_class": "LlamaTokenizer",
        "pad": "</s>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    },
}
_ENDED: dict[str, Any] = {
    **_SIZES,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "words": partial(tiny.byte_bpe, after=["<|endoftext|>"]),
    "tokenizer": {"pad": "<|endoftext|>", "eos_token": "<|endoftext|>"},
}
_GEMMA: dict[str, Any] = {
    **_SIZES,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sliding_window": 8,
    "query_pre_attn_scalar": 8,
    "words": partial(tiny.byte_bpe, before=["<bos>"], after=["<eos>"], pad="<pad>"),
    "tokenizer": {"pad": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"},
}
_EMBEDDING_GEMMA: dict[str, Any] = {
    "dense": [Dense(32, 128, bias=False), Dense(128, 32, bias=False)],
    "side": {
        "max_seq_length": 200,
        "prompts": {"query": "task: search result | query: ", "document": "title: none | text: "},
    },
    "use_bidirectional_attention": True,
    **_GEMMA,
    "num_hidden_layers": 6,
}
_QWEN3: dict[str, Any] = {
    "of": "AutoModelForCausalLM",
    "bare": True,
    "side": {
        "prompts": {
            "query": "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:",
            "document": "",
        }
    },
    **_ENDED,
}

MEMBERS: tuple[Member, ...] = (
    member(
        "intfloat/e5-mistral-7b-instruct",
        "mistral",
        "lasttoken",
        note="its tokenizer.json does not end a text, tokenizer_config.json does and is heeded",
        words=partial(llama_words, False),
        reading={"add_bos_token": True, "add_eos_token": True},
        **{**_MISTRAL, "tokenizer": {**_MISTRAL["tokenizer"], "add_eos_token": True}},
    ),
    member(
        "Salesforce/SFR-Embedding-Mistral",
        "mistral",
        "lasttoken",
        words=partial(llama_words, True),
        **_MISTRAL,
    ),
    member(
        "Linq-AI-Research/Linq-Embed-Mistral",
        "mistral",
        "lasttoken",
        words=partial(llama_words, True),
        **{**_MISTRAL, "sliding_window": None},
    ),
    member("Qwen/Qwen3-Embedding-0.6B", "qwen3", "lasttoken", **_QWEN3),
    member(
        "Qwen/Qwen3-Embedding-4B",
        "qwen3",
        "lasttoken",
        width=20,
        options={"hf_overrides": {"is_matryoshka": True}, "pooler_config": PoolerConfig(dimensions=20)},
        note="cut, of any width once told",
        **_QWEN3,
    ),
    member("BAAI/bge-code-v1", "qwen2", "lasttoken", **_ENDED),
    member(
        "BAAI/bge-multilingual-gemma2",
        "gemma2",
        "lasttoken",
        attn_logit_softcapping=2.0,
        note="no float16",
        **_GEMMA,
    ),
    member(
        "google/embeddinggemma-300m",
        "gemma3_text",
        "mean",
        note="two Dense layers; no float16",
        **_EMBEDDING_GEMMA,
    ),
    member(
        "google/embeddinggemma-300m, cut",
        "gemma3_text",
        "mean",
        width=16,
        options={
            "hf_overrides": {"matryoshka_dimensions": [8, 16]},
            "pooler_config": PoolerConfig(dimensions=16),
        },
        note="to one of its widths, which are told",
        **_EMBEDDING_GEMMA,
    ),
)
