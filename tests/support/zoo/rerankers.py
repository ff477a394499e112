"""Rerankers made of language models: the logit of a word at the last token, or a row of their own, is the score.

Of the listwise ones it is the cosine of what stands at their marks. All are asked with ids here; that pairs and lists
are put into each family's own words is shown by tests/engine/test_rerankers.py and test_listwise.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
)

import tiny
from carpool.engine.params import Task
from zoo.member import Member, Reference
from zoo.towers import MARK_IDS, MROPE, QWEN3_VISION

EOD = "<|endoftext|>"
# Chat template of the tokenizer that these are made of: it drops the roles of a pair.
CHATML = (
    "{%- for message in messages %}{%- if message.role in ('system', 'user', 'assistant') %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
# Chat templates as such models bring them since sentence-transformers asks with them.
JUDGING = (
    "{%- set of = namespace(system='', query='', document='') %}"
    "{%- for message in messages %}{%- if message.role == 'system' %}{%- set of.system = message.content %}"
    "{%- elif message.role == 'query' %}{%- set of.query = message.content %}"
    "{%- elif message.role == 'document' %}{%- set of.document = message.content %}{%- endif %}{%- endfor %}"
    "{{- '<|im_start|>user\\n<Instruct>: ' + of.system + '\\n<Query>: ' + of.query + '\\n<Document>: ' + of.document }}"
    "{{- '<|im_end|>\\n' }}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' }}"
    "{%- endif %}"
)
_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1024,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def qwen_words() -> Tokenizer:
    """ChatML's markers as special tokens, and the answers as single ones."""
    tokenizer = tiny.byte_bpe()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in ("<think>", "</think>")])
    tokenizer.add_tokens(["yes", "no", "Yes", "No"])
    return tokenizer


def gemma_words() -> Tokenizer:
    """<bos> before every text."""
    tokenizer = tiny.byte_bpe(before=["<bos>"], pad="<pad>")
    tokenizer.add_tokens(["Yes", "No"])
    return tokenizer


def ids(tokenizer: Tokenizer, *words: str) -> list[int]:
    """Of words that are one token each."""
    found = [tokenizer.token_to_id(word) for word in words]
    return [token for token in found if token is not None]


def save(
    folder: Path, model_type: str, tokenizer: Tokenizer, auto: Any = AutoModelForCausalLM, **config: Any
) -> None:
    """The language model and its tokenizer; weights of its head are its embedding's, as small models have it."""
    sizes = {
        **_SIZES,
        "vocab_size": tokenizer.get_vocab_size(),
        "tie_word_embeddings": True,
        **config,
    }
    torch.manual_seed(0)
    model = auto.from_config(AutoConfig.for_model(model_type, **sizes))
    tiny.inflate(model)
    model.save_pretrained(folder)
    pad = "<pad>" if tokenizer.token_to_id("<pad>") is not None else EOD
    tiny.save_tokenizer(
        tokenizer,
        folder,
        pad=pad,
        tokenizer_class="PreTrainedTokenizerFast",
        model_max_length=1024,
        eos_token=pad,
        chat_template=CHATML,
        **({"bos_token": "<bos>"} if pad == "<pad>" else {}),
    )


def named(folder: Path, name: str) -> None:
    """As releases of transformers before 5 wrote the repository into config.json."""
    tiny.edit_json(folder / "config.json", _name_or_path=name)


