"""Members with more than one vector a text: BGE-M3, the ColBERTs, SPLADE. Their heads are computed here by hand."""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import linear, normalize

import tiny
from carpool.engine.params import Task
from zoo.member import Member, Reference
from zoo.translated import FLASH, Encoder, flash_config, random_weights, rotary_frequencies

Weights = dict[str, Tensor]
Head = Callable[[Task, Tensor, list[int]], Tensor]  # of hidden states, or of logits, [tokens, …] and ids

_SIZES = {
    "hidden_size": tiny.HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
_COLBERT_WIDTH = 16


class HeadReference:
    """`head` on the rows [tokens, …] that a model computes of ids alone."""

    def __init__(self, rows: Callable[[list[int]], Tensor], head: Head) -> None:
        self.rows, self.head = rows, head

    @torch.no_grad()
    def __call__(
        self, task: Task, ids: list[int], types: list[int] | None = None, adapter: str | None = None
    ) -> Tensor:
        return self.head(task, self.rows(ids), ids)


def stock(folder: Path, auto: Any = transformers.AutoModel) -> Callable[[list[int]], Tensor]:
    """What transformers' own class computes: its last hidden state, or its logits if it has a head of its own."""
    model = auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()

    def rows(ids: list[int]) -> Tensor:
        row = torch.tensor([ids])
        output = model(input_ids=row, attention_mask=torch.ones_like(row))
        found: Tensor = (output.logits if "logits" in output else output.last_hidden_state)[0]
        return found.float()

    return rows


# ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────


def noise(*shape: int, seed: int = 5) -> Tensor:
    made: Tensor = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * shape[-1] ** -0.5
    return made


def save_model(
    folder: Path, model_type: str, words: Tokenizer, auto: str = "AutoModel", **config: Any
) -> None:
    """`auto` is the transformers class that the folder is saved from."""
    made = transformers.AutoConfig.for_model(
        model_type,
        **{**_SIZES, "max_position_embeddings": 130, "vocab_size": words.get_vocab_size(), **config},
    )
    torch.manual_seed(0)
    model = getattr(transformers, auto).from_config(made)
    tiny.inflate(model)
    model.save_pretrained(folder)


def save_wordpiece(words: Tokenizer, folder: Path) -> None:
    tiny.save_tokenizer(words, folder, pad="[PAD]", tokenizer_class="BertTokenizer", model_max_length=128,
                        unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")  # fmt: skip


def save_unigram(words: Tokenizer, folder: Path) -> None:
    tiny.save_tokenizer(words, folder, pad="<pad>", tokenizer_class="PreTrainedTokenizerFast", model_max_length=128,
                        bos_token="<s>", eos_token="</s>", cls_token="<s>", sep_token="</s>",
                        unk_token="<unk>")  # fmt: skip


def with_entries(words: Tokenizer, *entries: str) -> Tokenizer:
    """A WordPiece tokenizer with more entries, which no text is split into: BERT's unused ones."""
    written = json.loads(words.to_str())
    vocabulary = written["model"]["vocab"]
    vocabulary |= {entry: len(vocabulary) + i for i, entry in enumerate(entries)}
    return Tokenizer.from_str(json.dumps(written))


def write_modules(folder: Path, **types: str) -> None:
    """modules.json: the first module lies in the folder itself, the others in folders of their own."""
    tiny.write_json(
        folder / "modules.json",
        [
            {"idx": i, "name": str(i), "path": f"{i}_{name}" if i else "", "type": kind}
            for i, (name, kind) in enumerate(types.items())
        ],
    )


def edit_weights(folder: Path, edit: Callable[[Weights], Weights]) -> None:
    weights = edit(load_file(folder / "model.safetensors"))
    save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / "model.safetensors",
              {"format": "pt"})  # fmt: skip


# ── BGE-M3 ───────────────────────────────────────────────────────────────────────────────────────────────────


def bge_m3(folder: Path) -> Reference:
    """Pickles throughout, as published: the model, and two linear layers beside it."""
    words = tiny.unigram()
    save_model(
        folder, "xlm-roberta", words, type_vocab_size=1, pad_token_id=1, bos_token_id=0, eos_token_id=2
    )
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    save_unigram(words, folder)
    tiny.sentence_transformers_files(folder, ["cls"], max_seq_length=128)
    colbert = {"weight": noise(tiny.HIDDEN, tiny.HIDDEN), "bias": noise(tiny.HIDDEN, seed=6)}
    # So that about as many tokens have a weight as have none.
    sparse = {"weight": noise(1, tiny.HIDDEN, seed=7), "bias": torch.tensor([0.7])}
    torch.save(colbert, folder / "colbert_linear.pt")
    torch.save(sparse, folder / "sparse_linear.pt")

    def head(task: Task, hidden: Tensor, ids: list[int]) -> Tensor:
        first, last = int(ids[0] == 0), len(ids) - int(ids[-1] == 2)
        match task:
            case "token_embed":
                return normalize(linear(hidden, colbert["weight"], colbert["bias"]), dim=-1)[first:]
            case "token_classify":
                return linear(hidden, sparse["weight"], sparse["bias"]).relu()[first:last, 0]
        return normalize(hidden[0], dim=-1)

    return HeadReference(stock(folder), head)


# ── ColBERT ──────────────────────────────────────────────────────────────────────────────────────────────────


def projected(*weights: Tensor) -> Head:
    def head(task: Task, hidden: Tensor, ids: list[int]) -> Tensor:
        for weight in weights:
            hidden = linear(hidden, weight)
        return normalize(hidden, dim=-1)

    return head


def colbert_v2(folder: Path, **metadata: Any) -> Reference:
    """Stanford's: `bert.` and `linear.weight` in one file, and how to write texts in artifact.metadata."""
    words = with_entries(tiny.wordpiece(), "[unused0]", "[unused1]")
    save_model(folder, "bert", words, pad_token_id=0)
    save_wordpiece(words, folder)
    weight = noise(_COLBERT_WIDTH, tiny.HIDDEN)
    edit_weights(
        folder,
        lambda own: {"linear.weight": weight, **{f"bert.{name}": tensor for name, tensor in own.items()}},
    )
    tiny.edit_json(folder / "config.json", architectures=["HF_ColBERT"])
    told = {
        "query_token_id": "[unused0]",
        "doc_token_id": "[unused1]",
        "query_token": "[Q]",
        "doc_token": "[D]",
        "query_maxlen": 32,
        "doc_maxlen": 60,
        "dim": _COLBERT_WIDTH,
        "similarity": "cosine",
        "mask_punctuation": True,
        "attend_to_mask_tokens": False,
    }
    tiny.write_json(folder / "artifact.metadata", {**told, **metadata})
    return HeadReference(stock(folder), projected(weight))


def pylate_files(
    folder: Path, words: Tokenizer, widths: tuple[int, ...] = (_COLBERT_WIDTH,), **told: Any
) -> Head:
    """modules.json with PyLate's Dense, and what its config_sentence_transformers.json says. Adds the markers."""
    words.add_tokens(["[Q] ", "[D] "])
    names = {f"Dense_{i}" if i else "Dense": "pylate.models.Dense.Dense" for i in range(len(widths))}
    write_modules(folder, Transformer="sentence_transformers.models.Transformer", **names)
    weights, last = [], tiny.HIDDEN
    for i, (name, width) in enumerate(zip(names, widths, strict=True), start=1):
        weights.append(noise(width, last, seed=i))
        last_width, last = last, width
        tiny.write_json(
            folder / f"{i}_{name}" / "config.json",
            {
                "in_features": last_width,
                "out_features": width,
                "bias": False,
                "activation_function": "torch.nn.modules.linear.Identity",
                "use_residual": False,
            },
        )
        save_file({"linear.weight": weights[-1]}, folder / f"{i}_{name}" / "model.safetensors")
    # PyLate leaves in max_seq_length what it cut at last: a query's length here.
    tiny.write_json(folder / "sentence_bert_config.json", {"max_seq_length": 31, "do_lower_case": False})
    settings: Mapping[str, Any] = {
        "prompts": {},
        "default_prompt_name": None,
        "similarity_fn_name": "MaxSim",
        "query_prefix": "[Q] ",
        "document_prefix": "[D] ",
        "query_length": 32,
        "document_length": 60,
        "attend_to_expansion_tokens": False,
        "skiplist_words": list(string.punctuation),
        "do_query_expansion": True,
    }
    tiny.write_json(folder / "config_sentence_transformers.json", {**settings, **told})
    return projected(*weights)


def gte_moderncolbert(folder: Path, **told: Any) -> Reference:
    """PyLate's, around ModernBERT with its windows."""
    words = tiny.byte_bpe(before=["[CLS]"], after=["[SEP]"], pad="[PAD]")
    words.add_special_tokens(["[MASK]"])
    head = pylate_files(folder, words, **told)
    save_model(folder, "modernbert", words, num_hidden_layers=4, local_attention=8, pad_token_id=0, bos_token_id=1,
               eos_token_id=2, cls_token_id=1, sep_token_id=2)  # fmt: skip
    tiny.save_tokenizer(words, folder, pad="[PAD]", tokenizer_class="PreTrainedTokenizerFast", model_max_length=128,
                        cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")  # fmt: skip
    return HeadReference(stock(folder), head)


def lfm2_colbert(folder: Path) -> Reference:
    """PyLate's, around a causal model of short convolutions and attention; without a mask token."""
    words = tiny.byte_bpe(before=["<|startoftext|>"], pad="<|pad|>")
    words.add_special_tokens(["<|im_end|>"])
    head = pylate_files(folder, words)
    save_model(folder, "lfm2", words, num_hidden_layers=4, num_key_value_heads=2, full_attn_idxs=[1, 3],
               conv_L_cache=3, block_auto_adjust_ff_dim=False, pad_token_id=0, bos_token_id=1,
               eos_token_id=words.token_to_id("<|im_end|>"))  # fmt: skip
    tiny.save_tokenizer(words, folder, pad="<|pad|>", tokenizer_class="PreTrainedTokenizerFast", model_max_length=128,
                        bos_token="<|startoftext|>", eos_token="<|im_end|>")  # fmt: skip
    return HeadReference(stock(folder), head)


def jina_colbert_v2(folder: Path) -> Reference:
    """Jina's rotary XLM-RoBERTa, published with code of its own, and `linear.weight` beside it."""
    words = tiny.unigram()
    words.add_tokens(["[QueryMarker]", "[DocumentMarker]"])
    save_unigram(words, folder)
    vocab = words.get_vocab_size()
    config = flash_config(vocab_size=vocab, model_type="xlm-roberta", architectures=["HF_ColBERT"])
    tiny.write_json(folder / "config.json", config)
    weights = random_weights(FLASH, vocab, prefix="roberta.")
    weight = noise(_COLBERT_WIDTH, tiny.HIDDEN)
    save_file({**weights, "linear.weight": weight}, folder / "model.safetensors", {"format": "pt"})
    encoder = Encoder(FLASH, weights, "roberta.", rotary_frequencies(20000.0))
    return HeadReference(encoder.hidden, projected(weight))


def mxbai_edge_colbert(folder: Path) -> Reference:
    """Two Dense layers, one after the other, and no expansion of queries."""
    words = tiny.wordpiece()
    head = pylate_files(folder, words, (48, _COLBERT_WIDTH), do_query_expansion=False)
    save_model(folder, "bert", words, pad_token_id=0)
    save_wordpiece(words, folder)
    return HeadReference(stock(folder), head)


def multi_vector_encoder(folder: Path, **told: Any) -> Reference:
    """As sentence-transformers writes it since version 6. `told` goes to the Transformer's configuration."""
    words = tiny.wordpiece()
    words.add_special_tokens(["[Q]", "[D]"])
    save_model(folder, "bert", words, pad_token_id=0)
    save_wordpiece(words, folder)
    write_modules(
        folder,
        Transformer="sentence_transformers.base.modules.transformer.Transformer",
        Dense="sentence_transformers.base.modules.dense.Dense",
        MultiVectorMask="sentence_transformers.multi_vector_encoder.modules.multi_vector_mask.MultiVectorMask",
        Normalize="sentence_transformers.base.modules.normalize.Normalize",
    )
    weight = noise(_COLBERT_WIDTH, tiny.HIDDEN)
    tiny.write_json(
        folder / "1_Dense" / "config.json",
        {
            "in_features": tiny.HIDDEN,
            "out_features": _COLBERT_WIDTH,
            "bias": False,
            "activation_function": "torch.nn.modules.linear.Identity",
            "module_input_name": "token_embeddings",
            "module_output_name": "token_embeddings",
        },
    )
    save_file({"linear.weight": weight}, folder / "1_Dense" / "model.safetensors")
    tiny.write_json(
        folder / "2_MultiVectorMask" / "config.json",
        {
            "skiplist_words": list(string.punctuation),
            "skiplist_tasks": ["document"],
            "keep_only_token_ids": None,
        },
    )
    tiny.write_json(folder / "3_Normalize" / "config.json", {"module_input_name": "token_embeddings"})
    tiny.write_json(
        folder / "sentence_bert_config.json",
        {"transformer_task": "feature-extraction", "document_length": 60, **told},
    )
    tiny.write_json(
        folder / "config_sentence_transformers.json",
        {
            "model_type": "MultiVectorEncoder",
            "prompts": {"query": "[Q] ", "document": "[D] "},
            "similarity_fn_name": "maxsim",
        },
    )
    return HeadReference(stock(folder), projected(weight))


# ── SPLADE ───────────────────────────────────────────────────────────────────────────────────────────────────


def splade_head(strategy: str = "max", twice: bool = False) -> Head:
    def head(task: Task, logits: Tensor, ids: list[int]) -> Tensor:
        weights = logits.relu().log1p()
        weights = weights.log1p() if twice else weights
        return weights.amax(0) if strategy == "max" else weights.sum(0)

    return head


def splade_v3(folder: Path) -> Reference:
    """As published, with the module names of sentence-transformers 5."""
    words = tiny.wordpiece()
    save_model(folder, "bert", words, "AutoModelForMaskedLM", pad_token_id=0)
    save_wordpiece(words, folder)
    write_modules(
        folder,
        Transformer="sentence_transformers.sparse_encoder.models.MLMTransformer",
        SpladePooling="sentence_transformers.sparse_encoder.models.SpladePooling",
    )
    splade_files(folder, {"pooling_strategy": "max", "word_embedding_dimension": words.get_vocab_size()})
    return HeadReference(stock(folder, transformers.AutoModelForMaskedLM), splade_head())


def opensearch_sparse(folder: Path) -> Reference:
    """DistilBERT, and the logarithm taken twice; as sentence-transformers writes it since version 6."""
    words = tiny.wordpiece()
    save_model(folder, "distilbert", words, "AutoModelForMaskedLM", dim=tiny.HIDDEN, n_layers=2, n_heads=4,
               hidden_dim=48)  # fmt: skip
    save_wordpiece(words, folder)
    write_modules(
        folder,
        Transformer="sentence_transformers.base.modules.transformer.Transformer",
        SpladePooling="sentence_transformers.sparse_encoder.modules.splade_pooling.SpladePooling",
    )
    splade_files(
        folder, {"pooling_strategy": "max", "activation_function": "log1p_relu"}, transformer_task="fill-mask"
    )
    return HeadReference(stock(folder, transformers.AutoModelForMaskedLM), splade_head(twice=True))


def splade_files(folder: Path, pooling: Mapping[str, Any], **transformer: Any) -> None:
    tiny.write_json(folder / "1_SpladePooling" / "config.json", {"activation_function": "relu", **pooling})
    tiny.write_json(
        folder / "sentence_bert_config.json", {"max_seq_length": 128, "do_lower_case": False, **transformer}
    )
    tiny.write_json(
        folder / "config_sentence_transformers.json",
        {
            "model_type": "SparseEncoder",
            "prompts": {"query": "", "document": ""},
            "similarity_fn_name": "dot",
        },
    )


def splade_by_name(folder: Path) -> Reference:
    """A masked language model without a file that says what it is for: the reference's flag does."""
    words = tiny.unigram()
    save_model(folder, "xlm-roberta", words, "AutoModelForMaskedLM", type_vocab_size=1, pad_token_id=1,
               bos_token_id=0, eos_token_id=2)  # fmt: skip
    save_unigram(words, folder)
    return HeadReference(stock(folder, transformers.AutoModelForMaskedLM), splade_head())


_ALL_OF_M3: tuple[Task, ...] = ("embed", "token_embed", "token_classify")
_NAMED_SPLADE = {"hf_overrides": {"architectures": ["BertSpladeSparseEmbeddingModel"]}}

MEMBERS: tuple[Member, ...] = (
    Member("BAAI/bge-m3", "XLMRobertaModel", bge_m3, _ALL_OF_M3),
    Member("colbert-ir/colbertv2.0", "HF_ColBERT", colbert_v2, ("token_embed",)),
    Member("lightonai/GTE-ModernColBERT-v1", "ModernBertModel", gte_moderncolbert, ("token_embed",)),
    Member("LiquidAI/LFM2-ColBERT-350M", "Lfm2Model", lfm2_colbert, ("token_embed",)),
    Member("jinaai/jina-colbert-v2", "HF_ColBERT", jina_colbert_v2, ("token_embed",)),
    Member("mixedbread-ai/mxbai-edge-colbert-v0", "BertModel", mxbai_edge_colbert, ("token_embed",)),
    Member("a MultiVectorEncoder of sentence-transformers 6", "BertModel", multi_vector_encoder, ("token_embed",)),
    Member("naver/splade-v3", "BertForMaskedLM", splade_v3),
    Member("opensearch-project/opensearch-neural-sparse-encoding-v2-distill", "DistilBertForMaskedLM",
           opensearch_sparse),
    Member("a masked language model named SPLADE", "BertSpladeSparseEmbeddingModel", splade_by_name,
           options=_NAMED_SPLADE),
)  # fmt: skip
