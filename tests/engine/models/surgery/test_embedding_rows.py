"""Embeddings in one pass: the same numbers, the same tables in the same places, and only where nothing else is done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from building import backbone, built
from carpool.engine.models.backbone import Backbone
from carpool.engine.models.surgery.agreement import agree
from carpool.engine.models.surgery.embedding_rows import EmbeddingRows, sum_rows
from carpool.engine.packing import PackedBatch, pack_ids
from carpool.kernels import native

pytestmark = pytest.mark.skipif(native.level < 1, reason="no native kernels")
BATCH = pack_ids([[5, 6, 7], [8], list(range(10, 40))], torch.device("cpu"))
TYPED = replace(BATCH, token_type_ids=torch.arange(len(BATCH.input_ids)) % 2)


def hidden(one: Backbone, batch: PackedBatch = BATCH) -> Tensor:
    with torch.inference_mode():
        return one.forward(batch)


@pytest.fixture
def plain(checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Backbone]:
    """A served model with transformers' embeddings."""

    def made(family: str) -> Backbone:
        with monkeypatch.context() as patch:
            patch.setattr("carpool.engine.build.sum_rows", lambda *_, **__: 0)
            return backbone(built(checkpoint(family)))

    return made


@pytest.mark.parametrize(
    ("family", "batch"), [("bert", BATCH), ("bert", TYPED), ("xlmr", BATCH), ("modernbert", BATCH)]
)
def test_the_numbers_are_the_same(family: str, batch: PackedBatch, plain: Callable[[str], Backbone]) -> None:
    model = plain(family)
    before = hidden(model, batch)
    assert sum_rows(model, vocab_size=60) == 1
    for one in (model, model.replica(), model.replica().replica()):
        assert [
            type(vars(m)["forward"])
            for m in one.module.modules()
            if "forward" in vars(m) and m is not one.module
        ] == [EmbeddingRows]
        assert agree(hidden(one, batch), before)


def test_it_is_served_so(checkpoint: Callable[[str], Path]) -> None:
    assert built(checkpoint("bert")).model.surgery["embedding_rows"] == 1


def test_a_copy_reads_its_own_tables(plain: Callable[[str], Backbone]) -> None:
    model = plain("bert")
    sum_rows(model, vocab_size=60)
    copy, before = model.replica(), hidden(model)
    table = copy.module.get_submodule("embeddings.word_embeddings")
    table.weight = nn.Parameter(torch.zeros_like(table.weight))  # type: ignore[arg-type]
    assert torch.equal(hidden(model), before)
    assert not agree(hidden(copy), before)


def test_a_table_that_is_more_than_one_stays(plain: Callable[[str], Backbone]) -> None:
    class Scaled(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            return 2 * super().forward(ids)

    model = plain("bert")
    embeddings = model.module.get_submodule("embeddings")
    embeddings.word_embeddings.__class__ = Scaled
    before = hidden(model)
    assert sum_rows(model, vocab_size=60) == 0
    assert torch.equal(hidden(model), before)


def test_embeddings_that_do_more_stay(plain: Callable[[str], Backbone]) -> None:
    model = plain("bert")
    embeddings = model.module.get_submodule("embeddings")
    own = type(embeddings)

    class More(own):  # type: ignore[valid-type,misc]
        def forward(self, *args: object, **kwargs: object) -> Tensor:
            out: Tensor = super().forward(*args, **kwargs)
            return 1.5 * out

    embeddings.__class__ = More
    before = hidden(model)
    assert sum_rows(model, vocab_size=60) == 0
    assert "forward" not in vars(embeddings)
    assert torch.equal(hidden(model), before)