def cross_encoder_files(
    folder: Path, true: int, false: int | None, *, template: str = JUDGING, **side: Any
) -> None:
    """What sentence-transformers since 5.4 writes beside a language model that it scores pairs with."""
    kinds = ("base.modules.transformer.Transformer", "cross_encoder.modules.logit_score.LogitScore")
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.{kind}"}
        for i, (path, kind) in enumerate(zip(("", "1_LogitScore"), kinds, strict=True))
    ]
    tiny.write_json(folder / "modules.json", modules)
    tiny.write_json(folder / "1_LogitScore" / "config.json", {"true_token_id": true, "false_token_id": false})
    logits = {"method": "forward", "method_output_name": "logits"}
    tiny.write_json(
        folder / "sentence_bert_config.json",
        {
            "transformer_task": "text-generation",
            "modality_config": {"text": logits, "message": {**logits, "format": "flat"}},
            "module_output_name": "causal_logits",
            "processing_kwargs": {"chat_template": {"add_generation_prompt": True}},
        },
    )
    tiny.write_json(
        folder / "config_sentence_transformers.json",
        {"model_type": "CrossEncoder", "prompts": {}, "default_prompt_name": None, **side},
    )
    (folder / "chat_template.jinja").write_text(template)


class WordReference:
    """float32 logits of words at the last token, by transformers' class of its head, and what becomes of them."""

    def __init__(
        self,
        folder: Path,
        token_ids: list[int],
        finish: Callable[[Tensor], Tensor],
        auto: Any = AutoModelForCausalLM,
    ) -> None:
        self.model: Any = auto.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self._token_ids, self._finish = token_ids, finish

    @torch.no_grad()
    def __call__(
        self, task: Task, ids: list[int], types: list[int] | None = None, adapter: str | None = None
    ) -> Tensor:
        logits = self.model(input_ids=torch.tensor([ids])).logits[0, -1, self._token_ids]
        return self._finish(logits)


class RowReference:
    """The one row of a converted model, at the last token."""

    def __init__(self, folder: Path) -> None:
        self._model: Any = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()

    @torch.no_grad()
    def __call__(
        self, task: Task, ids: list[int], types: list[int] | None = None, adapter: str | None = None
    ) -> Tensor:
        row = torch.tensor([ids])
        logits: Tensor = self._model(input_ids=row, attention_mask=torch.ones_like(row)).logits[0]
        return logits.sigmoid()


def second_of_two(logits: Tensor) -> Tensor:
    return logits.softmax(-1)[1:]


def qwen3(folder: Path) -> Reference:
    """Known by its name alone."""
    tokenizer = qwen_words()
    save(folder, "qwen3", tokenizer)
    named(folder, "Qwen/Qwen3-Reranker-4B")
    return WordReference(folder, ids(tokenizer, "no", "yes"), second_of_two)


def qwen3_with_files(folder: Path) -> Reference:
    """Known by the files of sentence-transformers."""
    tokenizer = qwen_words()
    save(folder, "qwen3", tokenizer)
    no, yes = ids(tokenizer, "no", "yes")
    instruction = "Given a web search query, retrieve relevant passages that answer the query"
    cross_encoder_files(
        folder, yes, no, prompts={"web_search": instruction}, default_prompt_name="web_search"
    )
    return WordReference(folder, [no, yes], second_of_two)


def judged(model_type: str, *words: str, **config: Any) -> Callable[[Path], WordReference]:
    """Any language model with the files of sentence-transformers, asked for ("no", "yes") or for one word; its logits
    as they are: [words]."""

    def make(folder: Path) -> WordReference:
        tokenizer = qwen_words()
        save(folder, model_type, tokenizer, **config)
        *no, yes = ids(tokenizer, *words)
        cross_encoder_files(folder, yes, no[0] if no else None)
        return WordReference(folder, [*no, yes], lambda logits: logits)

    return make


def qwen3_converted(folder: Path) -> Reference:
    tokenizer = qwen_words()
    save(folder, "qwen3", tokenizer, AutoModelForSequenceClassification, num_labels=1)
    named(folder, "tomaarsen/Qwen3-Reranker-0.6B-seq-cls")
    return RowReference(folder)


def mxbai(folder: Path) -> Reference:
    tokenizer = qwen_words()
    save(folder, "qwen2", tokenizer)
    named(folder, "mixedbread-ai/mxbai-rerank-base-v2")
    return WordReference(folder, ids(tokenizer, "0", "1"), second_of_two)


