"""Weights of checkpoints in a dialect, under the names that the class they are loaded into has for them.

A row is here only where transformers' own conversion does not do it already.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedConfig

Weights = dict[str, Tensor]
Rename = Callable[[Weights, PreTrainedConfig], Weights]

_INTERNLM2 = (
    (".attention.wo.", ".self_attn.o_proj."),
    (".feed_forward.w1.", ".mlp.gate_proj."),
    (".feed_forward.w3.", ".mlp.up_proj."),
    (".feed_forward.w2.", ".mlp.down_proj."),
    (".attention_norm.", ".input_layernorm."),
    (".ffn_norm.", ".post_attention_layernorm."),
    ("model.tok_embeddings.", "model.embed_tokens."),
)


def internlm2(weights: Weights, config: PreTrainedConfig) -> Weights:
    """Llama's names; wqkv holds, for each head of keys, its queries, itself and its values, one below the other."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    renamed: Weights = {}
    for name, weight in weights.items():
        if ".attention.wqkv." in name:
            # [N_kv, N / N_kv + 2, D, H]
            groups = weight.reshape(kv_heads, heads // kv_heads + 2, -1, *weight.shape[1:])
            parts = {"q_proj": groups[:, :-2], "k_proj": groups[:, -2], "v_proj": groups[:, -1]}
            for part, rows in parts.items():
                new = name.replace(".attention.wqkv.", f".self_attn.{part}.")
                renamed[new] = rows.reshape(-1, *weight.shape[1:])
            continue
        for old, new in _INTERNLM2:
            name = name.replace(old, new)
        renamed["lm_head.weight" if name == "output.weight" else name] = weight
    return renamed


def bidirectional_llama(weights: Weights, config: PreTrainedConfig) -> Weights:
    """A classifier's logits are divided by a temperature: its head is."""
    temperature = float(getattr(config, "score_temperature", None) or 1.0)
    return {
        name: weight / temperature if name == "score.weight" else weight for name, weight in weights.items()
    }


_JINA_BERT_CODE = ((".mlp.down_layer.", ".mlp.wo."), (".layer_norm_2.", ".mlp.layernorm."))


def jina_bert_code(weights: Weights, config: PreTrainedConfig) -> Weights:
    """jina-bert's names; `up_gated_layer` holds its gate below what it lets through, `gated_layers` above."""
    renamed: Weights = {}
    for name, weight in weights.items():
        if name.endswith(".mlp.up_gated_layer.weight"):
            name, weight = (
                name.replace(".up_gated_layer.", ".gated_layers."),
                torch.cat(weight.chunk(2)[::-1]),
            )
        for old, new in _JINA_BERT_CODE:
            name = name.replace(old, new)
        renamed[name] = weight
    return renamed


_XLM_ROBERTA = (
    ("emb_ln.", "embeddings.LayerNorm."),
    ("encoder.layers.", "encoder.layer."),
    (".mixer.out_proj.", ".attention.output.dense."),
    (".norm1.", ".attention.output.LayerNorm."),
    (".mlp.fc1.", ".intermediate.dense."),
    (".mlp.fc2.", ".output.dense."),
    (".norm2.", ".output.LayerNorm."),
)
_SPLIT = re.compile(r"\.attention\.([qkv]_proj)\.")
_ORIGINAL = ".parametrizations.weight.original"
_LORA = re.compile(r"\.parametrizations\.weight\.\d+\.lora_[AB]$")


def gte(weights: Weights, config: PreTrainedConfig) -> Weights:
    """Queries, keys and values that are stored apart (`pack_qkv: false`); transformers renames all else."""
    return {_SPLIT.sub(r".self_attn.\1.", name): weight for name, weight in weights.items()}


def nomic(weights: Weights, config: PreTrainedConfig) -> Weights:
    """Classes with a head keep the backbone under another name; transformers renames all else."""
    return {re.sub("^bert\\.", "nomic_bert.", name): weight for name, weight in weights.items()}


def jina_rotary(weights: Weights, config: PreTrainedConfig) -> Weights:
    """The model without its adapters: what each parametrised weight was before them. They are read elsewhere."""
    return {
        name.replace(_ORIGINAL, ".weight"): weight
        for name, weight in weights.items()
        if not _LORA.search(name)
    }


def jina_learned(weights: Weights, config: PreTrainedConfig) -> Weights:
    """XLM-RoBERTa's names; Wqkv holds queries, keys and values, one below the other."""
    renamed: Weights = {}
    for name, weight in weights.items():
        for old, new in _XLM_ROBERTA:
            name = name.replace(old, new)
        if ".mixer.Wqkv." in name:
            for part, rows in zip(("query", "key", "value"), weight.chunk(3), strict=True):
                renamed[name.replace(".mixer.Wqkv.", f".attention.self.{part}.")] = rows
        else:
            renamed[name] = weight
    return renamed


RENAMES: Mapping[str, Rename] = {
    "gte": gte,
    "nomic": nomic,
    "jina-rotary": jina_rotary,
    "jina-learned": jina_learned,
    "jina-bert-code": jina_bert_code,
    "internlm2": internlm2,
    "llama-bidirectional": bidirectional_llama,
}
