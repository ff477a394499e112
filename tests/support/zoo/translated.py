"""Members whose published code is not run: encoders that a dialect puts into the words of a class transformers has.

The checkpoints have the names, keys and side files of the published ones; the reference is their architecture in plain
torch, written from the published code: a post-norm encoder whose families differ in names, positions and MLP.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

import tiny
from carpool.engine.params import Task
from zoo.member import Member, Reference

H, INNER, HEADS, LAYERS = 32, 256, 4, 3  # nomic's inner width is a multiple of 256
D = H // HEADS
TASKS = ("retrieval.query", "retrieval.passage", "separation", "classification", "text-matching")
RANK = 4

Weights = dict[str, Tensor]
Layer = Callable[[str, Tensor], Tensor]  # the linear layer of a name, applied


# ── architectures, as they were published ────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Family:
    """What its weights are called behind the backbone's prefix, and its MLP."""

    norm: str
    layers: str
    qkv: tuple[str, ...]
    out: str
    norm_1: str
    norm_2: str
    mlp: Callable[[Layer, Tensor], Tensor]
    shapes: Mapping[str, tuple[int, int]]  # of the MLP: out, in
    biased: frozenset[str]  # which linear layers have one


def _new_mlp(linear: Layer, x: Tensor) -> Tensor:
    up, gate = linear("mlp.up_gate_proj", x).chunk(2, dim=-1)
    return linear("mlp.down_proj", F.gelu(gate) * up)


def _nomic_mlp(linear: Layer, x: Tensor) -> Tensor:
    return linear("mlp.fc2", linear("mlp.fc11", x) * F.silu(linear("mlp.fc12", x)))


def _flash_mlp(linear: Layer, x: Tensor) -> Tensor:
    return linear("mlp.fc2", F.gelu(linear("mlp.fc1", x)))


NEW = Family(
    "embeddings.LayerNorm", "encoder.layer", ("attention.qkv_proj",), "attention.o_proj", "attn_ln", "mlp_ln", _new_mlp,
    {"mlp.up_gate_proj": (2 * INNER, H), "mlp.down_proj": (H, INNER)},
    frozenset({"attention.qkv_proj", "attention.o_proj", "mlp.down_proj"}),
)  # fmt: skip
_APART = tuple(f"attention.{part}_proj" for part in "qkv")
NEW_UNPACKED = replace(NEW, qkv=_APART, biased=NEW.biased | set(_APART))
NOMIC = Family(
    "emb_ln", "encoder.layers", ("attn.Wqkv",), "attn.out_proj", "norm1", "norm2", _nomic_mlp,
    {"mlp.fc11": (INNER, H), "mlp.fc12": (INNER, H), "mlp.fc2": (H, INNER)}, frozenset(),
)  # fmt: skip
FLASH = Family(
    "emb_ln", "encoder.layers", ("mixer.Wqkv",), "mixer.out_proj", "norm1", "norm2", _flash_mlp,
    {"mlp.fc1": (INNER, H), "mlp.fc2": (H, INNER)},
    frozenset({"mixer.Wqkv", "mixer.out_proj", "mlp.fc1", "mlp.fc2"}),
)  # fmt: skip


