"""Build: an EngineConfig becomes the parts of an engine, every "auto" resolved. Runs once, before anything serves."""

from __future__ import annotations

import os
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import torch
from torch import nn

from carpool.engine.architecture import Architecture, labels_of
from carpool.engine.chat import ChatTemplate
from carpool.engine.checkpoint import Checkpoint
from carpool.engine.config import EngineConfig
from carpool.engine.device import resolve_device, resolve_dtype
from carpool.engine.errors import ConfigError
from carpool.engine.fast_tokenizer import end_notice, load_fast
from carpool.engine.hub import locate
from carpool.engine.memory import bound_primitive_cache
from carpool.engine.model_info import ModelInfo, PairShape
from carpool.engine.models.adapters import check_adapters, load_adapters
from carpool.engine.models.backbone import Backbone
from carpool.engine.models.choice import choose
from carpool.engine.models.loader import Loaded, Loader
from carpool.engine.models.probe import keeps_unseen
from carpool.engine.models.quantize import quantize
from carpool.engine.models.surgery import operate
from carpool.engine.models.weights import unmap
from carpool.engine.pairing import Pairing
from carpool.engine.params import Task
from carpool.engine.poolers.adapted import AdaptedPool
from carpool.engine.poolers.bge_m3 import Marks
from carpool.engine.poolers.pooler import Pool, Pooler
from carpool.engine.pools import head_width, make_pools, pooling_modes, pooling_name, similarity_of
from carpool.engine.runner import ModelRunner
from carpool.engine.scoring import Framer
from carpool.engine.tokenizer import Tokenizer
from carpool.kernels.ops import attention_in_use

_UNEXPANDED = (
    "Queries are not expanded, though the model's files ask for it: in this model, tokens that are not to be looked at "
    "would be. Scores differ from PyLate's."
)
_DEFAULT_BATCH_TOKENS = 2048  # the best micro-batch on the CPUs measured: docs/log.md


@dataclass(frozen=True, slots=True)
class Parts:
    """What an engine is made of. `runners` share one set of weights; each is for one worker."""

    model: ModelInfo
    tokenizer: Tokenizer
    chat: ChatTemplate
    framer: Framer | None
    runners: list[ModelRunner]


