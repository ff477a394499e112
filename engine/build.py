"""Build: an EngineConfig becomes the parts of an engine, every "auto" resolved. Runs once, before anything serves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from carpool.engine import budget, cost, parcel
from carpool.engine.architecture import Architecture, labels_of
from carpool.engine.cache.choice import Keep, choose_cache
from carpool.engine.chat import ChatTemplate
from carpool.engine.checkpoint import Checkpoint
from carpool.engine.config import EngineConfig
from carpool.engine.cores import Cores
from carpool.engine.device import limit_memory, resolve_devices, resolve_dtype
from carpool.engine.errors import ConfigError
from carpool.engine.fast_tokenizer import end_notice, load_fast
from carpool.engine.hub import locate
from carpool.engine.listwise import MARKS, Listwise
from carpool.engine.memory import bound_primitive_cache
from carpool.engine.model_info import ModelInfo, PairShape
from carpool.engine.models.backbone import Backbone
from carpool.engine.models.loader import Loaded, Loader
from carpool.engine.models.model import Model
from carpool.engine.models.probe import attention_chosen, keeps_unseen
from carpool.engine.models.surgery.last_layer import narrow
from carpool.engine.pairing import Pairing
from carpool.engine.params import Task
from carpool.engine.poolers.adapted import AdaptedPool
from carpool.engine.poolers.bge_m3 import Marks
from carpool.engine.poolers.pooler import Pool, Pooler, reads
from carpool.engine.pools import head_width, make_pools, pooling_modes, pooling_name, similarity_of
from carpool.engine.runner import ModelRunner
from carpool.engine.scoring import Framer
from carpool.engine.tokenizer import Tokenizer
from carpool.kernels import launch, native
from carpool.kernels.attention import Choice

_UNEXPANDED = (
    "Queries are not expanded, though the model's files ask for it: in this model, tokens that are not to be looked at "
    "would be. Scores differ from PyLate's."
)


@dataclass(frozen=True, slots=True)
class Parts(parcel.Parts):
    """What an engine is made of. `runners` are for one worker each, and share the weights of their device."""

    runners: list[ModelRunner]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """What the files and the user ask for, before anything is loaded. `notice` is on the choice of dtype."""

    config: EngineConfig
    checkpoint: Checkpoint
    pairing: Pairing
    architecture: Architecture
    devices: tuple[torch.device, ...]
    dtype: torch.dtype
    max_model_len: int
    notice: str | None

    @property
    def device(self) -> torch.device:
        """Where the model is loaded; it is copied to the others."""
        return self.devices[0]

    @classmethod
    def of(cls, config: EngineConfig, folder: Path) -> _Plan:
        checkpoint = Checkpoint.read(folder, config.hf_overrides, config.pooler_config)
        pairing = Pairing.of(config, checkpoint)
        pooler = config.pooler_config
        architecture = Architecture.of(
            checkpoint.architectures,
            "classify" if pairing.scorer and config.convert == "auto" else config.convert,
            step_words=bool(pooler.steps and pooler.returned_token_ids),
            files=checkpoint.files,
        )
        devices = resolve_devices(config.device, config.data_parallel_size)
        device = devices[0]
        if config.quantization and device.type != "cpu":
            raise ConfigError("--quantization int8 is for CPUs: give --device cpu as well, or leave it out.")
        if config.cuda_graphs and device.type == "cpu":
            raise ConfigError("--cuda-graphs is for GPUs: give --device cuda as well, or leave it out.")
        dtype, notice = resolve_dtype(
            config.dtype, checkpoint.stored_dtype, device, str(checkpoint.text_config.get("model_type"))
        )
        return cls(
            config=pairing.calibrated(config),
            checkpoint=checkpoint,
            pairing=pairing,
            architecture=architecture,
            devices=devices,
            dtype=dtype,
            max_model_len=_max_model_len(config, checkpoint),
            notice=notice,
        )

    def tokenizer(self, fast: Any) -> Tokenizer:
        return Tokenizer.of(
            fast,
            max_model_len=self.max_model_len,
            vocab_size=self.checkpoint.vocab_size,
            lowercase=self.checkpoint.lowercase,
            pads=bool(self.checkpoint.config.get("pads_prompts")),
            token_types=int(self.checkpoint.text_config.get("type_vocab_size") or 2) > 1,
            leaves_out_prompts=self.checkpoint.leaves_out_prompts,
            late=self.checkpoint.late if self.architecture.kind == "multi_vector" else None,
        )

    def model(self, tokenizer: Tokenizer) -> Model:
        scorer = self.pairing.scorer
        token_ids: Seq[int] = self.config.pooler_config.returned_token_ids or ()
        if scorer:
            token_ids = scorer.token_ids or tokenizer.ids_of(scorer.words)
        loader = Loader(
            dtype=self.dtype,
            device=self.device,
            max_model_len=self.max_model_len,
            trust_remote_code=self.config.trust_remote_code,
        )
        return Model.load(loader, self.checkpoint, self.architecture, self.config, scorer, token_ids)


def build(config: EngineConfig) -> Parts:
    """Load and check the model. Raises ConfigError with one sentence if it cannot be served as asked."""
    bound_primitive_cache()
    folder = locate(config.model, config.revision)
    plan = _Plan.of(config, folder)
    words = locate(config.tokenizer) if config.tokenizer else folder
    fast = load_fast(words, trust_remote_code=config.trust_remote_code)
    tokenizer = plan.tokenizer(fast)
    chat = ChatTemplate.of(fast, config.chat_template)
    framer = _framer(plan, chat, tokenizer)
    if plan.device.type == "cuda" and config.gpu_memory_utilization:
        limit_memory(plan.devices, config.gpu_memory_utilization)
    with budget.room_for_weights(plan.device):
        model = plan.model(tokenizer)
    unexpanded = _give_up_expansion(tokenizer, model.backbone, plan.checkpoint.vocab_size)
    attention = attention_chosen(model.backbone, plan.checkpoint.vocab_size, unseen=tokenizer.expands_unseen)
    width = head_width(model.loaded)
    pools = _pools(plan, model, width, _marks(plan, fast, tokenizer))
    if config.surgery and any(reads(pool) != "all" for pool in pools.values()):
        narrowed = narrow(model.backbone, vocab_size=plan.checkpoint.vocab_size)
        model = replace(model, surgery={**model.surgery, "last_layer": narrowed})
    batch_tokens = _batch_tokens(plan, model, pools)
    kept = _kept(plan, model, pools, batch_tokens)
    notices = (
        plan.notice,
        *model.notices,
        kept.notice,
        unexpanded,
        *_attention_notices(plan.device, (*attention, *kept.attention)),
        *_device_notices(config, plan.device),
        end_notice(words, fast),
        *plan.pairing.notices(framer, plan.config, blunt=_is_blunt(plan, model, width)),
    )
    info = replace(
        _model_info(plan, model, pools, width, attention, kept),
        root=config.model or str(folder),
        roles={role: scribe.skipped for role, scribe in tokenizer.scribes.items()},
        chat_template=chat.present,
        score_template=framer is not None,
        batch_tokens=batch_tokens,
        notices=tuple(sentence for sentence in notices if sentence),
    )
    first = ModelRunner(model.backbone, Pooler(pools), plan.device, kept.storage)
    runners = _runners(plan, first, info.workers)
    if plan.device.type == "cuda":
        info = replace(info, notices=(*info.notices, *_recorded(plan, runners)))
        info = _fitted(info, plan.devices, runners)
    return Parts(info, tokenizer, chat, framer, kept.cache, runners)


def _runners(plan: _Plan, first: ModelRunner, workers: int) -> list[ModelRunner]:
    """One a worker: on a CPU all over one set of weights, on GPUs each over a copy of its own."""
    if plan.device.type == "cpu":
        return [first, *(first.replica() for _ in range(workers - 1))]
    runners = [first]
    for device in plan.devices[1:]:
        with budget.room_for_weights(device):
            runners.append(first.replica(device))
    return runners


def _batch_tokens(plan: _Plan, model: Model, pools: Mapping[Task, Pool]) -> int | None:
    """Up to how many tokens batches are filled, by what they cost on this CPU; None for as many as they may have."""
    if plan.device.type != "cpu" or plan.config.max_num_batched_tokens is not None:
        return None
    runner = ModelRunner(model.backbone, Pooler(pools), plan.device)
    found = cost.measured(
        _runners(plan, runner, _workers(plan.config, plan.devices)),
        max_model_len=plan.max_model_len,
        max_num_seqs=plan.config.max_num_seqs,
        vocab_size=plan.checkpoint.vocab_size,
        task=_default_task(plan.config, pools),
    )
    return cost.MOST_TOKENS if found is None else found.batch_tokens()


def _recorded(plan: _Plan, runners: Seq[ModelRunner]) -> dict[str, None]:
    """Let each GPU record its own graphs, now that all copies are made: recordings cannot be copied. The notices."""
    if not plan.config.cuda_graphs:
        return {}
    notices = [runner.record(plan.checkpoint.vocab_size, plan.max_model_len) for runner in runners]
    return dict.fromkeys(notice for notice in notices if notice)


def _fitted(info: ModelInfo, devices: Seq[torch.device], runners: Seq[ModelRunner]) -> ModelInfo:
    """With batches no larger than the GPUs have memory for, which has been tried."""
    fit = budget.tried(
        list(zip(devices, runners, strict=True)),
        most=info.max_num_batched_tokens,
        max_model_len=info.max_model_len,
        max_num_seqs=info.max_num_seqs,
        vocab_size=info.vocab_size,
        tasks=sorted(info.tasks),
    )
    notices = (*info.notices, fit.notice) if fit.notice else info.notices
    return replace(info, max_num_batched_tokens=fit.tokens, notices=notices)


def _pools(plan: _Plan, model: Model, width: int, marks: Marks) -> dict[Task, Pool]:
    """A pool a task; where adapters bring heads of their own, one that deals out to those."""
    modes = pooling_modes(plan.checkpoint, model.loaded)

    def of(head: nn.Module | None) -> dict[Task, Pool]:
        own = replace(model.loaded, head=head)
        return make_pools(
            plan.checkpoint, plan.config, plan.architecture, own, modes, width, marks, plan.device
        )

    pools = of(model.loaded.head)
    if not model.adapters.heads:
        return pools
    by_slot = {0: pools, **{slot: of(head) for slot, head in model.adapters.heads.items()}}
    return {task: AdaptedPool({slot: own[task] for slot, own in by_slot.items()}) for task in pools}


def _kept(plan: _Plan, model: Model, pools: Mapping[Task, Pool], batch_tokens: int | None) -> Keep:
    """Keys and values, where it is of use."""
    return choose_cache(
        plan.config,
        model.backbone,
        last_only={task for task, pool in pools.items() if reads(pool) == "last"},
        device=plan.device,
        vocab_size=plan.checkpoint.vocab_size,
        max_model_len=plan.max_model_len,
        batch_tokens=batch_tokens,
        limits=plan.checkpoint.windows,
    )


def _model_info(
    plan: _Plan,
    model: Model,
    pools: Mapping[Task, Pool],
    width: int,
    attention: Mapping[Choice, int],
    kept: Keep,
) -> ModelInfo:
    """All that the plan and the model say of themselves; `width` is what the head gives."""
    config, checkpoint, architecture = plan.config, plan.checkpoint, plan.architecture
    num_labels = 0 if architecture.embeds else width
    vector_size = width if architecture.embeds and width else checkpoint.matryoshka.size
    return ModelInfo(
        root=config.model,
        architectures=checkpoint.architectures,
        tasks=frozenset(pools),
        default_task=_default_task(config, pools),
        max_model_len=plan.max_model_len,
        max_embed_len=_max_embed_len(config, plan.max_model_len),
        vocab_size=checkpoint.vocab_size,
        embedding_size=vector_size,
        matryoshka=replace(checkpoint.matryoshka, size=vector_size),
        labels=labels_of(checkpoint.config, num_labels),
        prompts=checkpoint.config.get("task_instructions") or checkpoint.prompts,
        adapters=model.adapters.names,
        lora_modules=model.adapters.lora_modules,
        task_adapters=model.adapters.tasks,
        default_adapter=model.adapters.default,
        pooling=pooling_name(checkpoint, architecture, pooling_modes(checkpoint, model.loaded)),
        normalize=checkpoint.normalize and architecture.kind not in ("sparse", "listwise"),
        leaves_out_prompts=checkpoint.leaves_out_prompts,
        similarity=similarity_of(checkpoint, architecture),
        pairs="listwise" if architecture.kind == "listwise" else _pairs(checkpoint, model.loaded),
        dtype=str(plan.dtype).removeprefix("torch."),
        device=", ".join(map(str, plan.devices)),
        workers=_workers(config, plan.devices),
        worker_cpus=_worker_cpus(config, plan.devices),
        parameters=model.parameters,
        max_num_batched_tokens=budget.wanted(
            config.max_num_batched_tokens, plan.max_model_len, plan.device, chunks=kept.chunks
        ),
        max_num_seqs=config.max_num_seqs,
        packing=model.backbone.packing,
        attention=_attention_in_words(attention),
        prefix_caching=bool(kept.cache and kept.cache.finds_prefixes),
        chunked_prefill=kept.chunks,
        kv_cache_tokens=kept.cache.num_tokens if kept.cache else 0,
        kv_cache_bytes=kept.storage.num_bytes if kept.storage else 0,
        chunk_tokens=kept.cache.paging.max_chunk_tokens if kept.cache and kept.chunks else None,
        quantization=config.quantization,
        surgery=model.surgery,
    )


def _give_up_expansion(tokenizer: Tokenizer, backbone: Backbone, vocab_size: int) -> str | None:
    """Queries of a late interaction are left as they are where the model cannot look past what fills them up."""
    if not tokenizer.expands_unseen or keeps_unseen(backbone, vocab_size):
        return None
    tokenizer.scribes = {role: scribe.without_expansion() for role, scribe in tokenizer.scribes.items()}
    return _UNEXPANDED


def _is_blunt(plan: _Plan, model: Model, width: int) -> bool:
    """Whether a language model is scored and nobody said how its pairs are put together."""
    return (
        plan.architecture.kind == "classify"
        and width == 1
        and model.loaded.pooling == "last"
        and not {"use_sep_token", "use_pad_token"} & plan.checkpoint.config.keys()
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


def _framer(plan: _Plan, chat: ChatTemplate, tokenizer: Tokenizer) -> Framer | None:
    """What puts pairs, or the lists of a listwise reranker, into words; None if the tokenizer's separators do."""
    if plan.architecture.kind != "listwise":
        return plan.pairing.framer(plan.config, chat, tokenizer)
    if plan.config.chat_template:
        raise ConfigError(
            "This model reads a query and all its documents in a prompt of its own, in place of which no template can "
            "stand: leave --chat-template out."
        )
    config = plan.checkpoint.config
    return Listwise(
        tokenizer=tokenizer,
        longest=plan.max_model_len,
        max_query=int(config["max_query_length"]),
        max_document=int(config["max_doc_length"]),
    )


