"""Pages give back what was written."""

from __future__ import annotations

import torch

from carpool.kernels import reference
from emu.choose import bounds
from near import rand


def test_pages_give_back_what_was_written() -> None:
    lengths, size = [5, 0, 3], 2
    pages = torch.tensor([[4, 0, 2], [0, 0, 0], [1, 3, 0]], dtype=torch.int32)
    keys, values = rand(8, 1, 4), rand(8, 1, 4, seed=1)
    slots = [int(pages[b, i // size]) * size + i % size for b, n in enumerate(lengths) for i in range(n)]
    caches = torch.zeros(2, 5, size, 1, 4)
    reference.kv_write(keys, values, torch.tensor(slots), caches[0], caches[1])
    found = reference.kv_gather(caches[0], caches[1], pages, bounds(lengths), 8)
    assert torch.equal(found[0], keys)
    assert torch.equal(found[1], values)
    before = caches.clone()
    reference.kv_write(keys[:2], values[:2], torch.tensor([-1, 10]), caches[0], caches[1])
    assert torch.equal(caches, before), "tokens without a place are left out"
