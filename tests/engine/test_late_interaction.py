"""Late interaction: what a checkpoint's files say of queries and documents, and the scores that come of it."""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from carpool import LLM
from carpool.engine.build import build
from carpool.engine.config import EngineConfig
from carpool.engine.errors import ConfigError, InvalidParameter
from carpool.engine.late_interaction import Expansion, LateInteraction, Role, Writing
from carpool.engine.models.probe import keeps_unseen
from carpool.engine.scoring import max_sim, mean_max_sim, plan
from carpool.kernels.layout import Layout
from fakes import FAKE_MODEL
from tiny import edit_json
from zoo import heads

PUNCTUATION = tuple(string.punctuation)


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_pylate_writes() -> None:
    read = LateInteraction.pylate(
        {
            "query_prefix": "[Q] ",
            "document_prefix": "",
            "query_length": 48,
            "document_length": 300,
            "attend_to_expansion_tokens": True,
            "skiplist_words": [",", "."],
        }
    )
    assert read == LateInteraction(
        {
            "query": Writing(("[Q] ", "[Q]"), "[Q] ", length=48, expansion=Expansion(48, attends=True)),
            "document": Writing(length=300, skipped=(",", ".")),
        }
    )


def test_what_pylate_leaves_out_is_what_it_takes_for_it() -> None:
    read = LateInteraction.pylate({})
    assert read.writings["query"] == Writing(("[Q] ", "[Q]"), length=32, expansion=Expansion(32))
    assert read.writings["document"] == Writing(("[D] ", "[D]"), length=180, skipped=PUNCTUATION)
    assert LateInteraction.pylate({"do_query_expansion": False}).writings["query"].expansion is None
    assert LateInteraction.pylate({"skiplist_words": []}).writings["document"].skipped == ()


def test_a_prompt_stands_behind_the_marker_once() -> None:
    read = LateInteraction.pylate(
        {"query_prefix": "[Q] ", "prompts": {"query": "[Q] find: ", "document": "doc: "}}
    )
    assert [read.writings[role].prompt for role in read.writings] == ["find: ", "doc: "]


def test_what_stanfords_colbert_writes() -> None:
    told = {"query_token_id": "[q]", "doc_token_id": "[d]", "query_maxlen": 20, "doc_maxlen": 50}
    read = LateInteraction.stanford({**told, "mask_punctuation": False, "attend_to_mask_tokens": True}, {})
    assert read.writings["query"] == Writing(
        ("[q]",), "[q]", length=20, expansion=Expansion(20, attends=True)
    )
    assert read.writings["document"] == Writing(("[d]",), "[d]", length=50)
    untold = LateInteraction.stanford({}, {"document_length": 512})
    assert untold.writings["query"] == Writing(("[unused0]",), length=32, expansion=Expansion(32))
    assert untold.writings["document"] == Writing(("[unused1]",), length=512, skipped=PUNCTUATION)


def test_what_jinas_colbert_does_not_write() -> None:
    read = LateInteraction.stanford({}, {"model_type": "jina_embeddings_v3"})
    assert read.writings["query"].markers == ("[QueryMarker]",)
    assert read.writings["query"].expansion == Expansion(32, attends=True)
    assert read.writings["document"].length == 8192


def test_what_sentence_transformers_writes() -> None:
    read = LateInteraction.sentence_transformers(
        {"prompts": {"query": "[Q] ", "document": None}, "similarity_fn_name": "meanmaxsim"},
        {
            "query_length": 64,
            "document_length": 300,
            "query_expansion": {"strategy": "min", "attend": False, "token": "[X]", "length": 24},
        },
        {"skiplist_words": ["."], "skiplist_tasks": ["query", "document"]},
    )
    expansion = Expansion(24, token="[X]", cuts=False)
    assert read == LateInteraction(
        {
            "query": Writing(prompt="[Q] ", length=64, expansion=expansion, skipped=(".",)),
            "document": Writing(length=300, skipped=(".",)),
        },
        mean=True,
    )
    assert LateInteraction.sentence_transformers({}, {}, {"skiplist_words": ["."]}).writings == {
        "query": Writing(),
        "document": Writing(skipped=(".",)),
    }
    with pytest.raises(ConfigError, match="vectors of an image only"):
        LateInteraction.sentence_transformers({}, {}, {"keep_only_token_ids": [7]})


