"""Members served by classes of our own: mixtures of experts, and BERTs with a slope on attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import tiny
from carpool.engine.params import Task
from zoo.member import Member, Reference
from zoo.published import Weights, attend, finish, frequencies, mean, random_weights, rotate, split, write

EXPERTS, INNER = 4, 48


def layer_norm(x: Tensor, w: Weights, name: str, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[name + ".weight"], w[name + ".bias"], eps)


def linear(x: Tensor, w: Weights, name: str) -> Tensor:
    return F.linear(x, w[name + ".weight"], w.get(name + ".bias"))


def dense_shapes(**widths: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """(out, in) by name, with dots for double underscores: weights and biases."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (rows, columns) in widths.items():
        name = name.replace("__", ".")
        shapes |= {name + ".weight": (rows, columns), name + ".bias": (rows,)}
    return shapes


def norm_shapes(*names: str) -> dict[str, tuple[int, ...]]:
    return {f"{name}.{part}": (32,) for name in names for part in ("weight", "bias")}


# ── nomic's mixture of experts ───────────────────────────────────────────────────────────────────────────────


def nomic_moe_config(vocabulary: int, **changes: Any) -> dict[str, Any]:
    repository = "nomic-ai/nomic-bert-2048"
    return {
        "activation_function": "gelu",
        "add_pooling_layer": False,
        "architectures": ["NomicBertModel"],
        "attn_pdrop": 0.0,
        "auto_map": {
            "AutoConfig": f"{repository}--configuration_hf_nomic_bert.NomicBertConfig",
            "AutoModel": f"{repository}--modeling_hf_nomic_bert.NomicBertModel",
            "AutoModelForMaskedLM": f"{repository}--modeling_hf_nomic_bert.NomicBertForPreTraining",
        },
        "bos_token_id": None,
        "causal": False,
        "eos_token_id": None,
        "expert_choice_router": False,
        "ffn_div": 1,
        "fused_bias_fc": True,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-5,
        "max_trained_positions": 2048,
        "mlp_fc1_bias": True,
        "mlp_fc2_bias": True,
        "model_type": "nomic_bert",
        "moe_every_n_layers": 2,
        "moe_impl": "megablocks",
        "moe_normalize_expert_weights": False,
        "moe_resid_pdrop": 0.0,
        "moe_top_k": 2,
        "n_embd": 32,
        "n_head": 4,
        "n_inner": INNER,
        "n_layer": 4,
        "n_positions": 2048,
        "num_experts": EXPERTS,
        "num_shared_experts": 0,
        "pad_token_id": 1,
        "pad_vocab_size_multiple": 64,
        "parallel_block": False,
        "prenorm": False,
        "qkv_proj_bias": True,
        "rotary_emb_base": 10000,
        "rotary_emb_fraction": 1.0,
        "rotary_emb_interleaved": False,
        "rotary_emb_scale_base": None,
        "rotary_scaling_factor": None,
        "torch_dtype": "float32",
        "type_vocab_size": 1,
        "use_flash_attn": True,
        "use_rms_norm": None,
        "vocab_size": vocabulary,
        **changes,
    }


def nomic_moe_weights(vocabulary: int) -> Weights:
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (vocabulary, 32),
        "embeddings.token_type_embeddings.weight": (1, 32),
        **norm_shapes("emb_ln"),
    }
    for i in range(4):
        at = f"encoder.layers.{i}."
        layer = dense_shapes(attn__Wqkv=(96, 32), attn__out_proj=(32, 32)) | norm_shapes("norm1", "norm2")
        if i % 2:
            layer |= {
                "mlp.router.layer.weight": (EXPERTS, 32),
                "mlp.experts.mlp.w1": (EXPERTS * INNER, 32),
                "mlp.experts.mlp.w2": (EXPERTS * INNER, 32),
                "mlp.experts.bias": (32,),
            }
        else:
            layer |= dense_shapes(mlp__fc1=(INNER, 32), mlp__fc2=(32, INNER))
        shapes |= {at + name: shape for name, shape in layer.items()}
    return random_weights(shapes)


def nomic_moe_hidden(w: Weights, ids: list[int], chosen: int = 2) -> Tensor:
    """[tokens, H], one token and one expert at a time."""
    x = w["embeddings.word_embeddings.weight"][torch.tensor(ids)]
    x = layer_norm(x + w["embeddings.token_type_embeddings.weight"][0], w, "emb_ln", 1e-5)
    frequency = frequencies(8, 1e4)
    for i in range(4):
        at = f"encoder.layers.{i}."
        q, k, v = split(linear(x, w, at + "attn.Wqkv"), 3, 4, 8).unbind(1)
        out = attend(rotate(q, frequency), rotate(k, frequency), v, causal=False)
        x = layer_norm(x + linear(out, w, at + "attn.out_proj"), w, at + "norm1", 1e-5)
        if i % 2:
            mixed = _experts(w, at + "mlp.", x, chosen)
        else:
            mixed = linear(F.gelu(linear(x, w, at + "mlp.fc1")), w, at + "mlp.fc2")
        x = layer_norm(x + mixed, w, at + "norm2", 1e-5)
    return x


