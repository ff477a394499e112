"""Classification heads: float32 rows [R, H] to logits [R, labels].

A checkpoint's own head is replayed, whatever its class: the head is called on rows as if each were a text of one
token, with the backbone swapped for a stub that hands the rows through. No architecture needs code of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

from carpool.engine.errors import ConfigError


class ReplayedHead(nn.Module):
    """The head of a `*ForSequenceClassification`, `*ForTokenClassification` or `*ForCausalLM`, in float32."""

    def __init__(self, full: PreTrainedModel, *, per_token: bool) -> None:
        """Takes `full` apart: afterwards it holds a stub where its backbone was."""
        super().__init__()
        backbone = getattr(full, full.base_model_prefix)
        setattr(full, full.base_model_prefix, _Stub(backbone))
        _untie(full, backbone)
        self._full = full.float()
        self._per_token = per_token
        text = full.config.get_text_config()
        if text.pad_token_id is None:
            text.pad_token_id = 0  # without one, heads that look for the last token refuse more than one text
        self._token = 1 if text.pad_token_id == 0 else 0  # any id but the pad's

    def forward(self, rows: Tensor) -> Tensor:
        texts = rows[None] if self._per_token else rows[:, None]  # [1, R, H] or [R, 1, H]
        ids = torch.full(texts.shape[:2], self._token, device=rows.device)
        logits: Tensor = self._full(input_ids=ids, inputs_embeds=texts).logits
        return logits[0] if self._per_token else logits


def _untie(head: nn.Module, backbone: nn.Module) -> None:
    """Weights that the head shares with the backbone (a language model's word vectors) become float32 for it alone."""
    shared = {id(weight) for weight in backbone.parameters()}
    for module in head.modules():
        for name, weight in module._parameters.items():
            if weight is not None and id(weight) in shared:
                module._parameters[name] = nn.Parameter(weight.detach().float(), requires_grad=False)


class WordScore(nn.Module):
    """float32 [R, H] → [R, 1]: the logit of one word as the language model's own head has it, whatever that does behind
    its weights (a scale, a cap, a bias); of two words, the second's minus the first's."""

    def __init__(self, logits: ReplayedHead) -> None:
        super().__init__()
        self._logits = logits

    def forward(self, rows: Tensor) -> Tensor:
        logits: Tensor = self._logits(rows)
        return logits[:, 1:] - logits[:, :1] if logits.shape[1] == 2 else logits


class _Stub(nn.Module):
    """Stands in for a backbone: hands its `inputs_embeds` through as the last hidden state."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        for name, number in vars(backbone).items():
            if isinstance(number, int | float):  # some heads read one there: Falcon-H1's lm_head_multiplier
                setattr(self, name, number)
        self.pooler = getattr(backbone, "pooler", None)  # under its own name, which adapters know it by
        self._activation = getattr(backbone, "pooler_activation", nn.Tanh())
        if isinstance(self.pooler, nn.Linear):
            backbone.pooler = None  # type: ignore[assignment]
        elif self.pooler is not None:
            backbone.pooler = _Nothing()

    def forward(
        self, input_ids: Tensor | None = None, *args: object, inputs_embeds: Tensor, **others: object
    ) -> BaseModelOutputWithPoolingAndCrossAttentions:
        return _Hidden(last_hidden_state=inputs_embeds, pooler_output=self._pooled(inputs_embeds))

    @property
    def decoder(self) -> _Stub:
        """OPT's head calls that of its backbone."""
        return self

    def _pooled(self, hidden: Tensor) -> Tensor | None:
        """[R, L, H] → [R, H]"""
        if isinstance(self.pooler, nn.Linear):  # Albert keeps the layer and its activation apart
            pooled: Tensor = self._activation(self.pooler(hidden[:, 0]))
            return pooled
        return None if self.pooler is None else self.pooler(hidden)


@dataclass
class _Hidden(BaseModelOutputWithPoolingAndCrossAttentions):  # type: ignore[misc]
    """With what language models hand on beside their logits and never read."""

    router_logits: None = None
    cache_params: None = None
    shared_kv_states: None = None
    rope_deltas: None = None
    image_hidden_states: None = None
    video_hidden_states: None = None
    audio_hidden_states: None = None


class _Nothing(nn.Module):
    """Where a pooler was: some classes call theirs without a look whether it is there."""

    def forward(self, hidden: Tensor) -> None:
        return None


def head_from_weights(tensors: Mapping[str, Tensor], prefixes: Seq[str] = ("score", "v_head")) -> nn.Module:
    """Heads beside a backbone, as reward models have them: one linear layer, or `score.0`, ReLU, `score.2`."""
    for prefix in prefixes:
        if f"{prefix}.weight" in tensors:
            return _linear(tensors, prefix)
        numbered = sorted(int(key.split(".")[1]) for key in tensors if _is_layer_weight(key, prefix))
        if numbered:
            layers: list[nn.Module] = []
            for number in numbered:
                layers += [nn.ReLU()] * bool(layers) + [_linear(tensors, f"{prefix}.{number}")]
            return nn.Sequential(*layers)
    raise ConfigError("The checkpoint says it is a reward model and has neither a score nor a v_head weight.")


def head_from_tokens(rows: Tensor, method: str) -> nn.Module:
    """A scorer out of rows of the language model's head, float32 [tokens, H].

    "from_2_way_softmax": the second minus the first, so that a sigmoid gives the softmax over the two;
    "no_post_processing": a logit a row.
    """
    weight = rows[1:] - rows[:1] if method == "from_2_way_softmax" else rows
    return _linear({"score.weight": weight}, "score")


def keep_words(full: PreTrainedModel, token_ids: Seq[int]) -> None:
    """Narrow the head of a language model to the rows of `token_ids`, in their order: [R, V] becomes [R, tokens]."""
    head = full.get_output_embeddings()
    highest = head.weight.shape[0] - 1
    if not all(0 <= token <= highest for token in token_ids):
        raise ConfigError(f"returned_token_ids {list(token_ids)} go beyond this model's ids, 0 to {highest}.")
    rows = {"head.weight": head.weight[list(token_ids)]}
    if head.bias is not None:
        rows["head.bias"] = head.bias[list(token_ids)]
    full.set_output_embeddings(_linear(rows, "head"))


def _linear(tensors: Mapping[str, Tensor], prefix: str) -> nn.Linear:
    weight, bias = tensors[f"{prefix}.weight"].float(), tensors.get(f"{prefix}.bias")
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device=weight.device)
    layer.weight.data.copy_(weight)
    if bias is not None:
        layer.bias.data.copy_(bias.float())
    return layer.requires_grad_(False)


def _is_layer_weight(key: str, prefix: str) -> bool:
    parts = key.split(".")
    return len(parts) == 3 and parts[0] == prefix and parts[1].isdigit() and parts[2] == "weight"
