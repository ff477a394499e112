"""Encoders that most people embed with, in the layout of the hub, beside sentence-transformers."""

from __future__ import annotations

from functools import partial
from typing import Any

import tiny
from carpool.engine.config import PoolerConfig
from zoo.member import Member
from zoo.sentence import Dense, member

_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
_BERT: dict[str, Any] = {
    **_SIZES,
    "pad_token_id": 0,
    "words": tiny.wordpiece,
    "tokenizer": {
        "tokenizer_class": "BertTokenizer",
        "pad": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    },
}
_XLMR: dict[str, Any] = {
    **_SIZES,
    "max_position_embeddings": 258,
    "type_vocab_size": 1,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "words": tiny.unigram,
    "tokenizer": {
        "pad": "<pad>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "cls_token": "<s>",
        "sep_token": "</s>",
        "unk_token": "<unk>",
    },
}
_MODERNBERT: dict[str, Any] = {
    **_SIZES,
    "num_hidden_layers": 4,
    "local_attention": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
    "words": partial(tiny.byte_bpe, before=["[CLS]"], after=["[SEP]"], pad="[PAD]"),
    "tokenizer": {"pad": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"},
}
_EUROBERT: dict[str, Any] = {
    **_SIZES,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 0,
    "mask_token_id": 0,
    "words": partial(tiny.byte_bpe, before=["<|begin_of_text|>"], after=["<|end_of_text|>"], pad="<|pad|>"),
    "tokenizer": {"pad": "<|pad|>"},
}

MEMBERS: tuple[Member, ...] = (
    member("intfloat/e5-small", "bert", "mean", **_BERT),
    member("BAAI/bge-small-en-v1.5", "bert", "cls", side={"lowercase": True, "max_seq_length": 200}, **_BERT),
    member(
        "Snowflake/snowflake-arctic-embed-m-v1.5",
        "bert",
        "cls",
        width=16,
        options={
            "hf_overrides": {"matryoshka_dimensions": [16]},
            "pooler_config": PoolerConfig(dimensions=16),
        },
        side={"prompts": {"query": "Represent this sentence for searching relevant passages: "}},
        note="cut to one of its widths, which are told",
        **_BERT,
    ),
    member(
        "mixedbread-ai/mxbai-embed-large-v1",
        "bert",
        "cls",
        side={
            "normalize": False,
            "prompts": {"query": "Represent this sentence for searching relevant passages: "},
        },
        note="its files do not normalise",
        **_BERT,
    ),
    member("sentence-transformers/all-MiniLM-L6-v2", "bert", "mean", side={"max_seq_length": 128}, **_BERT),
    member(
        "TencentBAC/Conan-embedding-v1",
        "bert",
        "mean",
        dense=[Dense(32, 56, pickled=True)],
        note="a Dense layer",
        **_BERT,
    ),
    member(
        "intfloat/multilingual-e5-small",
        "bert",
        "mean",
        note="XLM-R's tokenizer",
        **{**_BERT, "words": tiny.unigram, "tokenizer": _XLMR["tokenizer"]},
    ),
    member("intfloat/multilingual-e5-large", "xlm-roberta", "mean", side={"dialect": "new"}, **_XLMR),
    member("Snowflake/snowflake-arctic-embed-l-v2.0", "xlm-roberta", "cls", **_XLMR),
    member(
        "sentence-transformers/all-distilroberta-v1", "roberta", "mean", side={"max_seq_length": 200}, **_XLMR
    ),
    member("sentence-transformers/LaBSE", "bert", "cls", dense=[Dense(32, 32, "activation.Tanh")], **_BERT),
    member("ibm-granite/granite-embedding-125m-english", "roberta", "cls", **_XLMR),
    member(
        "ibm-granite/granite-embedding-english-r2",
        "modernbert",
        "cls",
        side={"dialect": "new"},
        **_MODERNBERT,
    ),
    member("Alibaba-NLP/gte-modernbert-base", "modernbert", "cls", side={"normalize": False}, **_MODERNBERT),
    member("nomic-ai/modernbert-embed-base", "modernbert", "mean", **_MODERNBERT),
    member("EuroBERT with sentence-transformers' files", "eurobert", "mean", **_EUROBERT),
)