def _experts(w: Weights, at: str, x: Tensor, chosen: int) -> Tensor:
    shares = (x @ w[at + "router.layer.weight"].T).softmax(-1)
    first, second = (w[f"{at}experts.mlp.{n}"].view(EXPERTS, INNER, 32) for n in ("w1", "w2"))
    rows = []
    for token, share in zip(x, shares, strict=True):
        best = share.argsort(descending=True)[:chosen]
        rows.append(sum(share[e] * (F.gelu(first[e] @ token) @ second[e]) for e in best))
    return torch.stack(rows) + w[at + "experts.bias"]


def nomic_moe(folder: Path, **changes: Any) -> Reference:
    tokenizer = tiny.unigram()
    vocabulary = tokenizer.get_vocab_size()
    weights = nomic_moe_weights(-(-vocabulary // 64) * 64)  # the table is filled up
    write(folder, nomic_moe_config(vocabulary, **changes), weights)
    names = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "cls_token": "<s>",
        "sep_token": "</s>",
        "unk_token": "<unk>",
    }
    tiny.save_tokenizer(
        tokenizer, folder, pad="<pad>", tokenizer_class="XLMRobertaTokenizer", model_max_length=512, **names
    )
    prompts = {"query": "search_query: ", "passage": "search_document: "}
    tiny.sentence_transformers_files(folder, ["mean"], max_seq_length=512, prompts=prompts)

    def reference(
        task: Task, ids: list[int], types: list[int] | None = None, adapter: str | None = None
    ) -> Tensor:
        return finish(task, nomic_moe_hidden(weights, ids), mean)

    return reference


# ── Jina's BERT ──────────────────────────────────────────────────────────────────────────────────────────────


def jina_bert_config(vocabulary: int, *, code: bool = False, **changes: Any) -> dict[str, Any]:
    repository = "jinaai/jina-bert-v2-qk-post-norm" if code else "jinaai/jina-bert-implementation"
    return {
        "_name_or_path": repository,
        "architectures": ["JinaBertForMaskedLM"],
        "attention_probs_dropout_prob": 0.0,
        "attn_implementation": "torch",
        "auto_map": {
            "AutoConfig": f"{repository}--configuration_bert.JinaBertConfig",
            "AutoModel": f"{repository}--modeling_bert.JinaBertModel",
            "AutoModelForMaskedLM": f"{repository}--modeling_bert.JinaBertForMaskedLM",
            "AutoModelForSequenceClassification": f"{repository}--modeling_bert.JinaBertForSequenceClassification",
        },
        "classifier_dropout": None,
        "emb_pooler": "mean",
        "feed_forward_type": "geglu",
        "gradient_checkpointing": False,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": 32,
        "initializer_range": 0.02,
        "intermediate_size": INNER,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 8192,
        "model_max_length": 8192,
        "model_type": "bert",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "pad_token_id": 0,
        "position_embedding_type": "alibi",
        "torch_dtype": "bfloat16",
        "type_vocab_size": 2,
        "use_cache": True,
        "vocab_size": vocabulary,
        **changes,
    }


def jina_bert_weights(vocabulary: int, *, code: bool = False, classifier: bool = False) -> Weights:
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (vocabulary, 32),
        "embeddings.token_type_embeddings.weight": (2, 32),
        **norm_shapes("embeddings.LayerNorm"),
        **dense_shapes(pooler__dense=(32, 32)),
    }
    for i in range(2):
        layer = dense_shapes(
            attention__self__query=(32, 32),
            attention__self__key=(32, 32),
            attention__self__value=(32, 32),
            attention__output__dense=(32, 32),
        ) | norm_shapes("attention.output.LayerNorm")
        if code:
            layer |= norm_shapes("attention.self.layer_norm_q", "attention.self.layer_norm_k")
            layer |= norm_shapes("layer_norm_1", "layer_norm_2")
            layer |= {
                "mlp.up_gated_layer.weight": (2 * INNER, 32),
                **dense_shapes(mlp__down_layer=(32, INNER)),
            }
        else:
            layer |= norm_shapes("mlp.layernorm")
            layer |= {"mlp.gated_layers.weight": (2 * INNER, 32), **dense_shapes(mlp__wo=(32, INNER))}
        shapes |= {f"encoder.layer.{i}.{name}": shape for name, shape in layer.items()}
    if classifier:
        shapes = {"bert." + name: shape for name, shape in shapes.items()} | dense_shapes(classifier=(1, 32))
    return random_weights(shapes)


