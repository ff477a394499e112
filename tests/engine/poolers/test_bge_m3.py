"""BGE-M3: a vector, a vector a token and a weight a token, of one forward pass."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from carpool import LLM
from carpool.engine.batch import Batch
from carpool.engine.build import Parts, build
from carpool.engine.config import EngineConfig, PoolerConfig
from carpool.engine.errors import ConfigError, UnsupportedTask
from carpool.engine.models.backbone import Backbone
from carpool.engine.packing import PackedBatch
from carpool.engine.params import PoolingParams, Task
from carpool.engine.sequence import Sequence
from head_oracle import answer, close
from tiny import edit_json
from zoo import heads

TEXT = "rain in spain, rain in spain falls"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bge-m3")
    heads.bge_m3(folder)
    return folder


@pytest.fixture
def own(folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def made(folder: Path, **options: Any) -> Parts:
    return build(EngineConfig(model=str(folder), dtype="float32", cpu_workers=1, **options))


@pytest.fixture(scope="module")
def parts(folder: Path) -> Parts:
    return made(folder)


def ids_of(parts: Parts, text: str = TEXT, specials: bool = True) -> list[int]:
    (ids,) = parts.tokenizer.encode([text], specials)
    return ids


def test_is_known_by_its_files(parts: Parts) -> None:
    assert parts.model.tasks == {"embed", "token_embed", "sparse_embed", "token_classify"}
    assert (parts.model.default_task, parts.model.score_type, parts.model.labels) == (
        "embed",
        "bi-encoder",
        (),
    )
    assert (parts.model.pooling, parts.model.similarity) == ("cls", "cosine")


def test_the_references_flag_changes_nothing(parts: Parts, folder: Path) -> None:
    named = made(folder, hf_overrides={"architectures": ["BgeM3EmbeddingModel"]})
    ids = ids_of(parts)
    for task in parts.model.tasks:
        assert torch.equal(*(answer(each, [ids], task)[0] for each in (parts, named)))


@pytest.mark.parametrize(("specials", "vectors", "weights"), [(True, -1, -2), (False, 0, 0)])
def test_marks_are_left_out_where_they_are(parts: Parts, specials: bool, vectors: int, weights: int) -> None:
    """The first has no vector, neither has a weight; without them every token of the text has both."""
    ids = ids_of(parts, specials=specials)
    (vectors_,), (weights_,) = (answer(parts, [ids], task) for task in ("token_embed", "token_classify"))
    assert vectors_.shape == (len(ids) + vectors, 32)
    assert weights_.shape == (len(ids) + weights,)


def test_a_text_of_nothing_but_marks_weighs_nothing(parts: Parts) -> None:
    ids = ids_of(parts, "")
    assert len(ids) == 2
    shapes: dict[Task, tuple[int, ...]] = {
        "token_embed": (1, 32),
        "token_classify": (0,),
        "sparse_embed": (0, 2),
    }
    assert {task: tuple(answer(parts, [ids], task)[0].shape) for task in shapes} == shapes


def test_lexical_weights_are_those_of_its_own_library(parts: Parts) -> None:
    """Of each token the largest, without <s>, <pad>, </s> and <unk>, and only where there is any."""
    ids = ids_of(parts, TEXT + " 雨 ☂")
    assert 3 in ids, "the text has an unknown token"
    (weights,), (sparse,) = (answer(parts, [ids], task) for task in ("token_classify", "sparse_embed"))
    expected: dict[int, float] = {}
    for token, weight in zip(ids[1:-1], weights.tolist(), strict=True):
        if token > 3 and weight > 0:
            expected[token] = max(weight, expected.get(token, 0.0))
    assert {int(token): weight for token, weight in sparse.tolist()} == pytest.approx(expected)
    assert len(expected) < len(set(ids[1:-1])), "some tokens weigh nothing"


def test_weights_can_be_had_without_the_relu(parts: Parts) -> None:
    ids = ids_of(parts)
    plain, raw = (
        answer(parts, [ids], "token_classify", params)[0]
        for params in (None, PoolingParams(use_activation=False))
    )
    assert (raw < 0).any()
    assert close(plain, raw.relu())


def run_of(parts: Parts, tasks: tuple[Task, ...], texts: list[list[int]]) -> tuple[list[Tensor], list[int]]:
    """The results of all tasks for each text, and how many tokens each forward pass had."""
    sequences = [
        Sequence(0, i * len(tasks) + t, ids, PoolingParams(), task)
        for i, ids in enumerate(texts)
        for t, task in enumerate(tasks)
    ]
    passes: list[int] = []
    forward = Backbone.forward

    def counted(self: Backbone, batch: PackedBatch) -> Tensor:
        passes.append(batch.num_tokens)
        return forward(self, batch)

    batch = Batch.of(sequences)
    with mock.patch.object(Backbone, "forward", counted):
        rows = parts.runners[0].run(batch)
    results: dict[int, Tensor] = {}
    for seq, row in zip(batch.sequences, rows, strict=True):
        assert isinstance(row, np.ndarray), row
        results[seq.index] = torch.from_numpy(row)
    return [results[i] for i in range(len(sequences))], passes


def test_all_of_it_is_one_forward_pass(parts: Parts) -> None:
    tasks: tuple[Task, ...] = ("token_classify", "embed", "sparse_embed", "token_embed")
    texts = [ids_of(parts), ids_of(parts, "the cat sat"), ids_of(parts, "a mat")]
    together, passes = run_of(parts, tasks, texts)
    assert passes == [sum(map(len, texts))]
    for i, ours in enumerate(together):
        assert close(ours, answer(parts, [texts[i // len(tasks)]], tasks[i % len(tasks)])[0])


def test_late_interaction_goes_through_its_own_head(folder: Path) -> None:
    late = made(folder, pooler_config=PoolerConfig(task="token_embed"))
    assert late.model.score_type == "late-interaction"
    assert late.model.roles == {}


@pytest.mark.parametrize("name", ["sparse_linear.pt", "colbert_linear.pt"])
@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda path: path.write_bytes(b"no pickle"), "cannot be read"),
        (lambda path: torch.save({"weight": torch.zeros(1, 32)}, path), "cannot be read: KeyError"),
        (
            lambda path: torch.save({"weight": torch.zeros(1, 9), "bias": torch.zeros(1)}, path),
            r"shape \(1, 9\)",
        ),
        (lambda path: torch.save(Path("a pickle of any class"), path), "cannot be read: UnpicklingError"),
    ],
)
def test_a_head_that_cannot_be_is_refused(own: Path, name: str, damage: Any, sentence: str) -> None:
    damage(own / name)
    with pytest.raises(ConfigError, match=f"BGE-M3's {name} .*{sentence}"):
        made(own)


def test_without_its_heads_it_is_an_embedding_model_or_refused(own: Path) -> None:
    (own / "sparse_linear.pt").unlink()
    without = made(own).model
    assert without.tasks == {"embed", "token_embed"}
    assert any("brings a head (colbert_linear.pt)" in sentence for sentence in without.notices)
    with pytest.raises(ConfigError, match=r"BGE-M3's sparse_linear.pt cannot be read: FileNotFoundError"):
        made(own, hf_overrides={"architectures": ["BgeM3EmbeddingModel"]})


def test_a_classifier_that_lies_beside_such_files_is_a_classifier(own: Path) -> None:
    edit_json(own / "config.json", architectures=["XLMRobertaForSequenceClassification"])
    with pytest.raises(ConfigError, match=r"classifier\.dense"):  # which is what it is looked for
        made(own)


def test_several_tasks_of_a_request_cost_one_forward_pass(folder: Path, parts: Parts) -> None:
    """Through scheduler and workers; each result is what it is when it is asked for alone."""
    texts = [TEXT, "the cat sat", "a mat " * 20]
    llm = LLM(str(folder), dtype="float32", cpu_workers=2)
    passes: list[int] = []
    forward = Backbone.forward

    def counted(self: Backbone, batch: PackedBatch) -> Tensor:
        passes.append(batch.num_tokens)
        return forward(self, batch)

    with mock.patch.object(Backbone, "forward", counted):
        answers = llm.encode(texts, pooling_task="embed&token_embed&token_classify&sparse_embed&embed")
    with pytest.raises(UnsupportedTask, match="Classification API"):
        llm.encode(texts, pooling_task="embed&classify")
    llm.close()
    assert sum(passes) == sum(len(answer.prompt_token_ids) for answer in answers)
    tasks: tuple[Task, ...] = ("embed", "token_embed", "token_classify", "sparse_embed")
    for asked in answers:
        assert tuple(asked.outputs.data) == tasks
        for task in tasks:
            assert close(asked.outputs.data[task], answer(parts, [asked.prompt_token_ids], task)[0])
