"""NomicMoeModel: nomic's BERT with a mixture of experts in every other layer (nomic-embed-text-v2-moe).

A BERT with rotary positions whose n-th layers send each token through a few of many feed-forward networks and add the
results, weighted by what the router thinks of them. Modules are named as the published weights are.
"""

from __future__ import annotations

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.nomic_bert.modeling_nomic_bert import (
    NomicBertRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

Rotation = tuple[Tensor, Tensor]  # cosines and sines, [1, T, D] each


@strict
class NomicMoeConfig(PreTrainedConfig):  # type: ignore[misc]
    """In transformers' words; `engine/dialects/nomic_moe.py` puts the published ones into them."""

    model_type = "nomic_bert_moe"
    default_theta = 10000.0

    vocab_size: int = 250048
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 2048
    type_vocab_size: int = 1
    layer_norm_eps: float = 1e-5
    pad_token_id: int | None = 1
    rope_parameters: dict[str, Any] | None = None
    moe_every_n_layers: int = 2
    num_experts: int = 8
    num_experts_per_tok: int = 2


class NomicMoeModel(PreTrainedModel):  # type: ignore[misc]
    """input_ids [1, T] → last_hidden_state [1, T, H]."""

    config_class = NomicMoeConfig
    base_model_prefix = "nomic_bert"
    _supports_attention_backend = True
    _supports_sdpa = True
    _keys_to_ignore_on_load_unexpected = (r"^cls\.", r"^pooler\.")

    def __init__(self, config: NomicMoeConfig) -> None:
        super().__init__(config)
        self.embeddings = _Embeddings(config)
        self.emb_ln = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.encoder = _Encoder(config)
        self.rotary_emb = NomicBertRotaryEmbedding(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> BaseModelOutput:
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        hidden = self.emb_ln(self.embeddings(input_ids, token_type_ids))
        rotation = self.rotary_emb(hidden, position_ids)
        for layer in self.encoder.layers:
            hidden = layer(hidden, rotation, attention_mask)
        return BaseModelOutput(last_hidden_state=hidden)


class _Embeddings(nn.Module):
    def __init__(self, config: NomicMoeConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        types = config.type_vocab_size
        self.token_type_embeddings = nn.Embedding(types, config.hidden_size) if types else None

    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None) -> Tensor:
        words: Tensor = self.word_embeddings(input_ids)
        if self.token_type_embeddings is None:
            return words
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        out: Tensor = words + self.token_type_embeddings(types)
        return out


class _Encoder(nn.Module):
    def __init__(self, config: NomicMoeConfig) -> None:
        super().__init__()
        every = config.moe_every_n_layers
        mixed = [i % every == 1 for i in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(_Layer(config, _Mixture(config) if m else _Mlp(config)) for m in mixed)


class _Layer(nn.Module):
    """Each half is added to what came in, and the sum normalised."""

    def __init__(self, config: NomicMoeConfig, mlp: nn.Module) -> None:
        super().__init__()
        self.attn = _Attention(config)
        self.mlp = mlp
        self.norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, hidden: Tensor, rotation: Rotation, attention_mask: Tensor | None) -> Tensor:
        hidden = self.norm1(hidden + self.attn(hidden, rotation, attention_mask))
        out: Tensor = self.norm2(hidden + self.mlp(hidden))
        return out


class _Attention(nn.Module):
    is_causal = False

    def __init__(self, config: NomicMoeConfig) -> None:
        super().__init__()
        self.config = config
        self.heads = config.num_attention_heads
        self.Wqkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor, rotation: Rotation, attention_mask: Tensor | None) -> Tensor:
        rows, tokens, _ = hidden.shape
        # [3, rows, N, T, D]
        query, key, value = self.Wqkv(hidden).view(rows, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, key = apply_rotary_pos_emb(query, key, *rotation)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        out, _ = attend(self, query, key, value, attention_mask, scaling=query.shape[-1] ** -0.5)
        projected: Tensor = self.out_proj(out.reshape(rows, tokens, -1))
        return projected


class _Mlp(nn.Module):
    def __init__(self, config: NomicMoeConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = nn.GELU()
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.activation(self.fc1(x)))
        return out


class _Mixture(nn.Module):
    """The best few experts of each token, weighted by their share of the softmax over all of them.

    The shares are not made to add up to one, and one bias is added once, whichever experts spoke.
    """

    def __init__(self, config: NomicMoeConfig) -> None:
        super().__init__()
        self.chosen = config.num_experts_per_tok
        self.router = _Router(config)
        self.experts = _Experts(config)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        shares, experts = self.router(flat).topk(self.chosen, dim=-1)  # [T, chosen] each
        out: Tensor = self.experts(flat, shares, experts)
        return out.view_as(x)


class _Router(nn.Module):
    def __init__(self, config: NomicMoeConfig) -> None:
        super().__init__()
        self.layer = _Float32Linear(config.hidden_size, config.num_experts, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[T, H] → float32 [T, experts]."""
        scores: Tensor = self.layer(x)
        return scores.softmax(dim=-1)


class _Float32Linear(nn.Linear):
    """Whatever the model runs in: rounding must not decide who is chosen."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.float(), self.weight.float())


class _Experts(nn.Module):
    def __init__(self, config: NomicMoeConfig) -> None:
        super().__init__()
        self.mlp = _ExpertWeights(config)
        self.bias = nn.Parameter(torch.zeros(config.hidden_size))

    def forward(self, x: Tensor, shares: Tensor, experts: Tensor) -> Tensor:
        """x [T, H], shares float32 and experts int64 [T, chosen] → [T, H].

        Pairs of token and expert are sorted by expert, so that each expert runs once, over all its tokens together.
        """
        order = experts.flatten().argsort(stable=True)  # [T * chosen]
        tokens = order // experts.shape[1]
        counts = experts.flatten().bincount(minlength=self.mlp.num_experts).tolist()
        said = torch.cat(
            [
                self.mlp(rows, expert)
                for expert, rows in enumerate(torch.split(x[tokens], counts))
                if len(rows)
            ]
        )
        weighted = said.float() * shares.flatten()[order, None]
        out = torch.zeros_like(x, dtype=torch.float32).index_add_(0, tokens, weighted)
        return out.to(x.dtype) + self.bias


class _ExpertWeights(nn.Module):
    """All experts' two layers, one below the other: [experts * F, H] both."""

    def __init__(self, config: NomicMoeConfig) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        rows = config.num_experts * config.intermediate_size
        self.w1 = nn.Parameter(torch.empty(rows, config.hidden_size))
        self.w2 = nn.Parameter(torch.empty(rows, config.hidden_size))

    def forward(self, x: Tensor, expert: int) -> Tensor:
        """x [tokens, H] through one expert."""
        first, second = (w.chunk(self.num_experts)[expert] for w in (self.w1, self.w2))
        return nn.functional.gelu(x @ first.T) @ second
