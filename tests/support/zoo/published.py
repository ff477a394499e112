"""What the members written by hand share: random weights by name and shape, folders, and the parts of a decoder.

The references are a few lines of torch each, from the published architectures, over the published names of weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

import tiny
from carpool.engine.params import Task

Weights = dict[str, Tensor]
Shapes = Mapping[str, tuple[int, ...]]


def random_weights(shapes: Shapes, seed: int = 0) -> Weights:
    """Large enough that attention is peaked and every mistake shows, as `tiny.inflate` has it."""
    generator = torch.Generator().manual_seed(seed)
    weights: Weights = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) >= 2:
            weights[name] = noise * (0.5 if "embed" in name else 1.2 * shape[-1] ** -0.5)
        elif "norm" in name.lower() or ".ln" in name or "_ln" in name:
            weights[name] = (1.0 if name.endswith("weight") else 0.0) + 0.1 * noise
        else:
            weights[name] = 0.1 * noise
    return weights


def write(folder: Path, config: Mapping[str, Any], weights: Weights, *, pickled: bool = False) -> None:
    """config.json and the weights, as one safetensors file or as torch's pickle."""
    tiny.write_json(folder / "config.json", dict(config))
    if pickled:
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        save_file(weights, folder / "model.safetensors", {"format": "pt"})


def finish(task: Task, rows: Tensor, pool: Callable[[Tensor], Tensor], normalize: bool = True) -> Tensor:
    """An embedding model's answer of its last hidden states [tokens, H]."""
    result = rows if task == "token_embed" else pool(rows)
    return F.normalize(result, dim=-1) if normalize else result


def mean(rows: Tensor) -> Tensor:
    return rows.mean(0)


def last(rows: Tensor) -> Tensor:
    return rows[-1]


# ── the parts of a decoder ───────────────────────────────────────────────────────────────────────────────────


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * weight


def split(x: Tensor, *sizes: int) -> Tensor:
    """[..., product of sizes] → [..., *sizes]."""
    return x.reshape(*x.shape[:-1], *sizes)


def frequencies(width: int, theta: float) -> Tensor:
    exponents = torch.arange(0, width, 2).float() / width
    frequency: Tensor = torch.tensor(theta) ** -exponents
    return frequency


def llama3_frequencies(width: int, theta: float, scaling: Mapping[str, Any]) -> Tensor:
    """Long waves are stretched, short ones kept, and those between blended."""
    plain = frequencies(width, theta)
    turns = float(scaling["original_max_position_embeddings"]) * plain / (2 * math.pi)
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return plain * keep + plain / float(scaling["factor"]) * (1 - keep)


def rotate(x: Tensor, frequency: Tensor) -> Tensor:
    """x [tokens, N, D] by its positions, in halves."""
    angle = torch.arange(len(x)).float()[:, None] * frequency  # [tokens, D / 2]
    cos, sin = (torch.cat([f, f], -1)[:, None] for f in (angle.cos(), angle.sin()))
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin


def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, bias: Tensor | None = None) -> Tensor:
    """q [tokens, N, D], k and v [tokens, N_kv, D], bias [N, tokens, tokens] → [tokens, N * D]."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("inh,jnh->nij", q, k) / math.sqrt(q.shape[-1])
    if bias is not None:
        scores = scores + bias
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores[0]).triu(1).bool(), float("-inf"))
    return torch.einsum("nij,jnh->inh", scores.softmax(-1), v).flatten(1)


def decoder(
    weights: Weights,
    ids: list[int],
    *,
    head_dim: int,
    frequency: Tensor,
    causal: bool,
    prefix: str = "model.",
    eps: float = 1e-6,
) -> Tensor:
    """[tokens, H] of a Llama, Qwen2 or Qwen3, told apart by which weights there are."""
    w = {name.removeprefix(prefix): weight for name, weight in weights.items()}
    x = w["embed_tokens.weight"][torch.tensor(ids)]
    for i in range(sum(name.endswith("input_layernorm.weight") for name in w)):
        at = f"layers.{i}."
        h = rms_norm(x, w[at + "input_layernorm.weight"], eps)
        q, k, v = (
            split(
                F.linear(h, w[f"{at}self_attn.{n}_proj.weight"], w.get(f"{at}self_attn.{n}_proj.bias")),
                -1,
                head_dim,
            )
            for n in "qkv"
        )
        if at + "self_attn.q_norm.weight" in w:
            q, k = (rms_norm(y, w[f"{at}self_attn.{n}_norm.weight"], eps) for n, y in (("q", q), ("k", k)))
        mixed = attend(rotate(q, frequency), rotate(k, frequency), v, causal=causal)
        x = x + mixed @ w[at + "self_attn.o_proj.weight"].T
        h = rms_norm(x, w[at + "post_attention_layernorm.weight"], eps)
        gate, up = (h @ w[f"{at}mlp.{n}_proj.weight"].T for n in ("gate", "up"))
        x = x + (F.silu(gate) * up) @ w[at + "mlp.down_proj.weight"].T
    return rms_norm(x, w["norm.weight"], eps)


def decoder_shapes(
    vocabulary: int,
    *,
    hidden: int = 32,
    inner: int = 48,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 8,
    prefix: str = "model.",
    qkv_bias: bool = False,
    qk_norm: bool = False,
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what `decoder` reads."""
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (vocabulary, hidden),
        "norm.weight": (hidden,),
    }
    for i in range(layers):
        at = f"layers.{i}."
        for name, rows in (("q", heads * head_dim), ("k", kv_heads * head_dim), ("v", kv_heads * head_dim)):
            shapes[f"{at}self_attn.{name}_proj.weight"] = (rows, hidden)
            if qkv_bias:
                shapes[f"{at}self_attn.{name}_proj.bias"] = (rows,)
            if qk_norm and name != "v":
                shapes[f"{at}self_attn.{name}_norm.weight"] = (head_dim,)
        shapes |= {
            at + "self_attn.o_proj.weight": (hidden, heads * head_dim),
            at + "mlp.gate_proj.weight": (inner, hidden),
            at + "mlp.up_proj.weight": (inner, hidden),
            at + "mlp.down_proj.weight": (hidden, inner),
            at + "input_layernorm.weight": (hidden,),
            at + "post_attention_layernorm.weight": (hidden,),
        }
    return {prefix + name: shape for name, shape in shapes.items()}
