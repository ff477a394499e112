"""Members whose layers are patched, and those that can only be padded: stock transformers, eager, is the reference."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor

import tiny
from carpool.engine.params import Task
from oracle import Oracle
from zoo.member import Member, Reference

Mode = Literal["cls", "mean", "lasttoken", "weightedmean"]


@dataclass(frozen=True)
class Stock:
    """A class of transformers over a folder, eager, one prompt at a time, in the state it was loaded in.

    `normalize`: to vectors of unit length, and logits to probabilities.
    """

    model: Any
    mode: Mode = "mean"
    normalize: bool = True
    dense: Tensor | None = None  # [out, in] behind the pooling

    @torch.no_grad()
    def __call__(
        self, task: Task, ids: list[int], types: list[int] | None = None, adapter: str | None = None
    ) -> Tensor:
        row = torch.tensor([ids])
        inputs = {"input_ids": row, "attention_mask": torch.ones_like(row)}
        if types is not None:
            inputs["token_type_ids"] = torch.tensor([types])
        output = copy.deepcopy(self.model)(**inputs)  # some remember the longest text they saw
        if task == "classify":
            logits: Tensor = output.logits[0].float()
            if not self.normalize:
                return logits
            return logits.sigmoid() if len(logits) == 1 else logits.softmax(0)
        rows: Tensor = output.last_hidden_state[0].float()
        if task == "embed":
            rows = Oracle._pool(rows, self.mode)
        if self.dense is not None:
            rows = rows @ self.dense.T
        return F.normalize(rows, dim=-1) if self.normalize else rows


@dataclass(frozen=True, kw_only=True)
class Published:
    """How a member's folder is written.

    `of` is the class it is saved from, and `read` the one that answers, where those differ; `config` the sizes and
    `shown` what config.json says otherwise than transformers writes it today (`...`: nothing).
    """

    of: str
    config: Mapping[str, Any]
    read: str = "AutoModel"
    shown: Mapping[str, Any] = field(default_factory=dict)
    words: Callable[[], Tokenizer] = tiny.wordpiece
    pad: str = "[PAD]"
    modes: Seq[Mode] = ("mean",)  # of sentence-transformers' files; none of them if empty
    default: Mode = "cls"  # what the class means, without files
    normalize: bool = True
    dense: bool = False
    pickled: bool = False
    calm: float = 1.0  # what matrices are multiplied by, for models that normalise nothing

    def __call__(self, folder: Path) -> Reference:
        tokenizer = self.words()
        model_class = getattr(transformers, self.of)
        made = model_class.config_class(
            **{"vocab_size": tokenizer.get_vocab_size(), **copy.deepcopy(self.config)}
        )
        torch.manual_seed(0)
        model = model_class(made)
        tiny.inflate(model)
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(self.calm if weight.ndim >= 2 else 1.0)
        model.save_pretrained(folder)
        tiny.edit_json(folder / "config.json", **self.shown)
        if self.pickled:
            torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
            (folder / "model.safetensors").unlink()
        tiny.save_tokenizer(
            tokenizer, folder, pad=self.pad, tokenizer_class="PreTrainedTokenizerFast", model_max_length=128
        )
        if self.modes:
            tiny.sentence_transformers_files(folder, self.modes, normalize=self.normalize)
        stock = getattr(transformers, self.read).from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        )
        mode = self.modes[0] if self.modes else self.default
        return Stock(stock.eval(), mode, self.normalize, self._dense(folder) if self.dense else None)

    def _dense(self, folder: Path) -> Tensor:
        """2_Dense as it was before safetensors: no bias, no activation, a pickle."""
        weight: Tensor = (
            torch.randn(24, tiny.HIDDEN, generator=torch.Generator().manual_seed(5)) * tiny.HIDDEN**-0.5
        )
        modules = [
            ("", "Transformer"),
            ("1_Pooling", "Pooling"),
            ("2_Dense", "Dense"),
            ("3_Normalize", "Normalize"),
        ]
        tiny.write_json(
            folder / "modules.json",
            [
                {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
                for i, (path, kind) in enumerate(modules)
            ],
        )
        tiny.write_json(
            folder / "2_Dense" / "config.json",
            {
                "in_features": tiny.HIDDEN,
                "out_features": 24,
                "bias": False,
                "activation_function": "torch.nn.modules.linear.Identity",
            },
        )
        torch.save({"linear.weight": weight}, folder / "2_Dense" / "pytorch_model.bin")
        return weight


def t5_words() -> Tokenizer:
    """<pad> 0, </s> 1, <unk> 2; text </s>."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    pieces += [(c, -6.0) for c in tiny.LETTERS] + [("▁" + word, -4.0) for word in tiny.WORDS]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


def end_of_text() -> Tokenizer:
    return tiny.byte_bpe(after=["<|endoftext|>"])