def _marks(plan: _Plan, fast: Any, tokenizer: Tokenizer) -> Marks:
    marks = Marks.of(fast)
    if plan.architecture.kind != "listwise":
        return marks
    return replace(marks, listed=frozenset(tokenizer.ids_of(MARKS)))


def _pairs(checkpoint: Checkpoint, loaded: Loaded) -> PairShape:
    """Whether a scored pair is one text, q + d, or two texts with the tokenizer's separators, unless it has a framer.

    sentence-transformers has it apart where its files say nothing; of a language model nobody knows it.
    """
    config = checkpoint.config
    flag = config.get("use_sep_token", config.get("use_pad_token"))
    if flag is None:
        return "unknown" if loaded.pooling == "last" and checkpoint.pairs is None else "separated"
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


def _workers(config: EngineConfig, devices: Seq[torch.device]) -> int:
    """One a GPU; on a CPU one a core this process may use, unless told otherwise."""
    if devices[0].type != "cpu":
        return len(devices)
    return config.cpu_workers or Cores.here().workers


def _worker_cpus(config: EngineConfig, devices: Seq[torch.device]) -> tuple[tuple[int, ...], ...]:
    """The CPUs that each worker is bound to, () if they float. The thread of a GPU waits most of the time."""
    if devices[0].type != "cpu" or not config.pin_workers:
        return ()
    return Cores.here().each(_workers(config, devices))


