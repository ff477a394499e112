"""Build: an EngineConfig becomes the parts of an engine, every "auto" resolved. Runs once, before anything serves."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from carpool.engine.architecture import Architecture, Scorer, activation_of, labels_of
from carpool.engine.chat import ChatTemplate
from carpool.engine.checkpoint import Checkpoint, PoolingMode
from carpool.engine.config import EngineConfig
from carpool.engine.device import resolve_device, resolve_dtype
from carpool.engine.errors import ConfigError, InvalidParameter
from carpool.engine.hub import BUNDLED_NAME, locate
from carpool.engine.memory import bound_primitive_cache
from carpool.engine.model_info import ModelInfo
from carpool.engine.models.backbone import Backbone
from carpool.engine.models.loader import Loaded, Loader
from carpool.engine.models.probe import check_isolation
from carpool.engine.models.surgery import operate
from carpool.engine.params import Task
from carpool.engine.poolers.classify import ClassifyHead, ClassifyPool, TokenClassifyPool, activation_named
from carpool.engine.poolers.dense import activation, load_dense
from carpool.engine.poolers.embed import EmbedHead, EmbedPool, TokenEmbedPool
from carpool.engine.poolers.methods import METHODS
from carpool.engine.poolers.pooler import Pool, Pooler
from carpool.engine.runner import ModelRunner
from carpool.engine.tokenizer import Tokenizer, load_fast
from carpool.kernels.ops import attention_in_use

_QWEN_STEP_TAG = (
    151651  # <extra_0>, which the one published family of process reward models ends its steps with
)
_DEFAULT_BATCH_TOKENS = 2048  # the best micro-batch on the CPUs measured: docs/log.md


@dataclass(frozen=True, slots=True)
class Parts:
    """What an engine is made of. `runners` share one set of weights; each is for one worker."""

    model: ModelInfo
    tokenizer: Tokenizer
    chat: ChatTemplate
    runners: list[ModelRunner]


def build(config: EngineConfig) -> Parts:
    """Load and check the model. Raises ConfigError with one sentence if it cannot be served as asked."""
    bound_primitive_cache()
    folder = locate(config.model, config.revision)
    checkpoint = Checkpoint.read(folder, config.hf_overrides, config.pooler_config)
    pooler = config.pooler_config
    scorer = Scorer.of(checkpoint.config)
    architecture = Architecture.of(
        checkpoint.architectures,
        "classify" if scorer and config.convert == "auto" else config.convert,
        step_words=bool(pooler.steps and pooler.returned_token_ids),
    )
    device = resolve_device(config.device)
    dtype, notice = resolve_dtype(config.dtype, checkpoint.stored_dtype, device)
    max_model_len = _max_model_len(config, checkpoint)
    words = locate(config.tokenizer) if config.tokenizer else folder
    fast = load_fast(words, trust_remote_code=config.trust_remote_code)
    tokenizer = Tokenizer.of(
        fast,
        max_model_len=max_model_len,
        vocab_size=checkpoint.vocab_size,
        lowercase=checkpoint.lowercase,
        token_types=int(checkpoint.text_config.get("type_vocab_size") or 2) > 1,
    )
    token_ids = tokenizer.ids_of(scorer.words) if scorer else pooler.returned_token_ids or ()
    loader = Loader(
        dtype=dtype, device=device, max_model_len=max_model_len, trust_remote_code=config.trust_remote_code
    )
    loaded = loader.load(checkpoint, architecture, scorer, token_ids)
    backbone = loaded.backbone
    swapped = operate(backbone.module) if config.surgery else {}
    check_isolation(
        backbone,
        vocab_size=checkpoint.vocab_size,
        max_model_len=max_model_len,
        window=checkpoint.text_config.get("sliding_window") or checkpoint.text_config.get("local_attention"),
    )
    modes = _modes(checkpoint, loaded)
    num_labels = _num_labels(loaded)
    if architecture.kind == "embed":
        pools = _embed_pools(checkpoint, config, modes, backbone.hidden_size, device)
    else:
        pools = _classify_pools(checkpoint, config, architecture, loaded, modes[0], num_labels)
    runner = ModelRunner(backbone, Pooler(pools), device)
    workers = _workers(config, device)
    template = config.chat_template
    chat = ChatTemplate.of(fast, template)
    return Parts(
        ModelInfo(
            root=config.model or str(folder),
            architectures=checkpoint.architectures,
            tasks=frozenset(pools),
            default_task=_default_task(config, pools),
            max_model_len=max_model_len,
            max_embed_len=_max_embed_len(config, max_model_len),
            vocab_size=checkpoint.vocab_size,
            embedding_size=checkpoint.matryoshka.size,
            matryoshka=checkpoint.matryoshka,
            labels=labels_of(checkpoint.config, num_labels),
            prompts=checkpoint.config.get("task_instructions") or checkpoint.prompts,
            pooling="+".join(modes),
            normalize=checkpoint.normalize,
            pairs="concatenated" if _concatenates(checkpoint, loaded) else "separated",
            chat_template=chat.present,
            score_template=bool(template),
            dtype=str(dtype).removeprefix("torch."),
            device=str(device),
            workers=workers,
            parameters=_parameters(backbone),
            max_num_batched_tokens=_max_num_batched_tokens(config, max_model_len),
            max_num_seqs=config.max_num_seqs,
            attention=attention_in_use() if device.type == "cpu" else "torch",
            surgery=swapped,
            notices=tuple(sentence for sentence in (notice, _native_notice(device)) if sentence),
        ),
        tokenizer,
        chat,
        [runner, *(runner.replica() for _ in range(workers - 1))],
    )


# ── pools ────────────────────────────────────────────────────────────────────────────────────────────────────


def _embed_pools(
    checkpoint: Checkpoint,
    config: EngineConfig,
    modes: tuple[PoolingMode, ...],
    hidden_size: int,
    device: torch.device,
) -> dict[Task, Pool]:
    try:
        checkpoint.matryoshka.check(config.pooler_config.dimensions, config.model or BUNDLED_NAME)
    except InvalidParameter as error:
        raise ConfigError(f"The pooler config's dimensions cannot be served: {error}") from error
    dense = [load_dense(spec, device) for spec in checkpoint.dense]
    head = EmbedHead(dense, checkpoint.normalize, config.pooler_config.dimensions)
    pools: dict[Task, Pool] = {"embed": EmbedPool(modes, head)}
    if not checkpoint.dense or checkpoint.dense[0].in_features == hidden_size:
        pools["token_embed"] = TokenEmbedPool(
            head
        )  # a head made for several modes at once takes no single row
    return pools


def _classify_pools(
    checkpoint: Checkpoint,
    config: EngineConfig,
    architecture: Architecture,
    loaded: Loaded,
    mode: PoolingMode,
    num_labels: int,
) -> dict[Task, Pool]:
    pooler, kind = config.pooler_config, architecture.kind
    named = activation_of(checkpoint.config, num_labels or loaded.backbone.hidden_size)
    head = ClassifyHead(
        loaded.head or nn.Identity(),
        activation(named) if "." in named else activation_named(named),
        by_default=pooler.activates if pooler.activates is not None else kind != "reward",
        logit_mean=pooler.mean,
        logit_sigma=pooler.logit_sigma or 1.0,
    )
    tokens = TokenClassifyPool(head)
    if pooler.steps if pooler.steps is not None else kind == "process_reward":
        default_tag = _QWEN_STEP_TAG if kind == "process_reward" else None
        tag = default_tag if pooler.step_tag_id is None else pooler.step_tag_id
        tokens = TokenClassifyPool(head, tag, None if kind == "judge" else pooler.returned_token_ids)
    if "classify" not in architecture.tasks:
        return {"token_classify": tokens}
    return {"classify": ClassifyPool(METHODS[mode], head, loaded.late), "token_classify": tokens}


def _modes(checkpoint: Checkpoint, loaded: Loaded) -> tuple[PoolingMode, ...]:
    """The user's or the files' pooling, else the class's: the last token if it looks backwards, else the first.

    A classifier that names its own in config.json has it in any case: its head was trained on nothing else.
    """
    if loaded.pooling and "classifier_pooling" in checkpoint.config:
        return (loaded.pooling,)
    return checkpoint.pooling or (loaded.pooling or ("last" if loaded.backbone.is_causal else "cls"),)


def _num_labels(loaded: Loaded) -> int:
    """The width of the head, found by asking it."""
    if loaded.head is None:
        return 0
    hidden = loaded.backbone.hidden_size
    weight = next(loaded.head.parameters())
    with torch.inference_mode():
        return int(loaded.head(torch.zeros(1, hidden, device=weight.device)).shape[-1])


def _default_task(config: EngineConfig, pools: Mapping[Task, Pool]) -> Task:
    asked = config.pooler_config.task
    if asked is None:
        return next(iter(pools))
    if asked not in pools:
        raise ConfigError(f"Unsupported task: {asked!r}; this model supports {', '.join(pools)}.")
    return asked


# ── score prompts ────────────────────────────────────────────────────────────────────────────────────────────


def _concatenates(checkpoint: Checkpoint, loaded: Loaded) -> bool:
    """Whether a scored pair is one text, q + d, and not two texts with the tokenizer's separators."""
    config = checkpoint.config
    flag = config.get("use_sep_token", config.get("use_pad_token"))
    return not flag if flag is not None else loaded.pooling == "last"


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


def _native_notice(device: torch.device) -> str | None:
    """Fallbacks are loud: without its native kernels a CPU server is right, and slower than it need be."""
    if device.type != "cpu" or attention_in_use() != "torch":
        return None
    return "The native CPU kernels were not built (no C++ compiler at install, or another CPU): torch serves, slower."