def build(config: EngineConfig) -> Parts:
    """Load and check the model. Raises ConfigError with one sentence if it cannot be served as asked."""
    bound_primitive_cache()
    folder = locate(config.model, config.revision)
    checkpoint = Checkpoint.read(folder, config.hf_overrides, config.pooler_config)
    pooler = config.pooler_config
    pairing = Pairing.of(config, checkpoint)
    config, scorer = pairing.calibrated(config), pairing.scorer
    architecture = Architecture.of(
        checkpoint.architectures,
        "classify" if scorer and config.convert == "auto" else config.convert,
        step_words=bool(pooler.steps and pooler.returned_token_ids),
        files=checkpoint.files,
    )
    device = resolve_device(config.device)
    if config.quantization and device.type != "cpu":
        raise ConfigError("--quantization int8 is for CPUs: give --device cpu as well, or leave it out.")
    dtype, notice = resolve_dtype(
        config.dtype, checkpoint.stored_dtype, device, str(checkpoint.text_config.get("model_type"))
    )
    max_model_len = _max_model_len(config, checkpoint)
    words = locate(config.tokenizer) if config.tokenizer else folder
    fast = load_fast(words, trust_remote_code=config.trust_remote_code)
    tokenizer = Tokenizer.of(
        fast,
        max_model_len=max_model_len,
        vocab_size=checkpoint.vocab_size,
        lowercase=checkpoint.lowercase,
        pads=bool(checkpoint.config.get("pads_prompts")),
        token_types=int(checkpoint.text_config.get("type_vocab_size") or 2) > 1,
        leaves_out_prompts=checkpoint.leaves_out_prompts,
        late=checkpoint.late if architecture.kind == "multi_vector" else None,
    )
    chat = ChatTemplate.of(fast, config.chat_template)
    framer = pairing.framer(config, chat, tokenizer)
    token_ids: Seq[int] = pooler.returned_token_ids or ()
    if scorer:
        token_ids = scorer.token_ids or tokenizer.ids_of(scorer.words)
    loader = Loader(
        dtype=dtype, device=device, max_model_len=max_model_len, trust_remote_code=config.trust_remote_code
    )
    loaded = loader.load(checkpoint, architecture, scorer, token_ids)
    adapters = load_adapters(checkpoint, config, loaded)
    windows = (checkpoint.text_config.get(key) for key in ("sliding_window", "local_attention"))
    backbone, padded = choose(
        loaded.backbone,
        vocab_size=checkpoint.vocab_size,
        max_model_len=max_model_len,
        limits=[window for window in windows if isinstance(window, int) and window > 0],
    )
    loaded = replace(loaded, backbone=backbone)
    unexpanded = None
    if tokenizer.expands_unseen and not keeps_unseen(backbone, checkpoint.vocab_size):
        tokenizer.scribes = {role: scribe.without_expansion() for role, scribe in tokenizer.scribes.items()}
        unexpanded = _UNEXPANDED
    parameters = _parameters(backbone)
    swapped: dict[str, int] = {}
    coarse: list[str] = []
    if config.surgery:
        swapped = operate(backbone, vocab_size=checkpoint.vocab_size, pack=not config.quantization)
    if config.quantization:
        swapped["int8"], coarse = quantize(backbone, vocab_size=checkpoint.vocab_size)
    if device.type == "cpu" and swapped:
        unmap(backbone.module, loaded.head)
    modes = pooling_modes(checkpoint, loaded)
    width = head_width(loaded)
    num_labels = 0 if architecture.embeds else width
    vector_size = width if architecture.embeds and width else checkpoint.matryoshka.size
    marks = Marks.of(fast)
    if adapters.names:
        check_adapters(
            backbone, len(adapters.names), vocab_size=checkpoint.vocab_size, max_model_len=max_model_len
        )

    def pools_of(head: nn.Module | None) -> dict[Task, Pool]:
        own = replace(loaded, head=head)
        return make_pools(checkpoint, config, architecture, own, modes, width, marks, device)

    pools = pools_of(loaded.head)
    if adapters.heads:
        by_slot = {0: pools, **{slot: pools_of(head) for slot, head in adapters.heads.items()}}
        pools = {task: AdaptedPool({slot: own[task] for slot, own in by_slot.items()}) for task in pools}
    runner = ModelRunner(backbone, Pooler(pools), device)
    workers = _workers(config, device)
    blunt = (  # a language model is scored, and nobody said how its pairs are put together
        architecture.kind == "classify"
        and num_labels == 1
        and loaded.pooling == "last"
        and not {"use_sep_token", "use_pad_token"} & checkpoint.config.keys()
    )
    return Parts(
        ModelInfo(
            root=config.model or str(folder),
            architectures=checkpoint.architectures,
            tasks=frozenset(pools),
            default_task=_default_task(config, pools),
            max_model_len=max_model_len,
            max_embed_len=_max_embed_len(config, max_model_len),
            vocab_size=checkpoint.vocab_size,
            embedding_size=vector_size,
            matryoshka=replace(checkpoint.matryoshka, size=vector_size),
            labels=labels_of(checkpoint.config, num_labels),
            prompts=checkpoint.config.get("task_instructions") or checkpoint.prompts,
            adapters=adapters.names,
            lora_modules=adapters.lora_modules,
            task_adapters=adapters.tasks,
            default_adapter=adapters.default,
            pooling=pooling_name(checkpoint, architecture, modes),
            normalize=checkpoint.normalize and architecture.kind != "sparse",
            leaves_out_prompts=checkpoint.leaves_out_prompts,
            similarity=similarity_of(checkpoint, architecture),
            roles={role: scribe.skipped for role, scribe in tokenizer.scribes.items()},
            pairs=_pairs(checkpoint, loaded),
            chat_template=chat.present,
            score_template=framer is not None,
            dtype=str(dtype).removeprefix("torch."),
            device=str(device),
            workers=workers,
            parameters=parameters,
            max_num_batched_tokens=_max_num_batched_tokens(config, max_model_len),
            max_num_seqs=config.max_num_seqs,
            packing=backbone.packing,
            attention=_attention(backbone, device),
            quantization=config.quantization,
            surgery=swapped,
            notices=tuple(
                sentence
                for sentence in (
                    notice,
                    padded,
                    unexpanded,
                    _native_notice(device),
                    *coarse,
                    _code_notice(checkpoint, backbone, config),
                    end_notice(words, fast),
                    *pairing.notices(framer, config, blunt=blunt),
                )
                if sentence
            ),
        ),
        tokenizer,
        chat,
        framer,
        [runner, *(runner.replica() for _ in range(workers - 1))],
    )


