"""Flops: the arithmetic of a text, counted from the model, for saying how much of a machine was used.

A multiplication and an addition are two operations. Counted are the products of linear layers and of attention; norms,
activations, embeddings and pooling are not, though they take time: utilisation is what remains for products.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Flops:
    """Of one model. `weights` of the linear layers that every token goes through; of each layer that attends, `width`
    is heads times head size, and `windows` has how far it sees, None for as far as the text goes.
    """

    weights: int
    width: int
    windows: tuple[int | None, ...]
    causal: bool = False

    @classmethod
    def of(cls, model: Path) -> Flops:
        """Of a checkpoint's folder, built without memory for its weights."""
        import torch
        from transformers import AutoConfig, AutoModel

        config = AutoConfig.from_pretrained(model)
        with torch.device("meta"):
            module = AutoModel.from_config(config)
        linears = {
            name: layer for name, layer in module.named_modules() if isinstance(layer, torch.nn.Linear)
        }
        # BERT's pooler sees one token of a text, and embedding models leave it out.
        weights = sum(
            layer.weight.numel() for name, layer in linears.items() if not name.startswith("pooler")
        )
        heads = config.num_attention_heads
        width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
        # A text sees less than `window` tokens away; ModernBERT says how many it sees in all, on both sides.
        local = getattr(config, "local_attention", None)
        window = local // 2 + 1 if local else getattr(config, "sliding_window", None)
        causal = bool(getattr(config, "is_causal", config.model_type in _CAUSAL))
        return cls(
            weights, width, tuple(None if kind == "full_attention" else window for kind in kinds), causal
        )

    def of_text(self, tokens: int) -> int:
        """Operations for a text of so many tokens."""
        seen = sum(pairs(tokens, window, self.causal) for window in self.windows)
        return 2 * self.weights * tokens + 4 * self.width * seen

    def of_texts(self, tokens: Iterable[int]) -> int:
        return sum(map(self.of_text, tokens))


_CAUSAL = ("qwen3", "qwen2", "llama", "mistral", "gemma", "gemma2", "phi3", "gpt2")


def pairs(length: int, window: int | None = None, causal: bool = False) -> int:
    """Pairs of a query and a key that it sees: those less than `window` away, if causal not ahead of it."""
    reach = min(length, window or length) - 1  # the farthest that is seen
    behind = length * reach - reach * (reach + 1) // 2  # the keys before each query
    return length + behind * (1 if causal else 2)