# ── scores ───────────────────────────────────────────────────────────────────────────────────────────────────

QUERIES = [
    "rain in spain?",
    "the cat sat on a mat, and the ice cream was not able to be where the night falls in spain, and war and peace",
    "cat",
]
DOCUMENTS = ["the cat sat. on a mat!", "rain - falls in spain, (night and day)", "ice cream " * 30, "cat"]
EXPANDED = {"strategy": "fixed", "attend": False, "token": None, "length": 24}
AT_LEAST = {**EXPANDED, "strategy": "min"}
MAKES: dict[str, Callable[[Path], Any]] = {
    "stanford": heads.colbert_v2,
    "stanford-attends": partial(heads.colbert_v2, attend_to_mask_tokens=True),
    "pylate": heads.gte_moderncolbert,
    "pylate-attends": partial(heads.gte_moderncolbert, attend_to_expansion_tokens=True),
    "pylate-no-expansion": heads.mxbai_edge_colbert,
    "pylate-convolutions": heads.lfm2_colbert,
    "sentence-transformers": heads.multi_vector_encoder,
    "sentence-transformers-fixed": partial(heads.multi_vector_encoder, query_expansion=EXPANDED),
    "sentence-transformers-min": partial(
        heads.multi_vector_encoder, query_length=40, query_expansion=AT_LEAST
    ),
}


def scores(folder: Path, **options: Any) -> Tensor:
    llm = LLM(str(folder), dtype="float32", cpu_workers=1, **options)
    try:
        each = [llm.score(query, DOCUMENTS, use_tqdm=False) for query in QUERIES]
    finally:
        llm.close()
    return torch.tensor([[answer.outputs.score for answer in row] for row in each])


@pytest.mark.parametrize("name", MAKES)
def test_equals_sentence_transformers(tmp_path: Path, name: str) -> None:
    """Which reads PyLate's and Stanford's files as well."""
    from sentence_transformers import MultiVectorEncoder

    MAKES[name](tmp_path)
    model = MultiVectorEncoder(str(tmp_path), device="cpu", model_kwargs={"dtype": torch.float32})
    truth = model.similarity(model.encode_query(QUERIES), model.encode_document(DOCUMENTS))
    assert float((scores(tmp_path) - truth).abs().max()) <= 2e-5 * float(truth.abs().max())


def test_the_mean_is_taken_where_the_files_say_so(tmp_path: Path) -> None:
    heads.multi_vector_encoder(tmp_path, query_expansion=EXPANDED)
    whole = scores(tmp_path)
    edit_json(tmp_path / "config_sentence_transformers.json", similarity_fn_name="meanmaxsim")
    assert torch.allclose(scores(tmp_path), whole / 24, atol=1e-6)


def test_everything_the_files_say_matters(tmp_path: Path) -> None:
    """Planted: each of them taken away changes scores."""
    found = []
    told: list[dict[str, Any]] = [
        {},
        {"attend_to_mask_tokens": True},
        {"query_token_id": "[unused1]"},
        {"doc_maxlen": 180},
        {"query_maxlen": 20},
        {"mask_punctuation": False},
    ]
    for i, changes in enumerate(told):
        (tmp_path / str(i)).mkdir()
        heads.colbert_v2(tmp_path / str(i), **changes)
        found.append(scores(tmp_path / str(i)))
    assert all(float((other - found[0]).abs().max()) > 1e-2 for other in found[1:])


def test_overrides_win_over_the_files(tmp_path: Path) -> None:
    heads.colbert_v2(tmp_path, doc_maxlen=180)
    whole = scores(tmp_path)
    heads.colbert_v2(tmp_path)
    assert torch.equal(scores(tmp_path, hf_overrides={"document_length": 180}), whole)


def test_pooling_takes_texts_as_they_are(tmp_path: Path) -> None:
    heads.colbert_v2(tmp_path)
    llm = LLM(str(tmp_path), dtype="float32", cpu_workers=1)
    (answer,) = llm.encode("rain in spain", use_tqdm=False)
    llm.close()
    assert len(answer.outputs.data) == len(answer.prompt_token_ids) == 5


