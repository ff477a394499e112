"""Build: an EngineConfig becomes the parts of an engine, every "auto" resolved. Runs once, before anything serves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from carpool.engine import budget, cost, parcel, threads
from carpool.engine.blueprint import Blueprint
from carpool.engine.cache.choice import Keep, choose_cache
from carpool.engine.chat import ChatTemplate
from carpool.engine.config import EngineConfig
from carpool.engine.cost import Cost
from carpool.engine.description import model_info, notices
from carpool.engine.device import limit_memory
from carpool.engine.errors import ConfigError
from carpool.engine.fast_tokenizer import end_notice, load_fast
from carpool.engine.hub import locate
from carpool.engine.listwise import MARKS, Listwise
from carpool.engine.memory import bound_primitive_caches, keep_buffers
from carpool.engine.model_info import ModelInfo
from carpool.engine.models.backbone import Backbone
from carpool.engine.models.model import Model
from carpool.engine.models.probe import attention_chosen, keeps_unseen
from carpool.engine.models.rack import Rack
from carpool.engine.models.surgery.embedding_rows import sum_rows
from carpool.engine.models.surgery.encoder import unite
from carpool.engine.models.surgery.encoder_layer import straighten
from carpool.engine.models.surgery.last_layer import narrow
from carpool.engine.models.surgery.shortcut import shorten
from carpool.engine.params import Task
from carpool.engine.poolers.adapted import AdaptedPool
from carpool.engine.poolers.bge_m3 import Marks
from carpool.engine.poolers.pooler import Pool, Pooler, reads
from carpool.engine.pools import STEP_TAG, default_task, head_width, make_pools, pooling_modes
from carpool.engine.runner import ModelRunner
from carpool.engine.scoring import Framer
from carpool.engine.tokenizer import Tokenizer
from carpool.kernels import crew

PoolsOf = Callable[[nn.Module | None], dict[Task, Pool]]  # of a head

_UNEXPANDED = (
    "Queries are not expanded, though the model's files ask for it: in this model, tokens that are not to be looked at "
    "would be. Scores differ from PyLate's."
)


@dataclass(frozen=True, slots=True)
class Parts(parcel.Parts):
    """What an engine is made of. `runners` are for one worker each, and share the weights of their device.

    `tokens_per_second` is what all of them run together, where that was measured. `rack`: where adapters may come and
    go.
    """

    runners: list[ModelRunner]
    tokens_per_second: float | None
    rack: Rack | None = None


def build(config: EngineConfig) -> Parts:
    """Load and check the model. Raises ConfigError with one sentence if it cannot be served as asked."""
    bound_primitive_caches()
    folder = locate(config.model, config.revision, config.download_dir)
    plan = Blueprint.of(config, folder)
    with threads.spread(plan.checkpoint.path) if plan.device.type == "cpu" else nullcontext():
        parts = _built(plan, folder)
    keep_buffers()
    return parts


def _built(plan: Blueprint, folder: Path) -> Parts:
    """`folder` is where the model lies."""
    config = plan.config
    words = plan.checkpoint.path
    if config.tokenizer or config.tokenizer_revision:
        told = locate(
            config.tokenizer or config.model, config.tokenizer_revision, config.download_dir, what="tokenizer"
        )
        words = words if told == folder else told
    fast = load_fast(words, trust_remote_code=config.trust_remote_code)
    tokenizer = plan.tokenizer(fast)
    chat = ChatTemplate.of(
        fast,
        config.chat_template,
        content_format=config.chat_template_content_format,
        kwargs=config.default_chat_template_kwargs,
    )
    framer = _framer(plan, chat, tokenizer)
    if plan.device.type == "cuda" and config.gpu_memory_utilization:
        limit_memory(plan.devices, config.gpu_memory_utilization)
    with budget.room_for_weights(plan.device):
        model = plan.model(tokenizer)
    unexpanded = _give_up_expansion(tokenizer, model.backbone, plan.checkpoint.vocab_size)
    attention = attention_chosen(model.backbone, plan.checkpoint.vocab_size, unseen=tokenizer.expands_unseen)
    width = head_width(model.loaded)
    pools, pools_of = _pools(plan, model, width, _marks(plan, fast, tokenizer))
    if config.surgery:
        model = _finished(plan, model, pools)
    tried, found = _tried(plan, model, pools)
    batch_tokens = _batch_tokens(tried, found)
    kept = _kept(plan, model, pools, batch_tokens)
    info = replace(
        model_info(plan, model, pools, width, attention, kept),
        root=config.model or str(folder),
        roles={role: scribe.skipped for role, scribe in tokenizer.scribes.items()},
        chat_template=chat.present,
        score_template=framer is not None,
        batch_tokens=batch_tokens,
        notices=(
            *notices(plan, model, width, attention, kept, framer, chat),
            *(sentence for sentence in (unexpanded, end_notice(words, fast)) if sentence),
        ),
    )
    runners = tried
    if not tried or kept.storage is not None:  # which has marked the layers since, and they copy their marks
        first = ModelRunner(model.backbone, Pooler(pools), plan.device, kept.storage)
        runners = _runners(plan, first, info.workers)
    if plan.device.type == "cuda":
        info = replace(info, notices=(*info.notices, *_recorded(plan, runners)))
        info = _fitted(info, plan.devices, runners)
    if plan.device.type == "cpu":
        crew.hire(info.workers)  # not before batches were measured: then all cores were to be busy
    rate = (found.tokens_per_second(len(runners)) or None) if found else None
    rack = _rack(plan, model, runners, pools_of) if config.allow_runtime_lora_updating else None
    return Parts(info, tokenizer, chat, framer, kept.cache, runners, rate, rack)


def _rack(plan: Blueprint, model: Model, runners: Seq[ModelRunner], pools_of: PoolsOf) -> Rack:
    return Rack(
        model,
        runners,
        pools_of,
        vocab_size=plan.checkpoint.vocab_size,
        max_model_len=plan.max_model_len,
        download_dir=plan.config.download_dir,
    )


def _finished(plan: Blueprint, model: Model, pools: Mapping[Task, Pool]) -> Model:
    """With the surgery that comes when all else of the model has been looked at: layers as a whole, and the last one
    for the rows that are read.
    """
    backbone, vocab_size = model.backbone, plan.checkpoint.vocab_size
    swapped = {"encoder_layer": straighten(backbone, vocab_size=vocab_size)}
    swapped["encoder"] = unite(backbone, vocab_size=vocab_size)
    if any(reads(pool) != "all" for pool in pools.values()):
        swapped["last_layer"] = narrow(backbone, vocab_size=vocab_size)
    swapped["embedding_rows"] = sum_rows(backbone, vocab_size=vocab_size)
    if swapped["encoder"]:
        swapped["shortcut"] = shorten(backbone, vocab_size=vocab_size)
    return replace(model, surgery={**model.surgery, **swapped})


def _runners(plan: Blueprint, first: ModelRunner, workers: int) -> list[ModelRunner]:
    """One a worker: on a CPU all over one set of weights, on GPUs each over a copy of its own."""
    if plan.device.type == "cpu":
        return [first, *(first.replica() for _ in range(workers - 1))]
    runners = [first]
    for device in plan.devices[1:]:
        with budget.room_for_weights(device):
            runners.append(first.replica(device))
    return runners


def _tried(
    plan: Blueprint, model: Model, pools: Mapping[Task, Pool]
) -> tuple[list[ModelRunner], Cost | None]:
    """The workers' runners and what a batch costs them, if that can be measured; none where nothing hangs on it."""
    if plan.device.type != "cpu" or plan.config.max_num_batched_tokens is not None:
        return [], None
    first = ModelRunner(model.backbone, Pooler(pools), plan.device)
    runners = _runners(plan, first, plan.workers)
    found = cost.measured(
        runners,
        max_model_len=plan.max_model_len,
        max_num_seqs=plan.config.max_num_seqs,
        vocab_size=plan.checkpoint.vocab_size,
        task=default_task(plan.config, pools),
    )
    return runners, found


