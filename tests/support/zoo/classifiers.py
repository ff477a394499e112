"""Classifiers, cross-encoders, taggers and reward models of classes that transformers has; it is their reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from tokenizers import Tokenizer
from torch import Tensor

import tiny
from carpool.engine.params import Task
from zoo.member import Member, Reference

Activation = Literal["identity", "sigmoid", "softmax"]
_ACTIVATE: Mapping[Activation, Callable[[Tensor], Tensor]] = {
    "identity": lambda logits: logits,
    "sigmoid": torch.sigmoid,
    "softmax": partial(torch.softmax, dim=-1),
}


class ClassifierReference:
    """The logits of the checkpoint's own class, through an activation: [labels], or of a tagger [tokens, labels]."""

    def __init__(self, folder: Path, auto: Any, activation: Activation) -> None:
        self.model: Any = auto.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.activate = _ACTIVATE[activation]

    @torch.no_grad()
    def __call__(
        self, task: Task, ids: list[int], types: list[int] | None = None, adapter: str | None = None
    ) -> Tensor:
        row = torch.tensor([ids])
        inputs = {"input_ids": row, "attention_mask": torch.ones_like(row)}
        if types is not None:
            inputs["token_type_ids"] = torch.tensor([types])
        return self.activate(self.model(**inputs).logits[0].float())


def classifier(
    name: str,
    model_type: str,
    labels: tuple[str, ...] | int,
    activation: Activation,
    words: Callable[[], Tokenizer],
    *,
    pad: str,
    of: str = "AutoModelForSequenceClassification",
    pairs: bool = False,
    side: Mapping[str, Any] | None = None,
    note: str = "",
    **config: Any,
) -> Member:
    """`labels`: their names or their number; `activation` is what config.json makes of the logits.

    `of` is the class that the folder is saved from; `side` is config_sentence_transformers.json.
    """
    made = {"num_labels": labels} if isinstance(labels, int) else {"id2label": dict(enumerate(labels))}
    auto = getattr(transformers, of)

    def make(folder: Path) -> Reference:
        tokenizer = words()
        settings = {"vocab_size": tokenizer.get_vocab_size(), "num_hidden_layers": 2, **made, **config}
        torch.manual_seed(0)
        model = auto.from_config(transformers.AutoConfig.for_model(model_type, **settings))
        tiny.inflate(model)
        model.save_pretrained(folder)
        tiny.save_tokenizer(
            tokenizer, folder, pad=pad, tokenizer_class="PreTrainedTokenizerFast", model_max_length=128
        )
        if side:
            tiny.write_json(folder / "config_sentence_transformers.json", side)
        return ClassifierReference(folder, auto, activation)

    task: Task = "token_classify" if of == "AutoModelForTokenClassification" else "classify"
    mapping = getattr(transformers, f"MODEL_FOR_{_MAPPINGS[of]}_MAPPING")
    family = str(mapping[transformers.CONFIG_MAPPING[model_type]].__name__)
    return Member(name, family, make, (task,), pairs=pairs, note=note)


_MAPPINGS = {
    "AutoModelForSequenceClassification": "SEQUENCE_CLASSIFICATION",
    "AutoModelForTokenClassification": "TOKEN_CLASSIFICATION",
}
_SIZES: Any = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "max_position_embeddings": 130,
}
_BERT: Any = {**_SIZES, "pad_token_id": 0, "type_vocab_size": 2}
_XLMR: Any = {**_SIZES, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "type_vocab_size": 1}
_MODERN: Any = {**_SIZES, "num_hidden_layers": 4, "local_attention": 8, "pad_token_id": 0, "bos_token_id": 1,
           "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}  # fmt: skip
_GROUPED: Any = {
    **_SIZES,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_WIDE: Any = {**_GROUPED, "head_dim": 8}
_DISTIL: Any = {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 130}
_GPT2: Any = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 130, "bos_token_id": 0, "eos_token_id": 0,
         "pad_token_id": 0}  # fmt: skip
_EMOTIONS = ("admiration", "amusement", "anger", "annoyance", "approval")
_NLI = ("entailment", "neutral", "contradiction")
_TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
_IDENTITY: Any = {
    "sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity", "version": "4.1.0"}
}
_NEW_SIDE: Any = {"model_type": "CrossEncoder", "activation_fn": "torch.nn.modules.activation.Sigmoid"}

