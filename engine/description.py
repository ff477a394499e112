"""Description: what is told of a model that was loaded, its ModelInfo and its notices."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import torch

from carpool.engine import budget
from carpool.engine.architecture import labels_of
from carpool.engine.blueprint import Blueprint
from carpool.engine.cache.choice import Keep
from carpool.engine.chat import ChatTemplate
from carpool.engine.checkpoint import Checkpoint
from carpool.engine.config import EngineConfig
from carpool.engine.model_info import ModelInfo, PairShape
from carpool.engine.models.model import Model
from carpool.engine.params import Task
from carpool.engine.poolers.pooler import Pool
from carpool.engine.pools import (
    default_dimensions,
    default_task,
    has_linear_head,
    pooling_modes,
    pooling_name,
    similarity_of,
)
from carpool.engine.scoring import Framer
from carpool.engine.side_files import named_prompts
from carpool.kernels import launch, native
from carpool.kernels.attention import Choice


def model_info(
    plan: Blueprint,
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
        default_task=default_task(config, pools),
        max_model_len=plan.max_model_len,
        max_embed_len=_max_embed_len(config, plan.max_model_len),
        vocab_size=checkpoint.vocab_size,
        embedding_size=vector_size,
        default_dimensions=default_dimensions(checkpoint, config, architecture),
        linear_head=has_linear_head(checkpoint, model.loaded),
        matryoshka=replace(checkpoint.matryoshka, size=vector_size),
        labels=labels_of(checkpoint.config, num_labels),
        prompts=_prompts(checkpoint),
        adapters=model.adapters.slots,
        lora_modules=model.adapters.lora_modules,
        task_adapters=model.adapters.tasks,
        default_adapter=model.adapters.default,
        pooling=pooling_name(checkpoint, architecture, pooling_modes(checkpoint, model.loaded)),
        normalize=checkpoint.normalize and architecture.kind not in ("sparse", "listwise"),
        leaves_out_prompts=checkpoint.leaves_out_prompts,
        similarity=similarity_of(checkpoint, architecture),
        pairs="listwise" if architecture.kind == "listwise" else _pairs(plan),
        dtype=str(plan.dtype).removeprefix("torch."),
        device=", ".join(map(str, plan.devices)),
        workers=plan.workers,
        worker_cpus=plan.worker_cpus,
        parameters=model.parameters,
        max_num_batched_tokens=budget.wanted(
            config.max_num_batched_tokens, plan.max_model_len, plan.device, chunks=kept.chunks
        ),
        max_num_seqs=config.max_num_seqs,
        packing=model.backbone.packing,
        attention=_attention_in_words(attention),
        by_length=model.backbone.packing == "padded" or not all(choice.mixes_lengths for choice in attention),
        prefix_caching=bool(kept.cache and kept.cache.finds_prefixes),
        chunked_prefill=kept.chunks,
        kv_cache_tokens=kept.cache.num_tokens if kept.cache else 0,
        kv_cache_bytes=kept.storage.num_bytes if kept.storage else 0,
        chunk_tokens=kept.cache.paging.max_chunk_tokens if kept.cache and kept.chunks else None,
        quantization=config.quantization,
        surgery=model.surgery,
    )


def _prompts(checkpoint: Checkpoint) -> Mapping[str, str]:
    """By `input_type`: those of config.json, else those of the sentence-transformers files."""
    listed = checkpoint.config.get("task_instructions")
    return named_prompts(listed) if listed and isinstance(listed, Mapping) else checkpoint.prompts


def _pairs(plan: Blueprint) -> PairShape:
    """Whether a scored pair is one text, q + d, or two texts with the tokenizer's separators, unless it has a framer.

    Where nothing says it, it is as the reference has it: one text to a language model whose words are scored.
    """
    config = plan.checkpoint.config
    flag = config.get("use_sep_token", config.get("use_pad_token"))
    if flag is None:
        flag = plan.pairing.scorer is None or plan.checkpoint.pairs is not None
    return "separated" if flag else "concatenated"


def _max_embed_len(config: EngineConfig, max_model_len: int) -> int | None:
    """Longest text to embed; None where slices are averaged and nobody set a bound."""
    longest = config.pooler_config.max_embed_len
    if config.pooler_config.enable_chunked_processing:
        return longest
    return max_model_len if longest is None else min(longest, max_model_len)


def _attention_in_words(served: Mapping[Choice, int]) -> str:
    """Which attention serves how many layers, for people to read."""
    each = (f"{choice} ({layers} layer{'s' if layers > 1 else ''})" for choice, layers in served.items())
    return ", ".join(each) or "transformers"


# ── notices ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def notices(
    plan: Blueprint,
    model: Model,
    width: int,
    attention: Mapping[Choice, int],
    kept: Keep,
    framer: Framer | None,
    chat: ChatTemplate,
) -> Iterator[str]:
    """What its operator should know: choices that were made for them, fallbacks, options without effect."""
    yield from plan.notices
    yield from model.notices
    for sentence in (kept.notice, _unprompted(plan), _without_steps(plan)):
        if sentence:
            yield sentence
    yield from _attention_notices(plan.device, (*attention, *kept.attention))
    yield from _device_notices(plan)
    yield from plan.pairing.notices(
        framer,
        chat,
        plan.config,
        scores=_scores_pairs(plan, width),
        blunt=_is_blunt(plan, model, width),
    )


def _unprompted(plan: Blueprint) -> str | None:
    """A server puts a prompt where it is asked for: clients of other servers put theirs themselves."""
    name = plan.checkpoint.default_prompt
    if name is None or not plan.architecture.embeds:
        return None
    return (
        f"sentence-transformers puts this model's prompt {name!r} before every text; here a request has to name it "
        f"(prompt_name), or to bring it: {plan.checkpoint.prompts[name]!r}."
    )


def _without_steps(plan: Blueprint) -> str | None:
    """What is said of steps, where every token has its result, is passed over as the reference does."""
    pooler, kind = plan.config.pooler_config, plan.architecture.kind
    steps = pooler.steps if pooler.steps is not None else kind == "process_reward"
    said = [name for name in ("step_tag_id", "returned_token_ids") if getattr(pooler, name) is not None]
    if not said or steps or kind == "judge":
        return None
    return f"Without pooling_type STEP, the pooler config's {' and '.join(said)} decide nothing."


def _scores_pairs(plan: Blueprint, width: int) -> bool:
    """Whether the model is a cross-encoder."""
    return plan.architecture.kind == "classify" and width == 1


def _is_blunt(plan: Blueprint, model: Model, width: int) -> bool:
    """Whether a language model is scored and nobody said how its pairs are put together."""
    return (
        _scores_pairs(plan, width)
        and model.loaded.pooling == "last"
        and not {"use_sep_token", "use_pad_token"} & plan.checkpoint.config.keys()
    )


def _attention_notices(device: torch.device, chosen: Iterable[Choice]) -> Iterator[str]:
    """Fallbacks are loud: such a server is right, and slower than it need be."""
    if device.type == "cpu" and native.library is None:
        yield (
            "The native CPU kernels were not built (no C++ compiler at install, or another CPU), or of other sources "
            "than these: torch serves, slower. Reinstall carpool where there is a compiler."
        )
    if device.type == "cpu" and native.setback is not None:
        yield native.setback
    yield from dict.fromkeys(choice.notice for choice in chosen if choice.notice)


def _device_notices(plan: Blueprint) -> Iterator[str]:
    """What is missing beside a GPU, and options that are for the other kind of device."""
    config = plan.config
    if plan.device.type == "cpu":
        if config.gpu_memory_utilization is not None:
            yield "--gpu-memory-utilization has no meaning on a CPU."
        if config.pin_workers and not plan.worker_cpus:
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
