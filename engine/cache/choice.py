"""Choice: whether a model's keys and values are kept, for what, and how many. Asked once, at load."""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass

import torch

from carpool.engine.cache.blocks import BlockPool
from carpool.engine.cache.cache import Cache
from carpool.engine.cache.paging import Paging
from carpool.engine.cache.storage import KeptLayer, Storage
from carpool.engine.config import EngineConfig
from carpool.engine.errors import ConfigError
from carpool.engine.free_memory import free_memory
from carpool.engine.models.backbone import Backbone
from carpool.engine.models.paged import CannotPage, pageable_layers, paged_attention_chosen
from carpool.engine.params import Task
from carpool.kernels.attention import Choice

_CPU_BYTES = 1 << 30  # taken as it comes to be used
_CPU_SHARE = 4  # and at most this part of what is free at the start
_GPU_SHARE = 10  # this part of a GPU's memory
_MOST_PROMPTS = 64  # of the longest: more of a small model's is kept for nobody
_CHUNK = 2048  # tokens


@dataclass(frozen=True, slots=True)
class Keep:
    """`storage` is the `cache`'s memory, and `attention` looks back at it. `notice` says why there is none, if it had
    been asked for or memory is short, or that it is small.
    """

    cache: Cache | None = None
    storage: Storage | None = None
    attention: tuple[Choice, ...] = ()
    chunks: bool = False
    notice: str | None = None


def choose_cache(
    config: EngineConfig,
    backbone: Backbone,
    *,
    last_only: Set[Task],
    device: torch.device,
    vocab_size: int,
    max_model_len: int,
    batch_tokens: int | None = None,
    limits: Iterable[int] = (),
) -> Keep:
    """`last_only` are the tasks whose results are of a prompt's last token. Raises ConfigError if there is no room.

    Unless told otherwise, a chunk is as large as a batch, whose `batch_tokens` are what the model needs to run at full
    speed: then chunks cost nothing, and nobody waits longer behind one than behind any other batch.

    What the user leaves open is on where it can be: chunks for a model that looks back only, prefixes if it has tasks
    that profit.
    """
    prefixes = config.enable_prefix_caching is not False and bool(last_only)
    chunks = config.enable_chunked_prefill is not False
    asked = config.enable_prefix_caching or config.enable_chunked_prefill
    if not prefixes and not chunks:
        return _not_kept("no task of it is about the last token", config.enable_prefix_caching)
    if config.data_parallel_size > 1:
        return _not_kept("GPUs would need one another's", asked)
    try:
        layers = pageable_layers(
            backbone,
            vocab_size=vocab_size,
            max_model_len=max_model_len,
            block_size=config.block_size,
            limits=limits,
        )
    except CannotPage as fault:
        return _not_kept(str(fault), asked)
    blocks = _num_blocks(config, layers, device, max_model_len)
    if blocks < 2:
        return _not_kept("there is no memory for it", True)  # nobody would have thought so
    most = config.max_num_batched_tokens or max_model_len
    chunk = min(config.long_prefill_token_threshold or batch_tokens or _CHUNK, max_model_len, most)
    # Without chunks, prompts are as long as a batch at most.
    longest = chunk if chunks else max(max_model_len, most)
    cache = Cache(Paging(BlockPool(blocks, config.block_size), longest), frozenset(last_only), prefixes)
    storage = Storage.of(layers, blocks, config.block_size, device)
    attention = tuple(paged_attention_chosen(backbone, storage))
    if any(choice.by == "gather" for choice in attention):
        # Then the host waits in every layer, and keys are copied together: more is lost than spared.
        return _not_kept("there are no kernels of ours to look back with", asked)
    return Keep(cache, storage, attention, chunks, _small(cache, max_model_len))


def _not_kept(why: str, asked: bool | None) -> Keep:
    if not asked:
        return Keep()
    return Keep(notice=f"Keys and values are not kept, for prefixes or chunks: {why}.")


def _small(cache: Cache, max_model_len: int) -> str | None:
    """A notice, if it is too small for the longest prompt."""
    if cache.paging.holds(max_model_len):
        return None
    return (
        f"The cache of keys and values has memory for {cache.num_tokens} tokens, less than a prompt may have "
        f"({max_model_len}): longer ones are not kept, nor run in chunks. Give it more by --kv-cache-memory-bytes or "
        "by a larger limit of memory, or lower --max-model-len."
    )


def _num_blocks(
    config: EngineConfig, layers: list[KeptLayer], device: torch.device, max_model_len: int
) -> int:
    """Blocks that the memory has room for."""
    per_block = config.block_size * sum(layer.bytes_per_token for layer in layers)
    if config.kv_cache_memory_bytes is not None:
        blocks = config.kv_cache_memory_bytes // per_block
        if blocks < 2:
            raise ConfigError(
                f"--kv-cache-memory-bytes {config.kv_cache_memory_bytes} is less than two blocks need: {2 * per_block}."
            )
        return blocks
    if device.type == "cpu":
        free = free_memory()
        memory = _CPU_BYTES if free is None else min(_CPU_BYTES, free // _CPU_SHARE)
    else:
        memory = torch.cuda.get_device_properties(device).total_memory // _GPU_SHARE
    most = _MOST_PROMPTS * -(-max_model_len // config.block_size)
    return min(memory // per_block, most)