# ── tasks ────────────────────────────────────────────────────────────────────────────────────────────────────


def _default_task(config: EngineConfig, pools: Mapping[Task, Pool]) -> Task:
    asked = config.pooler_config.task
    if asked is None:
        return next(iter(pools))
    if asked not in pools:
        raise ConfigError(f"Unsupported task: {asked!r}; this model supports {', '.join(pools)}.")
    return asked


# ── score prompts ────────────────────────────────────────────────────────────────────────────────────────────


def _pairs(checkpoint: Checkpoint, loaded: Loaded) -> PairShape:
    """Whether a scored pair is one text, q + d, or two texts with the tokenizer's separators."""
    config = checkpoint.config
    flag = config.get("use_sep_token", config.get("use_pad_token"))
    if flag is None:
        flag = loaded.pooling != "last" or checkpoint.pairs is not None  # so sentence-transformers has it
    return "separated" if flag else "concatenated"


# ── limits ───────────────────────────────────────────────────────────────────────────────────────────────────


def _max_model_len(config: EngineConfig, checkpoint: Checkpoint) -> int:
    asked = config.max_model_len
    if asked is not None and asked > checkpoint.longest:
        raise ConfigError(
            f"--max-model-len {asked} is more than the {checkpoint.longest} tokens that this model has positions for."
        )
    return asked or checkpoint.max_model_len


def _max_embed_len(config: EngineConfig, max_model_len: int) -> int | None:
    """Longest text to embed; None where slices are averaged and nobody set a bound."""
    if not config.pooler_config.enable_chunked_processing:
        return max_model_len
    return config.pooler_config.max_embed_len


def _max_num_batched_tokens(config: EngineConfig, max_model_len: int) -> int:
    asked = config.max_num_batched_tokens
    if asked is not None and asked < max_model_len:
        raise ConfigError(
            f"--max-num-batched-tokens {asked} is less than one prompt may have ({max_model_len}): "
            "raise it, or lower --max-model-len."
        )
    return asked or max(_DEFAULT_BATCH_TOKENS, max_model_len)


def _workers(config: EngineConfig, device: torch.device) -> int:
    """One a device; on a CPU one a core this process may use, unless told otherwise."""
    if device.type != "cpu":
        return 1
    return config.cpu_workers or len(os.sched_getaffinity(0))


def _parameters(backbone: Backbone) -> int:
    return sum(weight.numel() for weight in backbone.module.parameters())


def _code_notice(checkpoint: Checkpoint, backbone: Backbone, config: EngineConfig) -> str | None:
    """Every weight has found its place, but what the checkpoint's own code would do with them nobody has read."""
    if checkpoint.own_code is None or config.trust_remote_code:
        return None
    return (
        f"The checkpoint was published with code of its own ({checkpoint.own_code}), which is not run: "
        f"transformers' {type(backbone.module).__name__} computes in its place."
    )


def _attention(backbone: Backbone, device: torch.device) -> str:
    if backbone.packing == "padded":
        return "transformers"
    return attention_in_use() if device.type == "cpu" else "torch"


def _native_notice(device: torch.device) -> str | None:
    """Fallbacks are loud: without its native kernels a CPU server is right, and slower than it need be."""
    if device.type != "cpu" or attention_in_use() != "torch":
        return None
    return "The native CPU kernels were not built (no C++ compiler at install, or another CPU): torch serves, slower."
