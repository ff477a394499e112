"""SPLADE: weights of the vocabulary, whatever the size of the chunks that the logits are computed in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from asking import ask
from carpool import LLM
from carpool.engine.build import Parts, build
from carpool.engine.config import EngineConfig, PoolerConfig
from carpool.engine.errors import ConfigError
from carpool.engine.params import PoolingParams
from carpool.engine.poolers import splade
from carpool.engine.poolers.sparse import NonZeroPool
from carpool.engine.poolers.splade import SpladePool
from carpool.engine.sequence import Sequence
from carpool.engine.side_files import Splade
from head_oracle import answer, close
from tiny import TEXTS, edit_json
from zoo import heads

WIDTH, VOCABULARY = 6, 11
LENGTHS = [3, 1, 5, 2]


def linear() -> nn.Linear:
    torch.manual_seed(2)
    return nn.Linear(WIDTH, VOCABULARY).requires_grad_(False)


def rows() -> list[Tensor]:
    torch.manual_seed(1)
    return list(torch.split(torch.randn(sum(LENGTHS), WIDTH) * 2, LENGTHS))


def run(pool: SpladePool | NonZeroPool, places: list[int]) -> list[Tensor]:
    sequences = [Sequence(0, i, [1] * LENGTHS[place], PoolingParams()) for i, place in enumerate(places)]
    return [torch.from_numpy(row) for row in ask(pool, torch.cat(rows()), LENGTHS, places, sequences)]


def by_hand(text: Tensor, head: nn.Linear, strategy: str, twice: bool) -> Tensor:
    weights = torch.log(1 + head(text).clamp_min(0))
    weights = torch.log(1 + weights) if twice else weights
    return weights.max(0).values if strategy == "max" else weights.sum(0)


@pytest.mark.parametrize("tokens_at_once", [1, 2, 4, 100])
@pytest.mark.parametrize("strategy", ["max", "sum"])
@pytest.mark.parametrize("twice", [False, True])
def test_chunks_change_nothing(tokens_at_once: int, strategy: str, twice: bool) -> None:
    """Chunks that end within a text, at its end, and far behind it; texts out of order, and one asked twice."""
    head, places = linear(), [2, 0, 3, 1, 2]
    pool = SpladePool(head, VOCABULARY, Splade(strategy, twice))  # type: ignore[arg-type]
    with mock.patch.object(splade, "_MOST_LOGITS", tokens_at_once * VOCABULARY):
        found = run(pool, places)
    for place, ours in zip(places, found, strict=True):
        assert close(ours, by_hand(rows()[place], head, strategy, twice))


def test_no_more_logits_than_said_exist_at_once() -> None:
    largest = 0

    class Watched(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            nonlocal largest
            largest = max(largest, len(x) * VOCABULARY)
            return super().forward(x)

    with mock.patch.object(splade, "_MOST_LOGITS", 4 * VOCABULARY):
        run(SpladePool(Watched(WIDTH, VOCABULARY).requires_grad_(False), VOCABULARY, Splade()), [0, 1, 2, 3])
    assert largest == 4 * VOCABULARY


def test_only_the_largest_weights_are_kept_where_the_files_say_so() -> None:
    head = linear()
    for ours, text in zip(
        run(SpladePool(head, VOCABULARY, Splade(most=3)), [0, 1, 2, 3]), rows(), strict=True
    ):
        whole = by_hand(text, head, "max", False)
        kept = whole.topk(3).indices
        assert close(ours[kept], whole[kept])
        assert int((ours != 0).sum()) <= 3


def test_a_sparse_vector_is_what_is_not_zero() -> None:
    pool = SpladePool(linear(), VOCABULARY, Splade())
    for whole, sparse in zip(run(pool, [0, 1, 2, 3]), run(NonZeroPool(pool), [0, 1, 2, 3]), strict=True):
        assert sparse[:, 0].tolist() == whole.nonzero()[:, 0].tolist()
        assert torch.equal(sparse[:, 1], whole[whole != 0])


# ── checkpoints ──────────────────────────────────────────────────────────────────────────────────────────────


def built(folder: Path, make: Callable[[Path], object] = heads.splade_v3, **options: Any) -> Parts:
    make(folder)
    return build(EngineConfig(**{"model": str(folder), "dtype": "float32", "cpu_workers": 1, **options}))


@pytest.mark.parametrize("make", [heads.splade_v3, heads.opensearch_sparse])
def test_equals_sentence_transformers(tmp_path: Path, make: Callable[[Path], object]) -> None:
    from sentence_transformers import SparseEncoder

    parts = built(tmp_path, make)
    model = SparseEncoder(str(tmp_path), device="cpu")
    texts = [text.strip() for text in TEXTS if text and len(text) < 100]
    truths = model.encode(texts, convert_to_sparse_tensor=False, show_progress_bar=False)
    for ours, truth in zip(answer(parts, parts.tokenizer.encode(texts), "embed"), truths, strict=True):
        assert close(ours, truth)


def test_what_the_model_is_known_by(tmp_path: Path) -> None:
    model = built(tmp_path).model
    assert model.tasks == {"embed", "sparse_embed"}
    assert (model.default_task, model.score_type, model.similarity) == ("embed", "bi-encoder", "dot")
    assert (model.embedding_size, model.normalize, model.pooling) == (
        model.vocab_size,
        False,
        "max of logits",
    )
    assert model.labels == ()


def test_neither_unit_length_nor_width_can_be_asked_for(tmp_path: Path) -> None:
    parts = built(tmp_path)
    (ids,) = parts.tokenizer.encode(["rain in spain"])
    plain, wished = (answer(parts, [ids], "embed", p)[0] for p in (None, PoolingParams(use_activation=True)))
    assert torch.equal(plain, wished)
    with pytest.raises(ConfigError, match="dimensions cannot be served"):
        built(tmp_path, pooler_config=PoolerConfig(dimensions=16))


def test_the_files_say_how_vectors_are_compared(tmp_path: Path) -> None:
    heads.splade_v3(tmp_path)
    for name, similarity in (("cosine", "cosine"), (None, "dot")):
        edit_json(tmp_path / "config_sentence_transformers.json", similarity_fn_name=name)
        assert built(tmp_path, lambda _: None).model.similarity == similarity
    edit_json(tmp_path / "config_sentence_transformers.json", similarity_fn_name="euclidean")
    with pytest.raises(ConfigError, match="by euclidean; carpool compares them by dot or cosine"):
        built(tmp_path, lambda _: None)


@pytest.mark.parametrize("make", [heads.splade_v3, heads.opensearch_sparse])
def test_the_head_is_float32_and_the_backbone_what_it_is(
    tmp_path: Path, make: Callable[[Path], object]
) -> None:
    """Word vectors serve both, and are of two kinds then."""
    exact, rough = built(tmp_path, make), built(tmp_path, lambda _: None, dtype="bfloat16")
    assert rough.model.dtype == "bfloat16"
    weights = rough.runners[0]._backbone.module.parameters()
    assert {weight.dtype for weight in weights if weight.ndim > 1} == {torch.bfloat16}, "biases may be wider"
    ids = exact.tokenizer.encode([TEXTS[0]])
    one, other = answer(exact, ids, "embed")[0], answer(rough, ids, "embed")[0]
    assert float(torch.cosine_similarity(one, other, 0)) > 0.999


def test_weights_of_a_vocabulary_are_not_averaged_over_slices(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="are no average"):
        built(tmp_path, pooler_config=PoolerConfig(enable_chunked_processing=True))


def test_scores_are_products_as_sentence_transformers_has_them(tmp_path: Path) -> None:
    from sentence_transformers import SparseEncoder

    heads.splade_v3(tmp_path)
    query, documents = "rain in spain", ["the cat sat", "rain falls", "rain in spain"]
    model = SparseEncoder(str(tmp_path), device="cpu")
    truth = model.similarity(model.encode_query([query]), model.encode_document(documents))[0]
    llm = LLM(str(tmp_path), dtype="float32", cpu_workers=1)
    found = torch.tensor([answer.outputs.score for answer in llm.score(query, documents, use_tqdm=False)])
    llm.close()
    assert close(found, truth)
