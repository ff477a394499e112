"""Keys and values into the pages of a cache, and out of them."""

from __future__ import annotations

import torch
from torch import Tensor

from carpool.kernels.reference.segments import segment_ids


def kv_write(keys: Tensor, values: Tensor, slots: Tensor, key_cache: Tensor, value_cache: Tensor) -> None:
    """Into both caches [P, S, N, D], P pages of S tokens: keys and values [T, N, D] at int64 slots [T].

    A slot is page * S + place, no two the same; a token whose slot is below 0 or behind the end is left out.
    """
    size = key_cache.shape[1]
    kept = (slots >= 0) & (slots < len(key_cache) * size)
    page, place = slots[kept] // size, slots[kept] % size
    key_cache[page, place], value_cache[page, place] = keys[kept], values[kept]


def kv_gather(
    key_cache: Tensor, value_cache: Tensor, pages: Tensor, cu_seqlens: Tensor, tokens: int
) -> tuple[Tensor, Tensor]:
    """Out of both caches [P, S, N, D] into packed rows [T, N, D]: int32 pages [B, M] of each sequence in order,
    cu_seqlens int32 [B+1], whose last is `tokens`.
    """
    size, owner = key_cache.shape[1], segment_ids(cu_seqlens)
    place = torch.arange(tokens, device=owner.device) - cu_seqlens[:-1].long()[owner]
    page = pages[owner, place // size].long()
    return key_cache[page, place % size], value_cache[page, place % size]