def random_weights(family: Family, vocab: int, *, prefix: str = "", types: int = 1, rows: int = 0) -> Weights:
    """The backbone's, inflated; `rows` of learned positions, if any."""
    generator = torch.Generator().manual_seed(3)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    weights: Weights = {}
    for table, n in (("word", vocab), ("token_type", types), ("position", rows)):
        if n:
            weights[f"embeddings.{table}_embeddings.weight"] = 0.5 * noise(n, H)
    norms = [family.norm]
    for i in range(LAYERS):
        at = f"{family.layers}.{i}."
        norms += [at + family.norm_1, at + family.norm_2]
        shapes = dict.fromkeys(family.qkv, (3 * H // len(family.qkv), H))
        for name, (n, m) in {**shapes, family.out: (H, H), **family.shapes}.items():
            weights[f"{at}{name}.weight"] = 1.2 * noise(n, m) * m**-0.5
            if name in family.biased:
                weights[f"{at}{name}.bias"] = 0.1 * noise(n)
    for norm in norms:
        weights |= {f"{norm}.weight": 1 + 0.1 * noise(H), f"{norm}.bias": 0.1 * noise(H)}
    return {prefix + name: weight for name, weight in weights.items()}


def linear_head(out: int, *names: str) -> Weights:
    """Linear layers H → H called `names`, but the last one H → `out`."""
    generator = torch.Generator().manual_seed(5)
    weights: Weights = {}
    for name in names:
        n = out if name == names[-1] else H
        weights[f"{name}.weight"] = 1.5 * torch.randn(n, H, generator=generator) * H**-0.5
        weights[f"{name}.bias"] = 0.1 * torch.randn(n, generator=generator)
    return weights


def rotary_frequencies(theta: float, factor: float = 1.0) -> Tensor:
    """[D/2]. NewModel's "ntk" multiplies the base by its factor, and divides what comes of it by its 2/D-th power."""
    powers = torch.arange(0, D, 2).float() / D
    frequencies: Tensor = torch.tensor(theta * factor).pow(-powers) / factor ** (2 / D)
    return frequencies


@dataclass(frozen=True, slots=True)
class Encoder:
    """float32, one text at a time."""

    family: Family
    weights: Weights
    prefix: str = ""
    frequencies: Tensor | None = None  # [D/2], of its rotary embedding
    eps: float = 1e-5
    pad_id: int = 1  # learned positions are counted from behind it

    def hidden(self, ids: list[int], types: list[int] | None = None) -> Tensor:
        """[tokens, H]"""
        family, n = self.family, len(ids)
        x = self._get("embeddings.word_embeddings.weight")[ids]
        if self.prefix + "embeddings.token_type_embeddings.weight" in self.weights:
            x = x + self._get("embeddings.token_type_embeddings.weight")[types or [0] * n]
        if self.frequencies is None:
            real = torch.tensor(ids) != self.pad_id
            positions = real.cumsum(0) * real + self.pad_id
            x = x + self._get("embeddings.position_embeddings.weight")[positions]
        x = self._norm(family.norm, x)
        for i in range(LAYERS):
            at = f"{family.layers}.{i}."

            def linear(name: str, value: Tensor, at: str = at) -> Tensor:
                return F.linear(
                    value, self._get(f"{at}{name}.weight"), self.weights.get(f"{self.prefix}{at}{name}.bias")
                )

            qkv = torch.cat([linear(name, x) for name in family.qkv], dim=-1)
            query, key, value = qkv.view(n, 3, HEADS, D).permute(1, 2, 0, 3)  # each [N, T, D]
            query, key = self._turned(query), self._turned(key)
            mixed = (query @ key.mT / D**0.5).softmax(-1) @ value
            x = self._norm(at + family.norm_1, x + linear(family.out, mixed.transpose(0, 1).reshape(n, H)))
            x = self._norm(at + family.norm_2, x + family.mlp(linear, x))
        return x

    def _turned(self, x: Tensor) -> Tensor:
        if self.frequencies is None:
            return x
        angles = torch.outer(torch.arange(x.shape[1]).float(), self.frequencies).repeat(1, 2)  # [T, D]
        first, second = x.chunk(2, dim=-1)
        return x * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, (H,), self._get(f"{name}.weight"), self._get(f"{name}.bias"), self.eps)

    def _get(self, name: str) -> Tensor:
        return self.weights[self.prefix + name]


@dataclass(frozen=True, slots=True)
class Published:
    """An encoder and what its model makes of the hidden states: `layers` are the names of its head's, tanh between."""

    encoder: Encoder
    mode: str = "cls"
    layers: tuple[str, ...] = ()

    @torch.no_grad()
    def __call__(
        self, task: Task, ids: list[int], types: list[int] | None = None, adapter: str | None = None
    ) -> Tensor:
        hidden = self.encoder.hidden(ids, types)
        if task == "token_embed":
            return F.normalize(hidden, dim=-1)
        if task == "embed":
            return F.normalize(hidden[0] if self.mode == "cls" else hidden.mean(0), dim=-1)
        x = hidden if task == "token_classify" else hidden[0]
        for i, name in enumerate(self.layers):
            weights = self.encoder.weights
            x = F.linear(x.tanh() if i else x, weights[f"{name}.weight"], weights[f"{name}.bias"])
        return x.softmax(-1) if x.shape[-1] > 1 else x.sigmoid()


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────


def _xlmr_tokenizer(folder: Path, longest: int) -> int:
    tokenizer = tiny.unigram()
    tiny.save_tokenizer(
        tokenizer, folder, pad="<pad>", tokenizer_class="PreTrainedTokenizerFast", model_max_length=longest,
        bos_token="<s>", eos_token="</s>", cls_token="<s>", sep_token="</s>", unk_token="<unk>",
    )  # fmt: skip
    return int(tokenizer.get_vocab_size())


def _bert_tokenizer(folder: Path, longest: int) -> int:
    tokenizer = tiny.wordpiece()
    tiny.save_tokenizer(
        tokenizer, folder, pad="[PAD]", tokenizer_class="BertTokenizer", model_max_length=longest,
        unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]",
    )  # fmt: skip
    return int(tokenizer.get_vocab_size())


