"""Storage: the keys and values that a cache holds. Which block is whose, `blocks.py` knows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from carpool.kernels.layout import Pages


class KeptLayer(NamedTuple):
    """What an attention layer keeps of a token: keys and values, [heads, size] each."""

    heads: int
    size: int
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.heads * self.size * self.dtype.itemsize


class Storage:
    """Room for keys and values on one device: a block of the pool is a page of every layer.

    `layers`: the keys and the values of each layer that attends, in order, [P, S, N_kv, D] both. All runners of the
    device write to it and read from it, each what the pool says is its own.
    """

    def __init__(self, layers: tuple[Pages, ...], num_blocks: int, block_size: int) -> None:
        self.layers = layers
        self.num_blocks = num_blocks
        self.block_size = block_size

    @property
    def num_bytes(self) -> int:
        """Memory that it takes once all of it has been used."""
        return sum(pages.nbytes for layer in self.layers for pages in layer)

    @classmethod
    def of(
        cls, layers: Iterable[KeptLayer], num_blocks: int, block_size: int, device: torch.device
    ) -> Storage:
        """For a pool of `num_blocks` blocks of `block_size` tokens. A CPU gives the memory as it comes to be used."""

        def pages(layer: KeptLayer) -> Tensor:
            shape = (num_blocks, block_size, layer.heads, layer.size)
            return torch.empty(shape, dtype=layer.dtype, device=device)

        return cls(tuple((pages(layer), pages(layer)) for layer in layers), num_blocks, block_size)