def test_texts_whose_role_is_told_are_written_in_it_and_make_the_score(tmp_path: Path) -> None:
    heads.colbert_v2(tmp_path)
    llm = LLM(str(tmp_path), dtype="float32", cpu_workers=1)
    asked, told = (
        llm.encode("rain, in spain!", use_tqdm=False, tokenization_kwargs={"input_type": role})[0]
        for role in ("query", "document")
    )
    (answer,) = llm.score("rain, in spain!", "rain, in spain!", use_tqdm=False)
    with pytest.raises(InvalidParameter, match="'query' or 'document', not 'passage'"):
        llm.encode("a", use_tqdm=False, tokenization_kwargs={"input_type": "passage"})
    with pytest.raises(InvalidParameter, match="texts, not with token ids"):
        llm.encode([[5]], use_tqdm=False, tokenization_kwargs={"input_type": "query"})
    llm.close()
    assert asked.prompt_token_ids + told.prompt_token_ids == answer.prompt_token_ids
    query, document = asked.outputs.data, told.outputs.data
    assert len(query) == 32
    assert len(document) == len(told.prompt_token_ids) - 2  # the comma, the exclamation mark
    assert float((query @ document.T).max(1).values.sum()) == pytest.approx(answer.outputs.score, abs=1e-5)


def test_a_model_that_looks_at_everything_is_not_expanded_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: attention that knows nothing of tokens that are not to be looked at."""
    heads.colbert_v2(tmp_path)
    config = EngineConfig(model=str(tmp_path), dtype="float32", cpu_workers=1)
    healthy = build(config)
    assert keeps_unseen(healthy.runners[0]._backbone, healthy.model.vocab_size)
    assert healthy.model.notices == ()
    monkeypatch.setattr(Layout, "partly_seen", lambda self: iter(()))
    deaf = build(config)
    assert not keeps_unseen(deaf.runners[0]._backbone, deaf.model.vocab_size)
    assert [notice for notice in deaf.model.notices if notice.startswith("Queries are not expanded")]
    assert deaf.tokenizer.scribes["query"].filler is None


def test_a_colbert_without_a_projection_is_refused(tmp_path: Path) -> None:
    heads.colbert_v2(tmp_path)
    heads.edit_weights(tmp_path, lambda own: {name: own[name] for name in own if name != "linear.weight"})
    with pytest.raises(ConfigError, match=r"neither a linear\.weight nor a Dense module"):
        build(EngineConfig(model=str(tmp_path)))


def test_what_the_model_is_known_by(tmp_path: Path) -> None:
    heads.colbert_v2(tmp_path)
    model = build(EngineConfig(model=str(tmp_path), dtype="float32", cpu_workers=1)).model
    assert (sorted(model.tasks), model.default_task) == (["token_embed"], "token_embed")
    assert (model.score_type, model.similarity, model.pooling) == ("late-interaction", "maxsim", "all")
    assert (model.embedding_size, model.normalize) == (16, True)
    assert {role: len(ids) for role, ids in model.roles.items()} == {"query": 0, "document": 6}


@pytest.mark.parametrize("name", ["ColBERTModernBertModel", "HF_ColBERT"])
def test_the_references_flag_changes_nothing(tmp_path: Path, name: str) -> None:
    heads.gte_moderncolbert(tmp_path)
    assert torch.equal(scores(tmp_path, hf_overrides={"architectures": [name]}), scores(tmp_path))


def test_of_a_document_that_nothing_is_left_of_nothing_can_be_said() -> None:
    query = np.ones((3, 4), np.float32)
    assert [measure(query, np.zeros((0, 4), np.float32)) for measure in (max_sim, mean_max_sim)] == [0.0, 0.0]
    assert mean_max_sim(query, query) == max_sim(query, query) / 3 == 4.0


def test_a_query_and_a_document_of_one_text_are_two_prompts() -> None:
    roles: dict[Role, frozenset[int]] = {"query": frozenset(), "document": frozenset({7})}
    model = replace(FAKE_MODEL, default_task="token_embed", roles=roles)
    planned = plan(model, ["a"], ["a", "b", "a"], None)
    assert planned.prompts == [("query", "a"), ("document", "a"), ("document", "b")]
    rows = [np.eye(3, dtype=np.float32)[:2], np.eye(3, dtype=np.float32), np.eye(3, dtype=np.float32)[:1]]
    ids = [[7, 8], [7, 8, 9], [8]]
    assert planned.scores(rows, ids) == [
        1.0,
        1.0,
        1.0,
    ]  # the query's first row would meet the document's, of 7
