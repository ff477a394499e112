"""Decoders that are published with code of their own: reward models, and embedders and rerankers both ways."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, models
from torch import Tensor

import spm
import tiny
from carpool.engine.params import Task
from zoo.member import Member, Reference
from zoo.published import (
    Weights,
    attend,
    decoder,
    decoder_shapes,
    finish,
    frequencies,
    last,
    llama3_frequencies,
    mean,
    random_weights,
    rms_norm,
    rotate,
    split,
    write,
)

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
STEP_TAG = 151651  # <extra_0> in Qwen2.5's vocabulary


# ── InternLM2 ────────────────────────────────────────────────────────────────────────────────────────────────


def internlm2_config(**changes: Any) -> dict[str, Any]:
    return {
        **SIZES,
        "architectures": ["InternLM2ForRewardModel"],
        "model_type": "internlm2",
        "attn_implementation": "eager",
        "auto_map": {
            "AutoConfig": "configuration_internlm2.InternLM2Config",
            "AutoModel": "modeling_internlm2.InternLM2ForRewardModel",
        },
        "bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 32,  # which some texts exceed
        "rope_scaling": {"factor": 2.0, "type": "dynamic"},
        "rope_theta": 1000000,
        "reward_token_id": 3,
        "tie_word_embeddings": False,
        **changes,
    }


def internlm2_shapes(vocabulary: int, bias: bool = False) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "model.tok_embeddings.weight": (vocabulary, 32),
        "model.norm.weight": (32,),
        "v_head.weight": (1, 32),
    }
    for i in range(2):
        at = f"model.layers.{i}."
        shapes |= {
            at + "attention.wqkv.weight": ((4 + 2 * 2) * 8, 32),
            at + "attention.wo.weight": (32, 32),
            at + "feed_forward.w1.weight": (48, 32),
            at + "feed_forward.w3.weight": (48, 32),
            at + "feed_forward.w2.weight": (32, 48),
            at + "attention_norm.weight": (32,),
            at + "ffn_norm.weight": (32,),
        }
        if bias:
            shapes |= {at + "attention.wqkv.bias": (64,), at + "attention.wo.bias": (32,)}
    return shapes


def internlm2_hidden(w: Weights, ids: list[int]) -> Tensor:
    """[tokens, H]: each of the 2 heads of keys with its 2 heads of queries before it and its values behind it.

    Texts of more than 32 tokens stretch the rotary base by their own length.
    """
    frequency = frequencies(8, 1e6 * max(1.0, 2.0 * len(ids) / 32 - 1) ** (8 / 6))
    x = w["model.tok_embeddings.weight"][torch.tensor(ids)]
    for i in range(2):
        at = f"model.layers.{i}."
        h = rms_norm(x, w[at + "attention_norm.weight"], 1e-5)
        mixed = F.linear(h, w[at + "attention.wqkv.weight"], w.get(at + "attention.wqkv.bias"))
        grouped = split(mixed, 2, 4, 8)
        q, k, v = grouped[:, :, :2].flatten(1, 2), grouped[:, :, 2], grouped[:, :, 3]
        out = attend(rotate(q, frequency), rotate(k, frequency), v, causal=True)
        x = x + F.linear(out, w[at + "attention.wo.weight"], w.get(at + "attention.wo.bias"))
        h = rms_norm(x, w[at + "ffn_norm.weight"], 1e-5)
        gate, up = (h @ w[f"{at}feed_forward.{n}.weight"].T for n in ("w1", "w3"))
        x = x + (F.silu(gate) * up) @ w[at + "feed_forward.w2.weight"].T
    return rms_norm(x, w["model.norm.weight"], 1e-5)


def internlm2_reward(folder: Path, *, bias: bool = False, pickled: bool = False, **config: Any) -> Reference:
    vocabulary = _internlm2_tokenizer(folder)
    weights = random_weights(internlm2_shapes(vocabulary, bias))
    write(folder, internlm2_config(vocab_size=vocabulary, bias=bias, **config), weights, pickled=pickled)

    def reference(
        task: Task, ids: list[int], types: list[int] | None = None, adapter: str | None = None
    ) -> Tensor:
        return internlm2_hidden(weights, ids) @ weights["v_head.weight"].T

    return reference


def _internlm2_tokenizer(folder: Path) -> int:
    """tokenizer.model, and Python code that would read it; returns the number of its pieces."""
    pieces = spm.pieces()
    spm.write_model(folder / "tokenizer.model", pieces, dummy_prefix=False)
    special = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    tokens = {0: "<unk>", 1: "<s>", 2: "</s>", 3: "<|im_end|>"}
    tiny.write_json(
        folder / "tokenizer_config.json",
        {
            "added_tokens_decoder": {str(i): {"content": text, **special} for i, text in tokens.items()},
            "additional_special_tokens": ["<|im_end|>"],
            "auto_map": {
                "AutoTokenizer": [
                    "tokenization_internlm2.InternLM2Tokenizer",
                    "tokenization_internlm2_fast.InternLM2TokenizerFast",
                ]
            },
            "bos_token": "<s>",
            "chat_template": "{% for message in messages %}{{ message['content'] }}<|im_end|>{% endfor %}",
            "clean_up_tokenization_spaces": False,
            "eos_token": "</s>",
            "model_max_length": 1000000000000000019884624838656,
            "pad_token": "</s>",
            "tokenizer_class": "InternLM2Tokenizer",
            "unk_token": "<unk>",
        },
    )
    return len(pieces)


# ── Qwen2's reward models ────────────────────────────────────────────────────────────────────────────────────


def qwen2_reward(folder: Path, *, process: bool) -> Reference:
    """Qwen2.5-Math-RM and -PRM: `score` is linear, ReLU, linear; the second answers at step tags."""
    name = "Qwen2ForProcessRewardModel" if process else "Qwen2ForRewardModel"
    labels = 2 if process else 1
    tokenizer = _with_step_tag() if process else tiny.byte_bpe()
    vocabulary = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    shapes = decoder_shapes(vocabulary, qkv_bias=True)
    weights = random_weights({
        **shapes,
        "score.0.weight": (32, 32), "score.0.bias": (32,),
        "score.2.weight": (labels, 32), "score.2.bias": (labels,),
    })  # fmt: skip
    config = {
        **SIZES,
        "architectures": [name],
        "auto_map": {
            "AutoConfig": "configuration_qwen2_rm.Qwen2RMConfig",
            "AutoModel": f"modeling_qwen2_rm.{name}",
        },
        "model_type": "qwen2",
        "num_labels": labels,
        "bos_token_id": None,
        "eos_token_id": 0,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "sliding_window": None,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "vocab_size": vocabulary,
    }
    write(folder, config, weights)
    tiny.save_tokenizer(
        tokenizer, folder, pad="<|endoftext|>", tokenizer_class="Qwen2Tokenizer", eos_token="<|endoftext|>"
    )

    def reference(
        task: Task, ids: list[int], types: list[int] | None = None, adapter: str | None = None
    ) -> Tensor:
        rows = decoder(weights, ids, head_dim=8, frequency=frequencies(8, 1e4), causal=True)
        inner = F.relu(F.linear(rows, weights["score.0.weight"], weights["score.0.bias"]))
        logits = F.linear(inner, weights["score.2.weight"], weights["score.2.bias"])
        if not process:
            return logits
        return logits[torch.tensor(ids) == STEP_TAG].softmax(-1)

    return reference


def _with_step_tag() -> Tokenizer:
    """Byte-level BPE whose <extra_0> has the id that it has in the published vocabulary."""
    small = tiny.byte_bpe()
    vocabulary = small.get_vocab(with_added_tokens=False) | {"<extra_0>": STEP_TAG}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = small.pre_tokenizer, small.decoder
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.add_tokens([AddedToken("<extra_0>", normalized=False)])
    return tokenizer


# ── Llama both ways ──────────────────────────────────────────────────────────────────────────────────────────

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 24,
}


def bidirectional_llama(
    folder: Path, *, pooling: str = "avg", rerank: bool = False, files: bool = False, **changes: Any
) -> Reference:
    """`files`: with those of sentence-transformers beside it."""
    tokenizer = tiny.byte_bpe(before=["<|begin_of_text|>"])
    vocabulary = tokenizer.get_vocab_size()
    prefix = "model." if rerank else ""
    name = "LlamaBidirectionalForSequenceClassification" if rerank else "LlamaBidirectionalModel"
    auto = "AutoModelForSequenceClassification" if rerank else "AutoModel"
    head = {"score.weight": (1, 32)} if rerank else {}
    weights = random_weights({**decoder_shapes(vocabulary, prefix=prefix), **head})
    config = {
        **SIZES,
        "architectures": [name],
        "auto_map": {
            "AutoConfig": "llama_bidirectional_model.LlamaBidirectionalConfig",
            auto: f"llama_bidirectional_model.{name}",
        },
        "model_type": "llama_bidirec",
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 0,
        "head_dim": 8,
        "mlp_bias": False,
        "pooling": pooling,
        "rms_norm_eps": 1e-5,
        "rope_scaling": LLAMA3,
        "rope_theta": 500000.0,
        "temperature": 0.02 if not rerank else 1.0,
        "tie_word_embeddings": True,
        "vocab_size": vocabulary,
        **({"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}} if rerank else {}),
        **changes,
    }
    write(folder, config, weights)
    tiny.save_tokenizer(
        tokenizer,
        folder,
        pad="<|endoftext|>",
        tokenizer_class="PreTrainedTokenizerFast",
        model_max_length=128,
    )
    if files:
        tiny.sentence_transformers_files(
            folder, ["mean"], prompts={"query": "query: ", "document": "passage: "}
        )
    pools: dict[str, Callable[[Tensor], Tensor]] = {"avg": mean, "last": last, "cls": lambda rows: rows[0]}

    def reference(
        task: Task, ids: list[int], types: list[int] | None = None, adapter: str | None = None
    ) -> Tensor:
        rows = decoder(
            weights,
            ids,
            head_dim=8,
            frequency=llama3_frequencies(8, 5e5, LLAMA3),
            causal=False,
            prefix=prefix,
            eps=1e-5,
        )
        if rerank:
            logits = weights["score.weight"] @ pools[pooling](rows) / float(config["temperature"])
            return logits.sigmoid()
        return finish(task, rows, pools[pooling])

    return reference


# ── Qwen3 both ways ──────────────────────────────────────────────────────────────────────────────────────────


def qwen3_config(vocabulary: int, **changes: Any) -> dict[str, Any]:
    return {
        **SIZES,
        "attention_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "head_dim": 8,
        "layer_types": ["full_attention"] * 2,
        "max_window_layers": 2,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "vocab_size": vocabulary,
        **changes,
    }


def qwen3_hidden(weights: Weights, ids: list[int], prefix: str = "model.", *, causal: bool = False) -> Tensor:
    return decoder(weights, ids, head_dim=8, frequency=frequencies(8, 1e6), causal=causal, prefix=prefix)


def _qwen_tokenizer(folder: Path, **config: Any) -> int:
    """Byte-level, with <|endoftext|> behind each text; returns its size."""
    tokenizer = tiny.byte_bpe(after=["<|endoftext|>"])
    tiny.save_tokenizer(
        tokenizer, folder, pad="<|endoftext|>", tokenizer_class="Qwen2Tokenizer", eos_token="<|endoftext|>", **config
    )  # fmt: skip
    return tokenizer.get_vocab_size()


def voyage(folder: Path, *, files: bool = True) -> Reference:
    """Every token through `linear`, twice as wide, then the mean."""
    vocabulary = _qwen_tokenizer(folder)
    weights = random_weights({**decoder_shapes(vocabulary, qk_norm=True), "linear.weight": (64, 32)})
    auto_map = {
        "AutoModel": "modeling_qwen3_bidirectional.Qwen3BidirectionalModel",
        "AutoConfig": "modeling_qwen3_bidirectional.Qwen3BidirectionalConfig",
    }
    write(
        folder,
        qwen3_config(
            vocabulary,
            architectures=["Qwen3BidirectionalModel"],
            auto_map=auto_map,
            model_type="qwen3",
            num_labels=64,
            use_bidirectional_attention=True,
        ),
        weights,
    )
    if files:
        tiny.sentence_transformers_files(
            folder, ["mean"], prompts={"query": "Represent the query for retrieving supporting documents: "}
        )

    def reference(
        task: Task, ids: list[int], types: list[int] | None = None, adapter: str | None = None
    ) -> Tensor:
        return finish(task, qwen3_hidden(weights, ids) @ weights["linear.weight"].T, mean)

    return reference


def pplx(folder: Path) -> Reference:
    """The mean, and whole numbers of it, by a module of its own."""
    vocabulary = _qwen_tokenizer(folder)
    weights = random_weights(decoder_shapes(vocabulary, qk_norm=True, prefix=""))
    config = qwen3_config(
        vocabulary,
        architectures=["PPLXQwen3Model"],
        auto_map={"AutoConfig": "configuration.PPLXQwen3Config", "AutoModel": "modeling.PPLXQwen3Model"},
        model_type="bidirectional_pplx_qwen3",
        use_bidirectional_attention=True,
        use_cache=False,
    )
    write(folder, config, weights)
    tiny.sentence_transformers_files(folder, ["mean"], normalize=False)
    modules = json.loads((folder / "modules.json").read_text())
    quantizer = {
        "idx": 2,
        "name": "2",
        "path": "",
        "type": "st_quantize.FlexibleQuantizer",
        "kwargs": ["quantization"],
    }
    tiny.write_json(folder / "modules.json", [*modules, quantizer])

    def reference(
        task: Task, ids: list[int], types: list[int] | None = None, adapter: str | None = None
    ) -> Tensor:
        rows = qwen3_hidden(weights, ids, "")
        return rows if task == "token_embed" else (rows.mean(0).tanh() * 127).round().clamp(-128, 127)

    return reference


def jina_v5_small(folder: Path) -> Reference:
    """The base without an adapter."""
    vocabulary = _qwen_tokenizer(folder)
    weights = random_weights(decoder_shapes(vocabulary, qk_norm=True, prefix=""))
    config = qwen3_config(
        vocabulary,
        architectures=["JinaEmbeddingsV5Model"],
        auto_map={
            "AutoConfig": "configuration_jina_embeddings_v5.JinaEmbeddingsV5Config",
            "AutoModel": "modeling_jina_embeddings_v5.JinaEmbeddingsV5Model",
        },
        model_type="jina_embeddings_v5",
        task_names=["retrieval", "text-matching", "clustering", "classification"],
        matryoshka_dimensions=[8, 16, 32],
    )
    write(folder, config, weights)

    def reference(
        task: Task, ids: list[int], types: list[int] | None = None, adapter: str | None = None
    ) -> Tensor:
        return finish(task, qwen3_hidden(weights, ids, "", causal=True), last)

    return reference


def jina_v5_nano(folder: Path) -> Reference:
    """EuroBERT: Llama that looks both ways, pooled by the last token nevertheless."""
    vocabulary = _qwen_tokenizer(folder)
    weights = random_weights(decoder_shapes(vocabulary, prefix=""))
    config = {
        **SIZES,
        "architectures": ["JinaEmbeddingsV5Model"],
        "auto_map": {
            "AutoConfig": "configuration_jina_embeddings_v5.JinaEmbeddingsV5Config",
            "AutoModel": "modeling_jina_embeddings_v5.JinaEmbeddingsV5Model",
        },
        "model_type": "jina_embeddings_v5",
        "bos_token_id": 0,
        "eos_token_id": 0,
        "clf_pooling": "late",
        "head_dim": 8,
        "mask_token_id": 0,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-5,
        "rope_theta": 250000,
        "task_names": ["retrieval", "text-matching", "clustering", "classification"],
        "tie_word_embeddings": False,
        "vocab_size": vocabulary,
    }
    write(folder, config, weights)

    def reference(
        task: Task, ids: list[int], types: list[int] | None = None, adapter: str | None = None
    ) -> Tensor:
        rows = decoder(
            weights, ids, head_dim=8, frequency=frequencies(8, 2.5e5), causal=False, prefix="", eps=1e-5
        )
        return finish(task, rows, last)

    return reference


# ── Qwen2 both ways ──────────────────────────────────────────────────────────────────────────────────────────


def gte_qwen2(folder: Path) -> Reference:
    """A language model's checkpoint whose tokenizer.json does not append what its Python tokenizer appends."""
    tokenizer = tiny.byte_bpe()
    vocabulary = tokenizer.get_vocab_size()
    weights = random_weights(
        {**decoder_shapes(vocabulary, qkv_bias=True), "lm_head.weight": (vocabulary, 32)}
    )
    config = {
        **SIZES,
        "architectures": ["Qwen2ForCausalLM"],
        "auto_map": {
            "AutoModel": "modeling_qwen.Qwen2Model",
            "AutoModelForCausalLM": "modeling_qwen.Qwen2ForCausalLM",
            "AutoModelForSequenceClassification": "modeling_qwen.Qwen2ForSequenceClassification",
        },
        "model_type": "qwen2",
        "bos_token_id": 0,
        "eos_token_id": 0,
        "is_causal": False,
        "max_window_layers": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "sliding_window": 128,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "vocab_size": vocabulary,
    }
    write(folder, config, weights)
    tiny.save_tokenizer(
        tokenizer,
        folder,
        pad="<|endoftext|>",
        tokenizer_class="Qwen2Tokenizer",
        add_eos_token=True,
        auto_map={
            "AutoTokenizer": ["tokenization_qwen.Qwen2Tokenizer", "tokenization_qwen.Qwen2TokenizerFast"]
        },
        eos_token="<|endoftext|>",
        model_max_length=128,
    )
    tiny.sentence_transformers_files(folder, ["lasttoken"], prompts={"query": "Instruct: find\nQuery: "})

    def reference(
        task: Task, ids: list[int], types: list[int] | None = None, adapter: str | None = None
    ) -> Tensor:
        assert ids[-1] == 0, "every text ends with <|endoftext|>"
        rows = decoder(weights, ids, head_dim=8, frequency=frequencies(8, 1e6), causal=False)
        return finish(task, rows, last)

    return reference