def bge_gemma(folder: Path) -> Reference:
    tokenizer = gemma_words()
    save(folder, "gemma", tokenizer)
    named(folder, "BAAI/bge-reranker-v2-gemma")
    return WordReference(folder, ids(tokenizer, "Yes"), torch.sigmoid)


def zerank(folder: Path) -> Reference:
    """Known by its name: a fifth of the logit."""
    tokenizer = qwen_words()
    save(folder, "qwen3", tokenizer)
    named(folder, "zeroentropy/zerank-2")
    return WordReference(folder, ids(tokenizer, "Yes"), lambda logit: torch.sigmoid(logit / 5))


def contextual(folder: Path) -> Reference:
    """Known by its name: the logit of the first token that its tokenizer has, whichever that is."""
    tokenizer = qwen_words()
    save(folder, "qwen3", tokenizer)
    named(folder, "ContextualAI/ctxl-rerank-v2-instruct-multilingual-1b")
    return WordReference(folder, [0], torch.sigmoid)


def qwen3_vl(folder: Path) -> Reference:
    """A model that takes images too, whose language model has a head."""
    tokenizer = qwen_words()
    text = {**_SIZES, "vocab_size": 420, "rope_parameters": MROPE, "tie_word_embeddings": True}
    config = transformers.Qwen3VLConfig(
        text_config=text, vision_config=QWEN3_VISION, tie_word_embeddings=True, **MARK_IDS
    )
    torch.manual_seed(0)
    model = transformers.Qwen3VLForConditionalGeneration(config)
    tiny.inflate(model)
    model.save_pretrained(folder)
    tiny.save_tokenizer(
        tokenizer,
        folder,
        pad=EOD,
        tokenizer_class="PreTrainedTokenizerFast",
        model_max_length=1024,
        eos_token=EOD,
        chat_template=CHATML,
    )
    named(folder, "Qwen/Qwen3-VL-Reranker-2B")
    return WordReference(folder, ids(tokenizer, "no", "yes"), second_of_two, AutoModelForImageTextToText)


def zerank_with_files(folder: Path) -> Reference:
    """Its files say Identity: the logit as it is, even though config.json has the name."""
    tokenizer = qwen_words()
    save(folder, "qwen3", tokenizer)
    named(folder, "zeroentropy/zerank-2")
    (yes,) = ids(tokenizer, "Yes")
    cross_encoder_files(folder, yes, None, activation_fn="torch.nn.modules.linear.Identity")
    return WordReference(folder, [yes], lambda logit: logit)


def untied(folder: Path) -> Reference:
    """Qwen3-Reranker-8B: a head of its own, in several files."""
    tokenizer = qwen_words()
    save(folder, "qwen3", tokenizer, tie_word_embeddings=False)
    named(folder, "Qwen/Qwen3-Reranker-8B")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, own in halves.items():
        save_file({name: weights[name] for name in own}, folder / file, {"format": "pt"})
    index = {name: file for file, own in halves.items() for name in own}
    tiny.write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": index})
    return WordReference(folder, ids(tokenizer, "no", "yes"), second_of_two)


# ── a whole list at once ─────────────────────────────────────────────────────────────────────────────────────

MARKS = ("<|embed_token|>", "<|rerank_token|>")
_LISTS = (  # prompts with marks, in the published order and in others
    '<passage id="0">\nthe cat sat on a mat<|embed_token|>\n</passage>\n<passage id="1">\nrain in spain'
    "<|embed_token|>\n</passage>\n<query>\nwhere is the cat?<|rerank_token|>\n</query>",
    "a<|embed_token|>",
    "<|rerank_token|>ice cream<|embed_token|><|embed_token|> falls in spain at night",
    "the cat sat on a mat, and nothing is marked",
)