def _attention_in_words(served: Mapping[Choice, int]) -> str:
    """Which attention serves how many layers, for people to read."""
    each = (f"{choice} ({layers} layer{'s' if layers > 1 else ''})" for choice, layers in served.items())
    return ", ".join(each) or "transformers"


def _attention_notices(device: torch.device, chosen: Iterable[Choice]) -> Iterator[str]:
    """Fallbacks are loud: such a server is right, and slower than it need be."""
    if device.type == "cpu" and native.library is None:
        yield (
            "The native CPU kernels were not built (no C++ compiler at install, or another CPU): torch serves, slower."
        )
    if device.type == "cpu" and native.setback is not None:
        yield native.setback
    yield from dict.fromkeys(choice.notice for choice in chosen if choice.notice)


def _device_notices(config: EngineConfig, device: torch.device) -> Iterator[str]:
    """What is missing beside a GPU, and options that are for the other kind of device."""
    if device.type == "cpu":
        if config.gpu_memory_utilization is not None:
            yield "--gpu-memory-utilization has no meaning on a CPU."
        if config.pin_workers and not _worker_cpus(config, (device,)):
            yield "--pin-workers: there are fewer cores than workers, so none is bound to one."
        return
    if config.pin_workers:
        yield "--pin-workers has no meaning on a GPU."
    if config.cpu_workers is not None:
        yield "--cpu-workers has no meaning on a GPU: there is one worker a device (--data-parallel-size)."
    if fault := launch.fault():
        yield f"The CUDA kernels cannot be launched, and torch serves in their place, slower: {fault}"
    elif mismatch := launch.mismatch():
        yield mismatch