_wordpiece = partial(classifier, words=tiny.wordpiece, pad="[PAD]")
_unigram = partial(classifier, words=tiny.unigram, pad="<pad>")
_modern = partial(classifier, words=partial(tiny.byte_bpe, ["[CLS]"], ["[SEP]"], "[PAD]"), pad="[PAD]")
_decoder = partial(classifier, words=tiny.byte_bpe, pad="<|endoftext|>")
_TAGGER: Any = {"of": "AutoModelForTokenClassification"}
_SINGLE, _MULTI = "single_label_classification", "multi_label_classification"

MEMBERS: tuple[Member, ...] = (
    _wordpiece("cross-encoder/ms-marco-MiniLM-L6-v2", "bert", 1, "identity", pairs=True, **_IDENTITY, **_BERT),
    _wordpiece("cross-encoder/ms-marco-TinyBERT-L2", "bert", 1, "identity", pairs=True,
               sbert_ce_default_activation_function="torch.nn.modules.linear.Identity", **_BERT),
    _unigram("BAAI/bge-reranker-v2-m3", "xlm-roberta", 1, "sigmoid", **_XLMR),
    _unigram("BAAI/bge-reranker-base", "xlm-roberta", 1, "sigmoid", side=_NEW_SIDE, **_XLMR),
    _modern("Alibaba-NLP/gte-reranker-modernbert-base", "modernbert", 1, "sigmoid", classifier_pooling="mean",
            **_MODERN),
    _modern("tomaarsen/reranker-ModernBERT-base-gooaq-bce", "modernbert", 1, "sigmoid", classifier_pooling="cls",
            **_MODERN),
    _wordpiece("distilbert/distilbert-base-uncased-finetuned-sst-2-english", "distilbert", ("NEGATIVE", "POSITIVE"),
               "softmax", **_DISTIL),
    _unigram("SamLowe/roberta-base-go_emotions", "roberta", _EMOTIONS, "sigmoid", problem_type=_MULTI, **_XLMR),
    _unigram("joeddav/xlm-roberta-large-xnli", "xlm-roberta", _NLI, "softmax", **_XLMR),
    _unigram("BaptisteDoyen/camembert-base-xnli", "camembert", _NLI, "softmax", problem_type=_SINGLE, **_XLMR),
    _wordpiece("nghuyong/ernie-3.0, finetuned", "ernie", 3, "softmax", **_BERT),
    _wordpiece("bhadresh-savani/electra-base-emotion", "electra", 6, "softmax", embedding_size=16, **_BERT),
    _wordpiece("textattack/albert-base-v2-SST-2", "albert", 2, "softmax", embedding_size=16, **_BERT),
    _modern("EuroBERT/EuroBERT-210m, finetuned", "eurobert", 3, "softmax", classifier_pooling="late", mask_token_id=0,
            **_WIDE),
    _decoder("jason9693/Qwen2.5-1.5B-apeach", "qwen2", ("non-hate", "hate"), "softmax", **_GROUPED),
    _decoder("Skywork/Skywork-Reward-V2-Llama-3.1-8B", "llama", 1, "identity", problem_type="regression", **_WIDE),
    _decoder("Skywork/Skywork-Reward-V2-Qwen3-0.6B", "qwen3", 1, "sigmoid", **_WIDE),
    _decoder("mnoukhov/gpt2-imdb-sentiment-classifier", "gpt2", ("NEGATIVE", "POSITIVE"), "softmax", **_GPT2),
    _decoder("microsoft/Phi-3-mini-4k-instruct, finetuned", "phi3", 3, "softmax", **_GROUPED),
    _decoder("mistralai/Mistral-7B-v0.1, finetuned", "mistral", 2, "softmax", sliding_window=8, **_WIDE),
    _decoder("google/gemma-2-2b, finetuned", "gemma2", 2, "softmax", sliding_window=8, query_pre_attn_scalar=8,
             **_WIDE),
    _wordpiece("dslim/bert-base-NER", "bert", _TAGS, "softmax", **_TAGGER, **_BERT),
    _unigram("Davlan/xlm-roberta-base-ner-hrl", "xlm-roberta", _TAGS, "softmax", **_TAGGER, **_XLMR),
    _modern("a tagger made of ModernBERT", "modernbert", _TAGS, "softmax", **_TAGGER, **_MODERN),
    _wordpiece("elastic/distilbert-base-uncased-finetuned-conll03-english", "distilbert", _TAGS, "softmax", **_TAGGER,
               **_DISTIL),
    _decoder("a tagger made of Qwen3", "qwen3", _TAGS, "softmax", **_TAGGER, **_WIDE),
)  # fmt: skip