def _save(folder: Path, config: Mapping[str, Any], weights: Weights, *, pickled: bool = False) -> None:
    tiny.write_json(folder / "config.json", dict(config))
    if pickled:
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def new_config(kind: str, code: str, **changes: Any) -> dict[str, Any]:
    """config.json of a NewModel; `code` is where its auto_map says that the code lies."""
    return {
        "architectures": ["NewModel"],
        "attention_probs_dropout_prob": 0.0,
        "auto_map": {
            "AutoConfig": f"{code}configuration.NewConfig",
            "AutoModel": f"{code}modeling.NewModel",
            "AutoModelForMaskedLM": f"{code}modeling.NewForMaskedLM",
            "AutoModelForSequenceClassification": f"{code}modeling.NewForSequenceClassification",
            "AutoModelForTokenClassification": f"{code}modeling.NewForTokenClassification",
        },
        "classifier_dropout": 0.0,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": H,
        "initializer_range": 0.02,
        "intermediate_size": INNER,
        "layer_norm_eps": 1e-12,
        "layer_norm_type": "layer_norm",
        "logn_attention_clip1": False,
        "logn_attention_scale": False,
        "max_position_embeddings": 8192,
        "model_type": kind,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "pack_qkv": True,
        "pad_token_id": 1,
        "position_embedding_type": "rope",
        "rope_scaling": {"factor": 8.0, "type": "ntk"},
        "rope_theta": 20000,
        "torch_dtype": "float16",
        "type_vocab_size": 1,
        "unpad_inputs": False,
        "use_memory_efficient_attention": False,
        **changes,
    }


def _new(
    name: str,
    *,
    prefix: str = "new.",
    english: bool = False,
    kind: str = "new",
    mode: str = "cls",
    **changes: Any,
) -> Member:
    """An embedding model."""
    code = "Alibaba-NLP/new-impl--" if kind == "new" else ""

    def make(folder: Path) -> Reference:
        vocab = (_bert_tokenizer if english else _xlmr_tokenizer)(folder, 8192)
        config = new_config(kind, code, vocab_size=vocab, **changes)
        weights = random_weights(NEW, vocab, prefix=prefix, types=config["type_vocab_size"])
        unread = linear_head(1, "classifier")  # its lexical weights, which only its own code reads
        _save(folder, config, {**weights, **unread})
        tiny.sentence_transformers_files(folder, [mode], max_seq_length=8192)
        scaling = config["rope_scaling"]
        frequencies = rotary_frequencies(config["rope_theta"], scaling["factor"])
        return Published(Encoder(NEW, weights, prefix, frequencies, eps=1e-12), mode)

    return Member(name, "GteModel" if kind == "gte" else "NewModel", make, ("embed", "token_embed"))


