"""Storage: pages of every layer's own size."""

from __future__ import annotations

import torch

from carpool.engine.cache.storage import KeptLayer, Storage


def test_every_layer_has_pages_of_its_own_shape() -> None:
    layers = [KeptLayer(2, 8, torch.float32), KeptLayer(1, 16, torch.bfloat16)]
    storage = Storage.of(layers, 5, 4, torch.device("cpu"))
    shapes = [(5, 4, 2, 8), (5, 4, 1, 16)]
    assert [tuple(pages.shape) for layer in storage.layers for pages in layer] == [
        shape for shape in shapes for _ in range(2)
    ]
    assert [keys.dtype for keys, _ in storage.layers] == [torch.float32, torch.bfloat16]
    assert len({pages.data_ptr() for layer in storage.layers for pages in layer}) == 4
    assert (storage.num_blocks, storage.block_size) == (5, 4)


def test_bytes_of_a_token_are_those_that_its_pages_take() -> None:
    layers = [KeptLayer(2, 8, torch.float32), KeptLayer(1, 24, torch.float16)]
    storage = Storage.of(layers, 3, 7, torch.device("cpu"))
    taken = sum(pages.nbytes for layer in storage.layers for pages in layer)
    assert sum(layer.bytes_per_token for layer in layers) * 3 * 7 == taken