EMBED: tuple[Task, ...] = ("embed", "token_embed")
REWARD: tuple[Task, ...] = ("token_classify",)
STEPS = (
    "the cat<extra_0>sat<extra_0>on a mat<extra_0>",
    "rain in spain",
    "<extra_0>",
    "ice cream<extra_0> and war",
)

MEMBERS: tuple[Member, ...] = (
    Member(
        "internlm2-1_8b-reward", "InternLM2ForRewardModel", partial(internlm2_reward, pickled=True), REWARD
    ),
    Member("Qwen2.5-Math-RM-72B", "Qwen2ForRewardModel", partial(qwen2_reward, process=False), REWARD),
    Member(
        "Qwen2.5-Math-PRM-7B",
        "Qwen2ForProcessRewardModel",
        partial(qwen2_reward, process=True),
        REWARD,
        texts=STEPS,
    ),
    Member(
        "llama-nemotron-embed-1b-v2",
        "LlamaBidirectionalModel",
        partial(bidirectional_llama, files=True),
        EMBED,
    ),
    Member("llama-3.2-nv-embedqa-1b-v2", "LlamaBidirectionalModel", bidirectional_llama, EMBED),
    Member(
        "llama-nemotron-rerank-1b-v2",
        "LlamaBidirectionalForSequenceClassification",
        partial(bidirectional_llama, rerank=True),
        ("classify",),
    ),
    Member("voyage-4-nano", "VoyageQwen3BidirectionalEmbedModel", voyage, EMBED),
    Member("pplx-embed-v1-0.6b", "PPLXQwen3Model", pplx, EMBED),
    Member("gte-Qwen2-1.5B-instruct", "Qwen2ForCausalLM", gte_qwen2, EMBED),
    Member(
        "jina-embeddings-v5-text-small",
        "JinaEmbeddingsV5Model",
        jina_v5_small,
        EMBED,
        note="base, no adapter",
    ),
    Member(
        "jina-embeddings-v5-text-nano", "JinaEmbeddingsV5Model", jina_v5_nano, EMBED, note="base, no adapter"
    ),
)