def _gte_multilingual_reranker(folder: Path) -> Reference:
    vocab = _xlmr_tokenizer(folder, 8192)
    config = new_config(
        "new", "Alibaba-NLP/new-impl--", vocab_size=vocab, architectures=["NewForSequenceClassification"],
        id2label={"0": "LABEL_0"}, label2id={"LABEL_0": 0},
    )  # fmt: skip
    names = ("new.pooler.dense", "classifier")
    weights = {**random_weights(NEW, vocab, prefix="new."), **linear_head(1, *names)}
    _save(folder, config, weights)
    return Published(Encoder(NEW, weights, "new.", rotary_frequencies(20000, 8.0), eps=1e-12), layers=names)


def _english_cross_encoder(folder: Path) -> Reference:
    """Queries, keys and values apart, two token types, no scaling, three labels."""
    vocab = _bert_tokenizer(folder, 8192)
    config = new_config(
        "new", "Alibaba-NLP/new-impl--", vocab_size=vocab, architectures=["NewForSequenceClassification"],
        pack_qkv=False, type_vocab_size=2, rope_scaling=None, rope_theta=160000,
        id2label={"0": "no", "1": "maybe", "2": "yes"}, label2id={"no": 0, "maybe": 1, "yes": 2},
    )  # fmt: skip
    names = ("new.pooler.dense", "classifier")
    weights = {**random_weights(NEW_UNPACKED, vocab, prefix="new.", types=2), **linear_head(3, *names)}
    _save(folder, config, weights)
    encoder = Encoder(NEW_UNPACKED, weights, "new.", rotary_frequencies(160000), eps=1e-12)
    return Published(encoder, layers=names)


def _new_tagger(folder: Path) -> Reference:
    vocab = _xlmr_tokenizer(folder, 8192)
    config = new_config(
        "new", "Alibaba-NLP/new-impl--", vocab_size=vocab, architectures=["NewForTokenClassification"],
        id2label={"0": "O", "1": "B", "2": "I"}, label2id={"O": 0, "B": 1, "I": 2},
    )  # fmt: skip
    weights = {**random_weights(NEW, vocab, prefix="new."), **linear_head(3, "classifier")}
    _save(folder, config, weights)
    return Published(
        Encoder(NEW, weights, "new.", rotary_frequencies(20000, 8.0), eps=1e-12), layers=("classifier",)
    )


def nomic_config(**changes: Any) -> dict[str, Any]:
    """config.json of a nomic BERT: GPT-2's keys and many of its own."""
    return {
        "activation_function": "swiglu",
        "architectures": ["NomicBertModel"],
        "attn_pdrop": 0.0,
        "auto_map": {
            "AutoConfig": "nomic-ai/nomic-bert-2048--configuration_hf_nomic_bert.NomicBertConfig",
            "AutoModel": "nomic-ai/nomic-bert-2048--modeling_hf_nomic_bert.NomicBertModel",
            "AutoModelForMaskedLM": "nomic-ai/nomic-bert-2048--modeling_hf_nomic_bert.NomicBertForPreTraining",
        },
        "bos_token_id": None,
        "causal": False,
        "dense_seq_output": True,
        "embd_pdrop": 0.0,
        "eos_token_id": None,
        "fused_bias_fc": True,
        "fused_dropout_add_ln": True,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-12,
        "max_trained_positions": 2048,
        "mlp_fc1_bias": False,
        "mlp_fc2_bias": False,
        "model_type": "nomic_bert",
        "n_embd": H,
        "n_head": HEADS,
        "n_inner": INNER,
        "n_layer": LAYERS,
        "n_positions": 8192,
        "pad_vocab_size_multiple": 64,
        "parallel_block": False,
        "parallel_block_tied_norm": False,
        "prenorm": False,
        "qkv_proj_bias": False,
        "reorder_and_upcast_attn": False,
        "resid_pdrop": 0.0,
        "rotary_emb_base": 1000,
        "rotary_emb_fraction": 1.0,
        "rotary_emb_interleaved": False,
        "rotary_emb_scale_base": None,
        "rotary_scaling_factor": None,
        "scale_attn_weights": True,
        "summary_type": "cls_index",
        "torch_dtype": "float32",
        "type_vocab_size": 2,
        "use_cache": True,
        "use_flash_attn": True,
        "use_rms_norm": False,
        **changes,
    }