def jina_bert_hidden(
    w: Weights,
    ids: list[int],
    types: list[int] | None,
    *,
    code: bool = False,
    gate: Callable[[Tensor], Tensor] = F.gelu,
    slopes: tuple[float, ...] = (2**-2, 2**-4, 2**-6, 2**-8),
) -> Tensor:
    """[tokens, H]. The slopes are those of four heads."""
    x = w["embeddings.word_embeddings.weight"][torch.tensor(ids)]
    x = x + w["embeddings.token_type_embeddings.weight"][torch.tensor(types or [0] * len(ids))]
    x = layer_norm(x, w, "embeddings.LayerNorm", 1e-12)
    place = torch.arange(len(ids)).float()
    bias = -torch.tensor(slopes)[:, None, None] * (place[:, None] - place).abs()
    for i in range(2):
        at = f"encoder.layer.{i}."
        q, k, v = (linear(x, w, f"{at}attention.self.{n}") for n in ("query", "key", "value"))
        if code:
            q = layer_norm(q, w, at + "attention.self.layer_norm_q", 1e-12)
            k = layer_norm(k, w, at + "attention.self.layer_norm_k", 1e-12)
        heads = (split(y, len(slopes), -1) for y in (q, k, v))
        out = linear(attend(*heads, causal=False, bias=bias), w, at + "attention.output.dense")
        h = layer_norm(out + x, w, at + "attention.output.LayerNorm", 1e-12)
        if code:
            h = layer_norm(x + h, w, at + "layer_norm_1", 1e-12)
            states, gated = linear(h, w, at + "mlp.up_gated_layer").chunk(2, -1)
            x = layer_norm(
                h + linear(states * gate(gated), w, at + "mlp.down_layer"), w, at + "layer_norm_2", 1e-12
            )
        else:
            gated, states = linear(h, w, at + "mlp.gated_layers").chunk(2, -1)
            x = layer_norm(linear(gate(gated) * states, w, at + "mlp.wo") + h, w, at + "mlp.layernorm", 1e-12)
    return x


def jina_bert(folder: Path, *, code: bool = False, files: bool = True, **changes: Any) -> Reference:
    """`files`: with those of sentence-transformers beside it."""
    vocabulary = _tokenizer(folder)
    weights = jina_bert_weights(vocabulary, code=code)
    write(folder, jina_bert_config(vocabulary, code=code, **changes), weights)
    if files:
        tiny.sentence_transformers_files(folder, ["mean"], normalize=False, max_seq_length=8192)
    gate = F.relu if changes.get("feed_forward_type") == "reglu" else F.gelu

    def reference(
        task: Task, ids: list[int], types: list[int] | None = None, adapter: str | None = None
    ) -> Tensor:
        return finish(
            task, jina_bert_hidden(weights, ids, types, code=code, gate=gate), mean, normalize=not files
        )

    return reference


def jina_reranker(folder: Path) -> Reference:
    """jina-reranker-v1: the same model under BERT's pooler and one label."""
    vocabulary = _tokenizer(folder)
    weights = jina_bert_weights(vocabulary, classifier=True)
    config = jina_bert_config(
        vocabulary,
        architectures=["JinaBertForSequenceClassification"],
        id2label={"0": "LABEL_0"},
        label2id={"LABEL_0": 0},
    )
    write(folder, config, weights)
    bare = {name.removeprefix("bert."): weight for name, weight in weights.items()}

    def reference(
        task: Task, ids: list[int], types: list[int] | None = None, adapter: str | None = None
    ) -> Tensor:
        first = jina_bert_hidden(bare, ids, types)[0]
        return linear(torch.tanh(linear(first, bare, "pooler.dense")), bare, "classifier").sigmoid()

    return reference


def _tokenizer(folder: Path) -> int:
    tokenizer = tiny.wordpiece()
    tiny.save_tokenizer(tokenizer, folder, pad="[PAD]", tokenizer_class="BertTokenizer", model_max_length=8192,
                        unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")  # fmt: skip
    return tokenizer.get_vocab_size()


EMBED: tuple[Task, ...] = ("embed", "token_embed")

MEMBERS: tuple[Member, ...] = (
    Member("nomic-embed-text-v2-moe", "NomicBertModel (experts)", nomic_moe, EMBED),
    Member("jina-embeddings-v2-base-en", "JinaBertModel", jina_bert, EMBED),
    Member("jina-embeddings-v2-base-code", "JinaBertModel", partial(jina_bert, code=True), EMBED),
    Member(
        "jina-reranker-v1-turbo-en",
        "JinaBertForSequenceClassification",
        jina_reranker,
        ("classify",),
        pairs=True,
    ),
)
