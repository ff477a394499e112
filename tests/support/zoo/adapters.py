"""Members with adapters: PEFT's own over stock transformers, and the tasks that Jina's checkpoints bring.

The folders lie as published ones do; a model that PEFT runs carries its adapters in `adapters/`, so that all load
without a flag.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification

import tiny
from carpool.engine.params import Task
from head_oracle import HeadOracle
from oracle import Oracle
from tiny_adapters import with_lora, write_lora
from zoo import stock
from zoo.decoders_translated import jina_v5_small, qwen3_hidden
from zoo.member import Member, Reference
from zoo.published import finish, last
from zoo.translated import RANK, TASKS, Published, jina_v3

Weights = dict[str, Tensor]
NAMES = ("one", "two", "three")

# Between them: another rank and scaling each, patterns of both, and layers that only one of them touches.
SETTINGS: tuple[Mapping[str, Any], ...] = (
    {"r": 4, "lora_alpha": 8},
    {"r": 8, "lora_alpha": 4, "use_rslora": True},
    {
        "r": 2,
        "lora_alpha": 2,
        "rank_pattern": {r"layers?\.0\..*": 3},
        "alpha_pattern": {r"layers?\.0\..*": 9},
    },
)


def write_adapters(folder: Path, model: nn.Module, targets: list[list[str]], **config: Any) -> None:
    """`adapters/one`, `two` and `three`, each on the layers of its `targets`."""
    for i, (name, target) in enumerate(zip(NAMES, targets, strict=True)):
        write_lora(folder / "adapters" / name, model, i, target_modules=target, **SETTINGS[i], **config)


def with_adapter(model: nn.Module, folder: Path, name: str | None) -> Any:
    """The model as PEFT runs it on this adapter."""
    return with_lora(model, folder / "adapters" / name) if name else model


def embedding(name: str, model_type: str, mode: str, targets: list[list[str]], **config: Any) -> Member:
    base = stock.embedding(name, model_type, mode, **config)

    def make(folder: Path) -> Reference:
        base.make(folder)
        write_adapters(folder, Oracle(folder, [mode]).model, targets)
        references: dict[str | None, stock.EmbedReference] = {}
        for adapter in (None, *NAMES):
            oracle = Oracle(folder, [mode])
            oracle.model = with_adapter(oracle.model, folder, adapter)
            references[adapter] = stock.EmbedReference(oracle, {})

        def answer(
            task: Task, ids: list[int], types: list[int] | None = None, adapter: str | None = None
        ) -> Tensor:
            return references[adapter](task, ids, types)

        return answer

    return Member(name, base.family, make, base.tasks, NAMES, note="and three adapters of PEFT's")


def llama_classifier(folder: Path) -> Reference:
    """Three labels; each adapter brings a `score` of its own."""
    tokenizer = tiny.byte_bpe()
    config = AutoConfig.for_model(
        "llama", vocab_size=tokenizer.get_vocab_size(), num_labels=3, hidden_size=32, intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForSequenceClassification.from_config(config)
    tiny.inflate(model)
    model.save_pretrained(folder)
    tiny.save_tokenizer(
        tokenizer,
        folder,
        pad="<|endoftext|>",
        tokenizer_class="PreTrainedTokenizerFast",
        model_max_length=128,
    )
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    write_adapters(folder, model, [attention, ["down_proj"], ["q_proj", "up_proj"]], task_type="SEQ_CLS")
    oracles = {name: with_adapter(HeadOracle(folder).full, folder, name) for name in (None, *NAMES)}

    @torch.no_grad()
    def answer(
        task: Task, ids: list[int], types: list[int] | None = None, adapter: str | None = None
    ) -> Tensor:
        row = torch.tensor([ids])
        logits: Tensor = oracles[adapter](input_ids=row, attention_mask=torch.ones_like(row)).logits[0]
        return logits.softmax(-1)

    return answer


# ── tasks of a checkpoint's own ──────────────────────────────────────────────────────────────────────────────


def jina_v3_tasks(folder: Path) -> Reference:
    """Every task's stacks are added onto the originals, embeddings' the other way round, as the published code does."""
    bare = jina_v3(folder)
    stored = load_file(folder / "model.safetensors")

    def of(task: int) -> Published:
        weights = dict(bare.encoder.weights)
        for name in weights:
            at = name.removesuffix("weight") + "parametrizations.weight.0.lora_"
            if at + "A" in stored:
                a, b = stored[at + "A"][task], stored[at + "B"][task]
                weights[name] = weights[name] + (a @ b if "embeddings" in name else b @ a) / RANK
        encoder = bare.encoder
        moved = type(encoder)(encoder.family, weights, encoder.prefix, encoder.frequencies)
        return Published(moved, bare.mode)

    tasks = {name: of(i) for i, name in enumerate(TASKS)}

    def answer(
        task: Task, ids: list[int], types: list[int] | None = None, adapter: str | None = None
    ) -> Tensor:
        return (tasks[adapter] if adapter else bare)(task, ids, types)

    return answer


def jina_v3_hf(folder: Path) -> Reference:
    """The same tasks as PEFT folders beside the native class, named with underscores."""
    made = stock.embedding(
        "", "jina_embeddings_v3", "mean", words=tiny.unigram, pad="<pad>", hidden_size=32, intermediate_size=48,
        num_attention_heads=4, max_position_embeddings=256, pad_token_id=1, bos_token_id=0, eos_token_id=2,
        type_vocab_size=1,
    )  # fmt: skip
    made.make(folder)
    layers = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2", "word_embeddings"]
    write_adapters(folder, Oracle(folder, ["mean"]).model, [layers, layers, layers])
    folders = {"retrieval.query": "one", "separation": "two", "text-matching": "three"}
    references: dict[str | None, stock.EmbedReference] = {}
    for task, name in [(None, None), *folders.items()]:
        oracle = Oracle(folder, ["mean"])
        oracle.model = with_adapter(oracle.model, folder, name)
        references[task] = stock.EmbedReference(oracle, {})
    for task, name in folders.items():
        (folder / "adapters" / name).rename(folder / task.replace(".", "_").replace("-", "_"))
    (folder / "adapters").rmdir()

    def answer(
        task: Task, ids: list[int], types: list[int] | None = None, adapter: str | None = None
    ) -> Tensor:
        return references[adapter](task, ids, types)

    return answer


def jina_v5_tasks(folder: Path) -> Reference:
    """A PEFT folder a task in `adapters/`, its names without a prefix for the language model."""
    jina_v5_small(folder)
    base = load_file(folder / "model.safetensors")
    merged: dict[str | None, Weights] = {None: base}
    for i, task in enumerate(V5_TASKS):
        generator = torch.Generator().manual_seed(i)
        own: Weights = {}
        merged[task] = dict(base)
        for name, weight in base.items():
            if "_proj." in name:
                a, b = (
                    0.2 * torch.randn(n, generator=generator)
                    for n in ((8, weight.shape[1]), (len(weight), 8))
                )
                key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
                own |= {f"{key}A.weight": a, f"{key}B.weight": b}
                merged[task][name] = weight + b @ a * 2
        place = folder / "adapters" / task
        place.mkdir(parents=True)
        save_file(own, place / "adapter_model.safetensors")
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": targets, "bias": "none"}
        tiny.write_json(place / "adapter_config.json", config)

    def answer(
        task: Task, ids: list[int], types: list[int] | None = None, adapter: str | None = None
    ) -> Tensor:
        return finish(task, qwen3_hidden(merged[adapter], ids, "", causal=True), last)

    return answer


V5_TASKS = ("retrieval", "text-matching", "clustering", "classification")
_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
_QWEN3 = {
    **_SIZES,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_XLMR = {**_SIZES, "max_position_embeddings": 258, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
_WORDS = {"words": tiny.wordpiece, "pad": "[PAD]"}
_GATED = ["gate_proj", "up_proj", "down_proj"]
_QKV = ["query", "key", "value"]

MEMBERS: tuple[Member, ...] = (
    embedding("Qwen/Qwen3-Embedding-0.6B, adapted", "qwen3", "lasttoken",
              [["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "o_proj", *_GATED], [*_GATED, "embed_tokens"]],
              **_QWEN3),
    embedding("bert-base-uncased, adapted", "bert", "mean",
              [_QKV, ["query", "dense"], ["word_embeddings", "token_type_embeddings", "value"]],
              type_vocab_size=2, pad_token_id=0, **_SIZES, **_WORDS),
    embedding("intfloat/multilingual-e5-base, adapted", "xlm-roberta", "mean",
              [_QKV, ["dense"], ["position_embeddings"]], type_vocab_size=1, words=tiny.unigram, pad="<pad>", **_XLMR),
    embedding("answerdotai/ModernBERT-base, adapted", "modernbert", "mean",
              [["Wqkv"], ["Wqkv", "Wo"], ["Wi", "tok_embeddings"]],
              local_attention=8, num_hidden_layers=4, pad_token_id=0, bos_token_id=0, eos_token_id=0, cls_token_id=0,
              sep_token_id=0, **_SIZES),
    embedding("openai-community/gpt2, adapted", "gpt2", "lasttoken",
              [["c_attn"], ["c_attn", "c_fc"], ["c_proj", "wte"]],
              n_embd=32, n_layer=2, n_head=4, n_positions=256, bos_token_id=0, eos_token_id=0),
    Member("meta-llama/Llama-3.2-1B as a classifier, adapted", "LlamaForSequenceClassification", llama_classifier,
           ("classify",), NAMES, note="three adapters of PEFT's, each with a head of its own"),
    Member("jinaai/jina-embeddings-v3, adapted to its tasks", "XLMRobertaModel", jina_v3_tasks,
           ("embed", "token_embed"), TASKS),
    Member("jinaai/jina-embeddings-v3-hf, adapted to its tasks", "JinaEmbeddingsV3Model", jina_v3_hf,
           ("embed", "token_embed"), ("retrieval.query", "separation", "text-matching")),
    Member("jinaai/jina-embeddings-v5-text-small, adapted to its tasks", "JinaEmbeddingsV5Model", jina_v5_tasks,
           ("embed", "token_embed"), V5_TASKS),
)  # fmt: skip
