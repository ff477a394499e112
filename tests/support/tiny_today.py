"""Tiny models of today's architectures whose heads are wide enough to be attended natively, with weights that tell.

All that a layer could be mistaken in shows: norms are far from one another and from 1, biases from 0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel

import tiny

_SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_BOTH = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
_WINDOWS: dict[str, Any] = {"num_hidden_layers": 4, "sliding_window": 8, "layer_types": _BOTH}
_EACH = {"num_attention_heads": 2, "num_key_value_heads": 2}
_SHARED = {"num_attention_heads": 2, "num_key_value_heads": 1}
_MODERN = {
    "local_attention": 8, "num_hidden_layers": 4, "global_attn_every_n_layers": 2, "norm_bias": True,
    "bos_token_id": 0, "cls_token_id": 0, "sep_token_id": 0, **_EACH,
}  # fmt: skip

# By name: transformers' model type, and what is not as above.
STRAIGHT: dict[str, tuple[str, dict[str, Any]]] = {
    "modernbert": ("modernbert", _MODERN),
    "qwen3": ("qwen3", {}),
    "qwen2": ("qwen2", {**_SHARED, "use_sliding_window": False}),  # its projections have biases
    "llama": ("llama", {}),
    "mistral": ("mistral", {"sliding_window": 8}),
    "phi3": ("phi3", _SHARED),  # query, key and value are one layer, gate and up another
    "smollm3": ("smollm3", {**_SHARED, "no_rope_layers": [1, 0, 1]}),
    "nomic": ("nomic_bert", {**_EACH, "type_vocab_size": 2}),
    "gemma2": ("gemma2", {**_WINDOWS, "query_pre_attn_scalar": 32, "attn_logit_softcapping": 2.0}),
    "gemma3": ("gemma3_text", {**_WINDOWS, "query_pre_attn_scalar": 32}),
}
# Layers that do something else: norms of all heads at once; residuals that are multiplied; both blocks of one input;
# queries that grow with their place in a long text.
CROOKED: dict[str, tuple[str, dict[str, Any]]] = {
    "olmo2": ("olmo2", _EACH),
    "granite": ("granite", {**_SHARED, "residual_multiplier": 0.5}),
    "cohere": ("cohere", _SHARED),
    "ministral3": ("ministral3", {}),
}


def make(name: str, path: Path) -> None:
    """A checkpoint of one of these."""
    model_type, changes = {**STRAIGHT, **CROOKED}[name]
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny.byte_bpe(after=["<|endoftext|>"])
    config = AutoConfig.for_model(model_type, vocab_size=tokenizer.get_vocab_size(), **{**_SHAPE, **changes})
    torch.manual_seed(5)
    model = AutoModel.from_config(config)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for weight in model.parameters():
            drawn = torch.randn(weight.shape, generator=generator)
            weight.copy_(drawn * (weight.shape[-1] ** -0.5 if weight.ndim > 1 else 0.4) + (weight.ndim == 1))
    model.save_pretrained(path)
    tiny.save_tokenizer(
        tokenizer, path, pad="<|endoftext|>", tokenizer_class="PreTrainedTokenizerFast", model_max_length=128
    )
