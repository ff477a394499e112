"""Members whose class transformers has: what `AutoModel` answers, one prompt at a time, is the reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from torch import Tensor, nn

import tiny
from carpool.engine.params import Task
from oracle import Oracle
from zoo.member import Member, Reference


def embedding(
    name: str,
    model_type: str,
    mode: str = "lasttoken",
    *,
    words: Callable[[], Tokenizer] | None = None,
    pad: str = "<|endoftext|>",
    of: str = "AutoModel",
    asking: Mapping[str, Any] | None = None,
    note: str = "",
    **config: Any,
) -> Member:
    """An embedding model of `config`, pooled by `mode` as its sentence-transformers files say.

    `of` is the transformers class that the folder is saved from; `asking` are arguments the reference's forward needs.
    """

    def make(folder: Path) -> Reference:
        tokenizer = words() if words else tiny.byte_bpe(after=[pad])
        made = transformers.AutoConfig.for_model(
            model_type,
            **{"vocab_size": tokenizer.get_vocab_size(), "num_hidden_layers": 2, **config},
        )
        auto = getattr(transformers, of)
        torch.manual_seed(0)
        model = auto.from_config(made) if of.startswith("Auto") else auto(made)
        tiny.inflate(model)
        _tame(model)
        model.save_pretrained(folder)
        tiny.save_tokenizer(
            tokenizer, folder, pad=pad, tokenizer_class="PreTrainedTokenizerFast", model_max_length=128
        )
        tiny.sentence_transformers_files(folder, [mode])
        return EmbedReference(Oracle(folder, [mode]), asking or {})

    return Member(name, type_name(model_type, of), make, ("embed", "token_embed"), note=note)


class EmbedReference:
    """An Oracle as a Reference."""

    def __init__(self, oracle: Oracle, asking: Mapping[str, Any]) -> None:
        self._oracle = oracle
        self._asking = asking

    @torch.no_grad()
    def __call__(
        self, task: Task, ids: list[int], types: list[int] | None = None, adapter: str | None = None
    ) -> Tensor:
        row = torch.tensor([ids])
        inputs: dict[str, Any] = {"attention_mask": torch.ones_like(row), **self._asking}
        hidden = self._oracle.model(input_ids=row, **inputs).last_hidden_state[0].float()
        if task == "token_embed":
            return nn.functional.normalize(hidden, dim=-1)
        pooled = Oracle._pool(hidden, self._oracle.modes[0])
        return nn.functional.normalize(pooled, dim=0)


def type_name(model_type: str, of: str) -> str:
    """The class that the published folder names."""
    if not of.startswith("Auto"):
        return of
    mapping = transformers.MODEL_MAPPING if of == "AutoModel" else transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    return str(mapping[transformers.CONFIG_MAPPING[model_type]].__name__)


def _tame(model: nn.Module) -> None:
    """Routers of mixtures decide by differences that rounding must not turn over: make them decided."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("router.weight", "mlp.gate.weight", "block_sparse_moe.gate.weight")):
                weight.mul_(4)