class MarkReference:
    """float32 vectors at the marks, [marks, 24]: the last hidden states of transformers' CausalLM, projected."""

    def __init__(self, folder: Path) -> None:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.marks = torch.tensor(ids(tokenizer, *MARKS))
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
        weights = load_file(folder / "model.safetensors")
        self._first, self._second = weights["projector.0.weight"], weights["projector.2.weight"]

    @torch.no_grad()
    def __call__(
        self, task: Task, ids: list[int], types: list[int] | None = None, adapter: str | None = None
    ) -> Tensor:
        row = torch.tensor([ids])
        hidden = self._model(input_ids=row, output_hidden_states=True).hidden_states[-1][0]
        marked = hidden[torch.isin(row[0], self.marks)]
        projected: Tensor = (marked @ self._first.T).relu() @ self._second.T
        return projected


def jina_v3(folder: Path, **config: Any) -> MarkReference:
    """Qwen3 with two linear layers beside it, and code of its own to put them there."""
    tokenizer = qwen_words()
    tokenizer.add_special_tokens(list(MARKS))
    tokenizer.add_tokens(["<passage id=", "</passage>"])  # so that long lists are not all letters of these
    save(folder, "qwen3", tokenizer, max_position_embeddings=16384, **config)
    noise = torch.Generator().manual_seed(7)
    weights = load_file(folder / "model.safetensors")
    weights["projector.0.weight"] = torch.randn(16, 32, generator=noise)
    weights["projector.2.weight"] = torch.randn(24, 16, generator=noise)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    code = {"AutoModel": "modeling.JinaForRanking"}
    tiny.edit_json(folder / "config.json", architectures=["JinaForRanking"], auto_map=code)
    tiny.edit_json(folder / "tokenizer_config.json", model_max_length=16384)
    return MarkReference(folder)


def jina_v3_5(folder: Path) -> MarkReference:
    """The same with windows in some of its layers."""
    kinds = ["sliding_attention", "full_attention"]
    return jina_v3(folder, use_sliding_window=True, sliding_window=8, layer_types=kinds)


def _listwise(name: str, make: Callable[[Path], Reference]) -> Member:
    note = "all documents of a query in one prompt"
    return Member(name, "JinaForRanking", make, ("token_embed",), texts=_LISTS, note=note)


def _member(name: str, family: str, make: Callable[[Path], Reference], note: str) -> Member:
    return Member(name, family, make, ("classify",), note=note)


MEMBERS: tuple[Member, ...] = (
    _member("Qwen/Qwen3-Reranker-0.6B", "Qwen3ForCausalLM", qwen3_with_files, "sentence-transformers files"),
    _member("Qwen/Qwen3-Reranker-4B", "Qwen3ForCausalLM", qwen3, "its prompt and words by name"),
    _member("Qwen/Qwen3-Reranker-8B", "Qwen3ForCausalLM", untied, "its prompt and words by name"),
    _member(
        "tomaarsen/Qwen3-Reranker-0.6B-seq-cls",
        "Qwen3ForSequenceClassification",
        qwen3_converted,
        "its prompt by name",
    ),
    _member("mixedbread-ai/mxbai-rerank-base-v2", "Qwen2ForCausalLM", mxbai, "its prompt and words by name"),
    _member("BAAI/bge-reranker-v2-gemma", "GemmaForCausalLM", bge_gemma, "its prompt and word by name"),
    _member("zeroentropy/zerank-2", "Qwen3ForCausalLM", zerank_with_files, "sentence-transformers files"),
    _member("zeroentropy/zerank-2, without its files", "Qwen3ForCausalLM", zerank, "its prompt by name"),
    _member(
        "ContextualAI/ctxl-rerank-v2-instruct-multilingual-1b",
        "Qwen3ForCausalLM",
        contextual,
        "its prompt by name, no word",
    ),
    _member(
        "Qwen/Qwen3-VL-Reranker-2B", "Qwen3VLForConditionalGeneration", qwen3_vl, "texts; its prompt by name"
    ),
    _listwise("jinaai/jina-reranker-v3", jina_v3),
    _listwise("jinaai/jina-reranker-v3.5", jina_v3_5),
)