def _batch_tokens(tried: Seq[ModelRunner], found: Cost | None) -> int | None:
    """Up to how many tokens batches are filled, by what they cost on this CPU; None for as many as they may have."""
    if not tried:
        return None
    return cost.MOST_TOKENS if found is None else found.batch_tokens()


def _recorded(plan: Blueprint, runners: Seq[ModelRunner]) -> dict[str, None]:
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


def _pools(plan: Blueprint, model: Model, width: int, marks: Marks) -> tuple[dict[Task, Pool], PoolsOf]:
    """A pool a task, and what makes those of another head; where adapters bring heads of their own, or may, each deals
    out to those.
    """
    modes = pooling_modes(plan.checkpoint, model.loaded)

    def of(head: nn.Module | None) -> dict[Task, Pool]:
        own = replace(model.loaded, head=head)
        return make_pools(
            plan.checkpoint, plan.config, plan.architecture, own, modes, width, marks, plan.device
        )

    pools = of(model.loaded.head)
    if not (model.adapters.heads or plan.config.allow_runtime_lora_updating):
        return pools, of
    by_slot = {0: pools, **{slot: of(head) for slot, head in model.adapters.heads.items()}}
    dealers = {task: AdaptedPool({slot: own[task] for slot, own in by_slot.items()}) for task in pools}
    return dict(dealers), of


def _kept(plan: Blueprint, model: Model, pools: Mapping[Task, Pool], batch_tokens: int | None) -> Keep:
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


def _give_up_expansion(tokenizer: Tokenizer, backbone: Backbone, vocab_size: int) -> str | None:
    """Queries of a late interaction are left as they are where the model cannot look past what fills them up."""
    if not tokenizer.expands_unseen or keeps_unseen(backbone, vocab_size):
        return None
    tokenizer.scribes = {role: scribe.without_expansion() for role, scribe in tokenizer.scribes.items()}
    return _UNEXPANDED


def _framer(plan: Blueprint, chat: ChatTemplate, tokenizer: Tokenizer) -> Framer | None:
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


def _marks(plan: Blueprint, fast: Any, tokenizer: Tokenizer) -> Marks:
    marks = Marks.of(fast)
    match plan.architecture.kind:
        case "listwise":
            return replace(marks, listed=frozenset(tokenizer.ids_of(MARKS)))
        case "process_reward":
            return replace(marks, step=fast.backend_tokenizer.token_to_id(STEP_TAG))
    return marks