_SIZES: dict[str, Any] = {
    "hidden_size": tiny.HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
_MPNET: dict[str, Any] = {**_SIZES, "max_position_embeddings": 258, "pad_token_id": 1, "bos_token_id": 0}
_DEBERTA: dict[str, Any] = {
    **_SIZES,
    "pad_token_id": 0,
    "type_vocab_size": 0,
    "relative_attention": True,
    "position_biased_input": False,
    "max_relative_positions": -1,
}
_V3: dict[str, Any] = {
    **_DEBERTA,
    "pos_att_type": ["p2c", "c2p"],
    "position_buckets": 16,  # of 256 tokens, so that far distances share buckets
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pooler_hidden_size": tiny.HIDDEN,
}
_T5: dict[str, Any] = {
    "d_model": tiny.HIDDEN,
    "d_kv": 16,
    "d_ff": 48,
    "num_layers": 3,
    "num_heads": 4,
    "num_decoder_layers": 2,
    "decoder_start_token_id": 0,
}
_CAUSAL: dict[str, Any] = {
    **_SIZES,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_DYNAMIC: dict[str, Any] = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 8.0}
_LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.5, 3.0, 6.0, 12.0],
}
_UNIGRAM: dict[str, Any] = {"words": tiny.unigram, "pad": "<pad>"}
_SENTENCE_T5: dict[str, Any] = {"words": t5_words, "pad": "<pad>"}
_BYTES: dict[str, Any] = {"words": end_of_text, "pad": "<|endoftext|>", "modes": ("lasttoken",)}
_EMBED: tuple[Task, ...] = ("embed", "token_embed")


def _member(name: str, family: str, published: Published, *, note: str = "", pairs: bool = False) -> Member:
    tasks: tuple[Task, ...] = ("classify",) if "Classification" in published.of else _EMBED
    return Member(name, family, published, tasks, note=note, pairs=pairs)


def _classifier(of: str, config: Mapping[str, Any], labels: int | Seq[str], **how: Any) -> Published:
    named = {"num_labels": labels} if isinstance(labels, int) else {"id2label": dict(enumerate(labels))}
    return Published(of=of, read=of, config={**config, **named}, modes=(), **how)


_NLI = ("contradiction", "entailment", "neutral")

