"""Where a case takes its sizes and options from: hypothesis, which shrinks what fails, or a seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Protocol, TypeVar

import torch
from hypothesis import strategies as st
from torch import Tensor

from carpool.kernels import reference

T = TypeVar("T")


DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Choose(Protocol):
    @property
    def dtypes(self) -> Sequence[torch.dtype]: ...  # of inputs

    @property
    def outputs(self) -> Sequence[reference.Output]: ...

    def whole(self, least: int, most: int) -> int: ...

    def one(self, options: Sequence[T]) -> T: ...


class Drawn:
    """By hypothesis."""

    def __init__(self, data: st.DataObject, dtypes: Sequence[torch.dtype] = DTYPES) -> None:
        self.dtypes, self.outputs = dtypes, tuple(reference.OUTPUTS)
        self._data = data

    def whole(self, least: int, most: int) -> int:
        return self._data.draw(st.integers(least, most))

    def one(self, options: Sequence[T]) -> T:
        return self._data.draw(st.sampled_from(options))


class Seeded:
    """The same for the same seed."""

    def __init__(
        self,
        seed: int,
        dtypes: Sequence[torch.dtype] = DTYPES,
        outputs: Sequence[reference.Output] = tuple(reference.OUTPUTS),
    ) -> None:
        self.dtypes, self.outputs = dtypes, outputs
        self._random = random.Random(seed)

    def whole(self, least: int, most: int) -> int:
        return self._random.randint(least, most)

    def one(self, options: Sequence[T]) -> T:
        return self._random.choice(options)


def normal(choose: Choose, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers, of one of a thousand seeds."""
    generator = torch.Generator().manual_seed(choose.whole(0, 999))
    return torch.randn(shape, generator=generator).to(dtype)


def lengths(choose: Choose, most: int, count: int = 6, least: int = 0) -> list[int]:
    """Of the sequences in a packed row."""
    return [choose.whole(least, most) for _ in range(choose.whole(1, count))]


def bounds(lengths_: Sequence[int]) -> Tensor:
    """int32 [B+1]: where each sequence begins, and the end."""
    return torch.tensor([0, *lengths_], dtype=torch.int32).cumsum(0, dtype=torch.int32)