def _nomic(name: str, mode: str, *, prefix: str = "", pickled: bool = False, **changes: Any) -> Member:
    def make(folder: Path) -> Reference:
        words = _bert_tokenizer(folder, 8192)
        rows = -(-words // 64) * 64  # the table is padded, and config.json may say either
        config = nomic_config(vocab_size=words if pickled else rows, **changes)
        weights = random_weights(NOMIC, rows, prefix=prefix, types=2)
        _save(folder, config, weights, pickled=pickled)
        tiny.sentence_transformers_files(folder, [mode], max_seq_length=8192)
        frequencies = rotary_frequencies(config["rotary_emb_base"])
        return Published(Encoder(NOMIC, weights, prefix, frequencies, eps=1e-12), mode)

    return Member(name, "NomicBertModel", make, ("embed", "token_embed"))


def flash_config(**changes: Any) -> dict[str, Any]:
    """config.json of Jina's XLM-RoBERTa."""
    code = "jinaai/xlm-roberta-flash-implementation--"
    return {
        "architectures": ["XLMRobertaModel"],
        "attention_probs_dropout_prob": 0.1,
        "auto_map": {
            "AutoConfig": f"{code}configuration_xlm_roberta.XLMRobertaFlashConfig",
            "AutoModel": f"{code}modeling_xlm_roberta.XLMRobertaModel",
            "AutoModelForMaskedLM": f"{code}modeling_xlm_roberta.XLMRobertaForMaskedLM",
        },
        "bos_token_id": 0,
        "classifier_dropout": None,
        "emb_pooler": "mean",
        "eos_token_id": 2,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": H,
        "initializer_range": 0.02,
        "intermediate_size": INNER,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 8194,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "output_past": True,
        "pad_token_id": 1,
        "position_embedding_type": "rotary",
        "rotary_emb_base": 20000.0,
        "torch_dtype": "bfloat16",
        "truncate_dim": None,
        "type_vocab_size": 1,
        "use_cache": True,
        "use_flash_attn": True,
        "use_reentrant": False,
        **changes,
    }


def parametrized(weights: Weights) -> Weights:
    """As saved with its adapters: a table or linear layer is an original and two stacks, one matrix for each task."""
    generator = torch.Generator().manual_seed(9)
    stored: Weights = {}
    for name, weight in weights.items():
        if not name.endswith(".weight") or weight.ndim < 2:
            stored[name] = weight
            continue
        n, m = weight.shape
        at = name.removesuffix("weight") + "parametrizations.weight."
        a, b = ((n, RANK), (RANK, m)) if "embeddings" in name else ((RANK, m), (n, RANK))
        stored[f"{at}original"] = weight
        stored[f"{at}0.lora_A"] = 0.3 * torch.randn(len(TASKS), *a, generator=generator)
        stored[f"{at}0.lora_B"] = 0.3 * torch.randn(len(TASKS), *b, generator=generator)
    return stored


def jina_v3(folder: Path) -> Published:
    """jina-embeddings-v3: rotary positions; the model as it stands, without one of its five tasks."""
    vocab = _xlmr_tokenizer(folder, 8194)
    config = flash_config(
        vocab_size=vocab, model_type="xlm-roberta", load_trained_adapters=True, lora_adaptations=list(TASKS),
        lora_alpha=1, lora_dropout_p=0.0, lora_main_params_trainable=False, lora_rank=RANK,
        matryoshka_dimensions=[8, 16, 24, 32],
        task_instructions={task: f"{task}: " for task in TASKS},
    )  # fmt: skip
    config["auto_map"]["AutoModel"] = "jinaai/xlm-roberta-flash-implementation--modeling_lora.XLMRobertaLoRA"
    weights = random_weights(FLASH, vocab, prefix="roberta.")
    _save(folder, config, parametrized({**weights, **linear_head(H, "roberta.pooler.dense")}))
    tiny.sentence_transformers_files(folder, ["mean"], max_seq_length=8194)
    modules = folder / "modules.json"
    modules.write_text(
        modules.read_text().replace("sentence_transformers.models.Transformer", "custom_st.Transformer")
    )
    return Published(Encoder(FLASH, weights, "roberta.", rotary_frequencies(20000.0)), "mean")


def _jina_reranker_v2(folder: Path) -> Reference:
    """No model_type, and learned positions, of which the table has two rows more than a text may have tokens."""
    vocab = _xlmr_tokenizer(folder, 1024)
    code = "modeling_xlm_roberta.XLMRoberta"
    config = flash_config(
        vocab_size=vocab, architectures=["XLMRobertaForSequenceClassification"], max_position_embeddings=1026,
        position_embedding_type="absolute", id2label={"0": "LABEL_0"}, label2id={"LABEL_0": 0},
        auto_map={
            "AutoConfig": "configuration_xlm_roberta.XLMRobertaFlashConfig",
            "AutoModel": f"{code}Model",
            "AutoModelForSequenceClassification": f"{code}ForSequenceClassification",
        },
    )  # fmt: skip
    del config["rotary_emb_base"]
    names = ("classifier.dense", "classifier.out_proj")
    weights = {**random_weights(FLASH, vocab, prefix="roberta.", rows=1026), **linear_head(1, *names)}
    _save(folder, config, weights)
    return Published(Encoder(FLASH, weights, "roberta."), layers=names)


_V15: dict[str, Any] = {  # as its config.json has been since transformers has the class: both sets of keys
    "max_position_embeddings": 2048,
    "rope_parameters": {"rope_theta": 1000.0, "rope_type": "default"},
}

MEMBERS: tuple[Member, ...] = (
    _new("Alibaba-NLP/gte-multilingual-base", architectures=["NewModel", "NewForTokenClassification"]),
    _new("Alibaba-NLP/gte-base-en-v1.5", english=True, type_vocab_size=0, pad_token_id=0, rope_theta=500000,
         rope_scaling={"factor": 2.0, "type": "ntk"}),
    _new("Alibaba-NLP/gte-large-en-v1.5", english=True, type_vocab_size=2, pad_token_id=0, rope_theta=160000,
         rope_scaling={"factor": 2.0, "type": "ntk"}),
    _new("Snowflake/snowflake-arctic-embed-m-v2.0", prefix="", kind="gte", architectures=["GteModel"],
         matryoshka_dimensions=[16]),
    Member("Alibaba-NLP/gte-multilingual-reranker-base", "NewForSequenceClassification", _gte_multilingual_reranker,
           ("classify",)),
    Member("a cross-encoder made of gte-en-v1.5", "NewForSequenceClassification", _english_cross_encoder, ("classify",),
           pairs=True),
    Member("a tagger made of gte-multilingual-base", "NewForTokenClassification", _new_tagger, ("token_classify",)),
    _nomic("nomic-ai/nomic-embed-text-v1", "mean"),
    _nomic("nomic-ai/nomic-embed-text-v1.5", "mean", **_V15),
    _nomic("nomic-ai/CodeRankEmbed", "cls"),
    _nomic("Snowflake/snowflake-arctic-embed-m-long", "cls", rotary_scaling_factor=2.0),
    _nomic("nomic-ai/nomic-bert-2048", "mean", prefix="bert.", pickled=True, architectures=["NomicBertForPreTraining"],
           n_positions=2048),
    Member("jinaai/jina-embeddings-v3", "XLMRobertaModel", jina_v3, ("embed", "token_embed"),
           note="as it stands, without one of its tasks"),
    Member("jinaai/jina-reranker-v2-base-multilingual", "XLMRobertaForSequenceClassification", _jina_reranker_v2,
           ("classify",)),
)  # fmt: skip
