"""JinaBertModel: the BERT of jina-embeddings-v2 and jina-reranker-v1, whose positions are a slope on attention (ALiBi).

Tokens that stand d apart have d times the head's slope taken from their score, both ways. Feed-forward layers are
gated. Modules are named as the published weights of jina-embeddings-v2-base-en are.
"""

from __future__ import annotations

import math

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPooling, SequenceClassifierOutput

from carpool.engine.models.attention import packed_attention, under_way


@strict
class JinaBertConfig(PreTrainedConfig):  # type: ignore[misc]
    """In transformers' words; `engine/dialects/jina_bert.py` puts the published ones into them."""

    model_type = "jina_bert_v2"

    vocab_size: int = 30528
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "gelu"
    max_position_embeddings: int = 8192
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    qk_norm: bool = False  # queries and keys are normalised, and attention's output once more


class _PreTrained(PreTrainedModel):  # type: ignore[misc]
    config_class = JinaBertConfig
    base_model_prefix = "bert"
    _supports_attention_backend = True
    _supports_sdpa = True


class JinaBertModel(_PreTrained):
    """input_ids [1, T] of a packed row → last_hidden_state [1, T, H]."""

    def __init__(self, config: JinaBertConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        self.slopes = _slopes(config.num_attention_heads)
        self._slopes_there: Tensor | None = None  # on the device, from the first batch on
        self.embeddings = _Embeddings(config)
        self.encoder = _Encoder(config)
        self.pooler = _Pooler(config) if add_pooling_layer else None
        self.post_init()

    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None = None) -> BaseModelOutputWithPooling:
        hidden = self.embeddings(input_ids, token_type_ids)
        distances = under_way().distances(hidden.device).abs()
        position_bias = -self._slopes_on(hidden.device)[:, None] * distances  # float32 [N, 2M - 1]
        for layer in self.encoder.layer:
            hidden = layer(hidden, position_bias)
        pooled = None if self.pooler is None else self.pooler(hidden)
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=pooled)

    def _slopes_on(self, device: torch.device) -> Tensor:
        """float32 [N]. Kept, since to carry them there takes waiting for it; no buffer, for those are loaded."""
        if self._slopes_there is None or self._slopes_there.device != device:
            with torch.inference_mode(False):  # replicas copy it outside
                self._slopes_there = torch.tensor(self.slopes, device=device)
        return self._slopes_there


class JinaBertForSequenceClassification(_PreTrained):
    """A linear layer on BERT's pooler: jina-reranker-v1."""

    def __init__(self, config: JinaBertConfig) -> None:
        super().__init__(config)
        self.bert = JinaBertModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, input_ids: Tensor, **inputs: Tensor) -> SequenceClassifierOutput:
        pooled = self.bert(input_ids, **inputs).pooler_output
        return SequenceClassifierOutput(logits=self.classifier(pooled))


class _Embeddings(nn.Module):
    def __init__(self, config: JinaBertConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None) -> Tensor:
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        out: Tensor = self.LayerNorm(self.word_embeddings(input_ids) + self.token_type_embeddings(types))
        return out


class _Encoder(nn.Module):
    def __init__(self, config: JinaBertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))


class _Layer(nn.Module):
    def __init__(self, config: JinaBertConfig) -> None:
        super().__init__()
        self.attention = _Attention(config)
        self.layer_norm_1 = (
            nn.LayerNorm(config.hidden_size, config.layer_norm_eps) if config.qk_norm else None
        )
        self.mlp = _GatedMlp(config)

    def forward(self, hidden: Tensor, position_bias: Tensor) -> Tensor:
        attended = self.attention(hidden, position_bias)
        if self.layer_norm_1 is not None:  # what came in is then added a second time
            attended = self.layer_norm_1(hidden + attended)
        out: Tensor = self.mlp(attended)
        return out


class _Attention(nn.Module):
    def __init__(self, config: JinaBertConfig) -> None:
        super().__init__()
        self.self = _SelfAttention(config)
        self.output = _SelfOutput(config)

    def forward(self, hidden: Tensor, position_bias: Tensor) -> Tensor:
        out: Tensor = self.output(self.self(hidden, position_bias), hidden)
        return out


class _SelfAttention(nn.Module):
    is_causal = False

    def __init__(self, config: JinaBertConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.layer_norm_q: nn.Module = nn.Identity()
        self.layer_norm_k: nn.Module = nn.Identity()
        if config.qk_norm:
            self.layer_norm_q = nn.LayerNorm(width, config.layer_norm_eps)
            self.layer_norm_k = nn.LayerNorm(width, config.layer_norm_eps)

    def forward(self, hidden: Tensor, position_bias: Tensor) -> Tensor:
        query, key, value = (
            states.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [1, N, T, D]
            for states in (
                self.layer_norm_q(self.query(hidden)),
                self.layer_norm_k(self.key(hidden)),
                self.value(hidden),
            )
        )
        out, _ = packed_attention(self, query, key, value, None, position_bias=position_bias)
        return out.flatten(2)


class _SelfOutput(nn.Module):
    def __init__(self, config: JinaBertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, attended: Tensor, hidden: Tensor) -> Tensor:
        out: Tensor = self.LayerNorm(self.dense(attended) + hidden)
        return out


class _GatedMlp(nn.Module):
    """`gated_layers` holds the gate, which goes through the activation, and below it what it lets through."""

    def __init__(self, config: JinaBertConfig) -> None:
        super().__init__()
        self.gated_layers = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.act = ACT2FN[config.hidden_act]
        self.wo = nn.Linear(config.intermediate_size, config.hidden_size)
        self.layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, hidden: Tensor) -> Tensor:
        gate, states = self.gated_layers(hidden).chunk(2, dim=-1)
        out: Tensor = self.layernorm(self.wo(self.act(gate) * states) + hidden)
        return out


class _Pooler(nn.Module):
    def __init__(self, config: JinaBertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.tanh(self.dense(hidden[:, 0]))


def _slopes(heads: int) -> list[float]:
    """A geometric series that ends at 2 ** -8; for other numbers than powers of two, every other one of the next."""
    power = 2 ** math.floor(math.log2(heads))
    series = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    between = [2.0 ** (-4.0 * (i + 1) / power) for i in range(0, 2 * power, 2)]
    return series + between[: heads - power]