_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
_GROUPED: dict[str, Any] = {
    **_SIZES,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_WIDE: dict[str, Any] = {**_GROUPED, "head_dim": 8}
_BERT: dict[str, Any] = {**_SIZES, "pad_token_id": 0, "type_vocab_size": 2}
_ROBERTA: dict[str, Any] = {
    **_SIZES,
    "max_position_embeddings": 258,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
_NEW_ROBERTA: dict[str, Any] = {**_ROBERTA, "type_vocab_size": 1}
_LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_WORDPIECE: dict[str, Any] = {"words": tiny.wordpiece, "pad": "[PAD]"}
_UNIGRAM: dict[str, Any] = {"words": tiny.unigram, "pad": "<pad>"}
_BOTH_WAYS: dict[str, Any] = {"is_causal": False, "asking": {"is_causal": False}}

MEMBERS: tuple[Member, ...] = (
    embedding(
        "google/electra-small-discriminator", "electra", "mean", embedding_size=16, **_BERT, **_WORDPIECE
    ),
    embedding(
        "sentence-transformers/paraphrase-albert-small-v2",
        "albert",
        "mean",
        embedding_size=16,
        **_BERT,
        **_WORDPIECE,
    ),
    embedding(
        "sentence-transformers/msmarco-distilbert-base-v4",
        "distilbert",
        "mean",
        dim=32,
        n_layers=2,
        n_heads=4,
        hidden_dim=48,
        max_position_embeddings=256,
        **_WORDPIECE,
    ),
    embedding("shibing624/text2vec-base-multilingual", "ernie", "mean", **_BERT, **_WORDPIECE),
    embedding("dangvantuan/sentence-camembert-base", "camembert", "mean", **_NEW_ROBERTA, **_UNIGRAM),
    embedding("facebook/xlm-roberta-xl", "xlm-roberta-xl", "mean", **_NEW_ROBERTA, **_UNIGRAM),
    embedding("nomic-bert, as transformers writes it", "nomic_bert", "mean", **_BERT, **_WORDPIECE),
    embedding(
        "jina-embeddings-v3, as transformers writes it",
        "jina_embeddings_v3",
        "mean",
        **_NEW_ROBERTA,
        **_UNIGRAM,
    ),
    embedding("gte, as transformers writes it", "gte", "cls", **_BERT, **_WORDPIECE),
    embedding("EuroBERT/EuroBERT-210m", "eurobert", "mean", **_WIDE),
    embedding("ultrabert", "ultrabert", "mean", sliding_window=8, **_WIDE),
    embedding("Qwen/Qwen2-0.5B", "qwen2", of="AutoModelForCausalLM", **_GROUPED),
    embedding(
        "Qwen2 with windows in its upper layers",
        "qwen2",
        use_sliding_window=True,
        sliding_window=8,
        max_window_layers=1,
        **_GROUPED,
    ),
    embedding(
        "Qwen/Qwen3-30B-A3B",
        "qwen3_moe",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        **_WIDE,
    ),
    embedding("meta-llama/Llama-2-7b", "llama", of="AutoModelForCausalLM", **_WIDE),
    embedding(
        "meta-llama/Llama-3.2-1B", "llama", of="AutoModelForCausalLM", rope_parameters=_LLAMA3, **_WIDE
    ),
    embedding("Llama that looks both ways (is_causal: false)", "llama", "mean", **_WIDE, **_BOTH_WAYS),
    embedding("mistralai/Mistral-7B-v0.1", "mistral", sliding_window=8, **_WIDE),
    embedding("mistralai/Mistral-7B-v0.3", "mistral", sliding_window=None, **_WIDE),
    embedding("mistralai/Mixtral-8x7B", "mixtral", num_local_experts=4, **_WIDE),
    embedding("google/gemma-2b", "gemma", **_WIDE),
    embedding(
        "google/gemma-2-2b",
        "gemma2",
        sliding_window=8,
        attn_logit_softcapping=2.0,
        query_pre_attn_scalar=8,
        **_WIDE,
    ),
    embedding(
        "google/gemma-3-270m",
        "gemma3_text",
        sliding_window=8,
        query_pre_attn_scalar=8,
        **{**_WIDE, "num_hidden_layers": 6},
    ),
    embedding("microsoft/Phi-3-mini-4k-instruct", "phi3", **_GROUPED),
    embedding("allenai/OLMo-2-0425-1B", "olmo2", **_GROUPED),
    embedding("ibm-granite/granite-3.1-2b", "granite", **_GROUPED),
    embedding(
        "openai-community/gpt2",
        "gpt2",
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=256,
        bos_token_id=0,
        eos_token_id=0,
    ),
    embedding(
        "google/embeddinggemma-2",
        "embedding_gemma2_text",
        "mean",
        sliding_window=8,
        **{**_WIDE, "num_hidden_layers": 6},
    ),
)