PATCHED: tuple[Member, ...] = (
    _member(
        "sentence-transformers/all-mpnet-base-v2",
        "MPNetForMaskedLM",
        Published(of="MPNetModel", config=_MPNET, shown={"architectures": ["MPNetForMaskedLM"]}, **_UNIGRAM),
    ),
    _member(
        "sentence-transformers/multi-qa-mpnet-base-dot-v1",
        "MPNetModel",
        Published(of="MPNetModel", config=_MPNET, modes=("cls",), normalize=False, pickled=True, **_UNIGRAM),
    ),
    _member(
        "MPNet, a classifier",
        "MPNetForSequenceClassification",
        _classifier("MPNetForSequenceClassification", _MPNET, 3, **_UNIGRAM),
    ),
    _member(
        "microsoft/deberta-v3-base",
        "DebertaV2Model",
        Published(
            of="DebertaV2ForMaskedLM",
            config=_V3,
            shown={"architectures": ..., "pos_att_type": "p2c|c2p"},
            modes=(),
            pickled=True,
            **_UNIGRAM,
        ),
        note="config.json names no class; weights in a pickle",
    ),
    _member(
        "mixedbread-ai/mxbai-rerank-base-v1",
        "DebertaV2ForSequenceClassification",
        _classifier(
            "DebertaV2ForSequenceClassification", {**_V3, "pooler_hidden_act": "gelu"}, 1, **_UNIGRAM
        ),
    ),
    _member(
        "cross-encoder/nli-deberta-v3-base",
        "DebertaV2ForSequenceClassification",
        _classifier("DebertaV2ForSequenceClassification", _V3, _NLI, **_UNIGRAM),
    ),
    _member(
        "microsoft/deberta-v2-xlarge",
        "DebertaV2Model",
        Published(
            of="DebertaV2Model",
            config={**_V3, "conv_kernel_size": 3, "conv_act": "gelu", "attention_head_size": 8},
            **_UNIGRAM,
        ),
        note="a convolution after the first layer",
    ),
    _member(
        "DeBERTa v2 with projections of its own for positions, no buckets",
        "DebertaV2Model",
        Published(
            of="DebertaV2Model",
            config={**_DEBERTA, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": 24},
            **_UNIGRAM,
        ),
    ),
    _member(
        "microsoft/deberta-base-mnli",
        "DebertaForSequenceClassification",
        _classifier(
            "DebertaForSequenceClassification",
            {**_DEBERTA, "pos_att_type": ["c2p", "p2c"]},
            _NLI,
            shown={"pos_att_type": "c2p|p2c"},
            words=lambda: tiny.byte_bpe(before=["[CLS]"], after=["[SEP]"], pad="[PAD]"),
        ),
    ),
    _member(
        "google/rembert",
        "RemBertModel",
        Published(
            of="RemBertModel",
            config={**_SIZES, "input_embedding_size": 24, "output_embedding_size": 40, "pad_token_id": 0},
            **_UNIGRAM,
        ),
    ),
    _member(
        "junnyu/roformer_chinese_base",
        "RoFormerForMaskedLM",
        Published(
            of="RoFormerForMaskedLM",
            config={**_SIZES, "embedding_size": tiny.HIDDEN, "pad_token_id": 0, "rotary_value": False},
            pickled=True,
        ),
    ),
    _member(
        "RoFormer, a classifier of pairs",
        "RoFormerForSequenceClassification",
        _classifier(
            "RoFormerForSequenceClassification",
            {**_SIZES, "embedding_size": 24, "pad_token_id": 0, "rotary_value": True},
            2,
        ),
        pairs=True,
    ),
    _member(
        "google/mobilebert-uncased",
        "MobileBertForPreTraining",
        Published(
            of="MobileBertForPreTraining",
            config={
                **_SIZES,
                "embedding_size": 16,
                "intra_bottleneck_size": 16,
                "true_hidden_size": 16,
                "pad_token_id": 0,
            },
            modes=(),
            calm=0.5,
        ),
    ),
    _member(
        "typeform/mobilebert-uncased-mnli",
        "MobileBertForSequenceClassification",
        _classifier(
            "MobileBertForSequenceClassification",
            {
                **_SIZES,
                "embedding_size": 16,
                "intra_bottleneck_size": 16,
                "true_hidden_size": 16,
                "pad_token_id": 0,
            },
            _NLI,
            calm=0.5,
        ),
        pairs=True,
    ),
    _member(
        "sentence-transformers/sentence-t5-base",
        "T5EncoderModel",
        Published(
            of="T5EncoderModel",
            read="T5EncoderModel",
            config=_T5,
            dense=True,
            shown={"is_encoder_decoder": True},
            **_SENTENCE_T5,
        ),
        note="Dense of no bias in a pickle",
    ),
    _member(
        "google/flan-t5-base",
        "T5ForConditionalGeneration",
        Published(
            of="T5ForConditionalGeneration",
            read="T5EncoderModel",
            config={**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
            **_SENTENCE_T5,
        ),
        note="its encoder",
    ),
    _member(
        "google/mt5-base",
        "MT5EncoderModel",
        Published(of="MT5EncoderModel", read="MT5EncoderModel", config=_T5, **_SENTENCE_T5),
    ),
    _member(
        "google/umt5-base",
        "UMT5EncoderModel",
        Published(of="UMT5EncoderModel", read="UMT5EncoderModel", config=_T5, **_SENTENCE_T5),
        note="a bias a layer",
    ),
    _member(
        "LiquidAI/LFM2-350M",
        "Lfm2ForCausalLM",
        Published(
            of="Lfm2ForCausalLM",
            config={
                **_CAUSAL,
                "num_hidden_layers": 4,
                "layer_types": ["conv", "conv", "full_attention", "conv"],
            },
            **_BYTES,
        ),
        note="short convolutions between attention layers",
    ),
    _member(
        "openai/gpt-oss-20b",
        "GptOssForCausalLM",
        Published(
            of="GptOssForCausalLM",
            config={
                **_CAUSAL,
                "head_dim": 8,
                "num_local_experts": 4,
                "num_experts_per_tok": 2,
                "sliding_window": 8,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
                "rope_parameters": {"rope_type": "default", "rope_theta": 150000.0},
            },
            **_BYTES,
        ),
        note="as after dequantisation",
    ),
    _member(
        "Llama of dynamic rotary positions",
        "LlamaForCausalLM",
        Published(
            of="LlamaForCausalLM",
            config={**_CAUSAL, "max_position_embeddings": 24, "rope_parameters": _DYNAMIC},
            **_BYTES,
        ),
        note="prompts beyond 24 tokens ride with those of their length",
    ),
    _member(
        "microsoft/Phi-3-mini-128k-instruct",
        "Phi3ForCausalLM",
        Published(
            of="Phi3ForCausalLM",
            config={**_CAUSAL, "rope_parameters": _LONGROPE, "original_max_position_embeddings": 24},
            shown={
                "rope_parameters": ...,
                "rope_theta": _LONGROPE["rope_theta"],
                "rope_scaling": {key: _LONGROPE[key] for key in ("short_factor", "long_factor")}
                | {"type": "longrope"},
            },
            **_BYTES,
        ),
        note="up to the 24 tokens of its short factors",
    ),
)

PADDED: tuple[Member, ...] = (
    _member(
        "Muennighoff/SGPT-125M-weightedmean-msmarco-specb-bitfit",
        "GPTNeoModel",
        Published(
            of="GPTNeoModel",
            config={
                "hidden_size": tiny.HIDDEN,
                "num_layers": 2,
                "num_heads": 4,
                "attention_types": [[["global", "local"], 1]],
                "window_size": 8,
                "intermediate_size": 48,
                "max_position_embeddings": 256,
                "bos_token_id": 0,
                "eos_token_id": 0,
            },
            **{**_BYTES, "modes": ("weightedmean",)},
            normalize=False,
        ),
        note="attention of its own",
    ),
    _member(
        "facebook/bart-large-mnli",
        "BartForSequenceClassification",
        _classifier(
            "BartForSequenceClassification",
            {
                "d_model": tiny.HIDDEN,
                "encoder_layers": 2,
                "decoder_layers": 2,
                "encoder_attention_heads": 4,
                "decoder_attention_heads": 4,
                "encoder_ffn_dim": 48,
                "decoder_ffn_dim": 48,
                "pad_token_id": 1,
                "bos_token_id": 0,
                "eos_token_id": 2,
                "decoder_start_token_id": 2,
                "max_position_embeddings": 256,
            },
            _NLI,
            **_UNIGRAM,
        ),
        note="encoder and decoder, each prompt through both",
    ),
    _member(
        "bigscience-data/sgpt-bloom-1b7-nli",
        "BloomModel",
        Published(
            of="BloomModel",
            config={
                "hidden_size": tiny.HIDDEN,
                "n_layer": 2,
                "n_head": 4,
                "pad_token_id": 0,
                "eos_token_id": 0,
                "bos_token_id": None,
            },
            **{**_BYTES, "modes": ("weightedmean",)},
            normalize=False,
        ),
        note="attention of its own, linear biases",
    ),
    _member(
        "meta-llama/Llama-4-Scout-17B-16E, its language model",
        "Llama4ForCausalLM",
        Published(
            of="Llama4ForCausalLM",
            config={
                **_CAUSAL,
                "head_dim": 8,
                "intermediate_size_mlp": 48,
                "num_local_experts": 2,
                "attention_chunk_size": 16,
                "no_rope_layers": [1, 0, 1],
            },
            **_BYTES,
        ),
        note="attention in chunks",
    ),
    _member(
        "Qwen/Qwen3.5-0.8B, its language model",
        "Qwen3_5ForCausalLM",
        Published(
            of="Qwen3_5ForCausalLM",
            config={
                **_CAUSAL,
                "num_hidden_layers": 4,
                "head_dim": 16,
                "linear_num_key_heads": 2,
                "linear_num_value_heads": 4,
                "linear_key_head_dim": 16,
                "linear_value_head_dim": 16,
                "layer_types": ["linear_attention", "full_attention"] * 2,
            },
            **_BYTES,
        ),
        note="linear attention",
    ),
    _member(
        "ai21labs/Jamba-v0.1",
        "JambaForCausalLM",
        Published(
            of="JambaForCausalLM",
            config={
                **_CAUSAL,
                "num_hidden_layers": 4,
                "attn_layer_period": 2,
                "attn_layer_offset": 1,
                "expert_layer_period": 2,
                "expert_layer_offset": 1,
                "num_experts": 2,
                "mamba_d_state": 8,
                "mamba_dt_rank": 4,
            },
            **_BYTES,
        ),
        note="state-space layers",
    ),
    _member(
        "ai21labs/Jamba-tiny-reward-dev",
        "JambaForSequenceClassification",
        _classifier(
            "JambaForSequenceClassification",
            {
                **_CAUSAL,
                "attn_layer_period": 3,
                "attn_layer_offset": 1,
                "expert_layer_period": 2,
                "num_experts": 2,
                "mamba_d_state": 8,
                "mamba_dt_rank": 4,
                "eos_token_id": 2,
            },
            1,
            words=lambda: tiny.byte_bpe(before=["<|startoftext|>"], pad="<|pad|>"),
            pad="<|pad|>",
            normalize=False,
        ),
        note="state-space layers",
    ),
    _member(
        "state-spaces/mamba-130m-hf",
        "MambaForCausalLM",
        Published(
            of="MambaForCausalLM",
            config={
                "hidden_size": tiny.HIDDEN,
                "num_hidden_layers": 2,
                "state_size": 8,
                "time_step_rank": 4,
                "pad_token_id": 0,
                "eos_token_id": 0,
                "bos_token_id": None,
            },
            default="lasttoken",
            **{**_BYTES, "modes": ()},
        ),
        note="no attention at all",
    ),
)

MEMBERS: tuple[Member, ...] = (*PATCHED, *PADDED)
