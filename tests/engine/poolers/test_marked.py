"""The marked pool: the rows at the marks and no others, whatever rides beside them, on the host and by the kernels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from asking import read
from carpool.engine.packing import pack_ids
from carpool.engine.params import PoolingParams
from carpool.engine.poolers.embed import EmbedHead
from carpool.engine.poolers.marked import MarkedPool
from carpool.engine.sequence import Sequence

DOCUMENT, QUERY = 7, 9
WIDTH = 5
TEXTS = [[1, 7, 2, 7, 9, 3], [4], [9], [7, 7, 7], [1, 2]]


@pytest.fixture(params=["host", "kernels"])
def backend(request: pytest.FixtureRequest) -> str:
    """Who does the work that kernels do on a device."""
    if request.param == "kernels":
        request.getfixturevalue("emulated")
    return str(request.param)


def pooled(
    hidden: Tensor, places: list[int], params: PoolingParams | None = None, head: nn.Module | None = None
) -> list[Tensor]:
    """The vectors of the texts at `places`."""
    pool = MarkedPool(EmbedHead([head or nn.Identity()], False, None), frozenset({DOCUMENT, QUERY}))
    packed = pack_ids(TEXTS, torch.device("cpu"))
    asked = [
        Sequence(i, 0, TEXTS[place], params or PoolingParams(), "token_embed")
        for i, place in enumerate(places)
    ]
    return [torch.from_numpy(row) for row in read(pool(hidden, packed, places, asked))]


def states(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(sum(map(len, TEXTS)), WIDTH, generator=torch.Generator().manual_seed(0)).to(dtype)


def marked(hidden: Tensor, place: int) -> Tensor:
    own = torch.split(hidden, [len(ids) for ids in TEXTS])[place]
    return own[[token in (DOCUMENT, QUERY) for token in TEXTS[place]]]


@pytest.mark.parametrize("places", [[0, 1, 2, 3, 4], [3, 0], [1, 4], [2]])
def test_rows_at_marks_are_the_result_in_their_order(places: list[int], backend: str) -> None:
    hidden = states()
    for row, place in zip(pooled(hidden, places), places, strict=True):
        assert row.shape == (sum(token in (DOCUMENT, QUERY) for token in TEXTS[place]), WIDTH)
        assert torch.equal(row, marked(hidden, place))


def test_heads_work_in_float32(backend: str) -> None:
    hidden = states(torch.bfloat16)
    linear = nn.Linear(WIDTH, 3).requires_grad_(False)
    for row, place in zip(pooled(hidden, [0, 3], head=linear), [0, 3], strict=True):
        assert torch.allclose(row, linear(marked(hidden, place).float()), atol=1e-6)


def test_vectors_have_their_lengths_unless_told_otherwise(backend: str) -> None:
    hidden = states()
    (row,) = pooled(hidden, [0], PoolingParams(use_activation=True))
    assert torch.allclose(row, nn.functional.normalize(marked(hidden, 0)), atol=1e-6)
