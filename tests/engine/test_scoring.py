"""Scoring: which prompts a query and documents become, and which scores come of the answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import tiny_heads
from carpool.engine.chat import ChatTemplate
from carpool.engine.errors import EmptyInput, InputTooLong, InvalidInput, InvalidParameter, UnsupportedTask
from carpool.engine.framed import Framed
from carpool.engine.model_info import ModelInfo
from carpool.engine.params import Matryoshka
from carpool.engine.scoring import Plan, cosine, max_sim, plan

NO_TEMPLATE = None


def row(values: list[float]) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.array(values, np.float32)


def model(**facts: Any) -> ModelInfo:
    known: dict[str, Any] = {
        "root": "m",
        "architectures": (),
        "tasks": frozenset({"embed", "token_embed"}),
        "max_model_len": 64,
        "vocab_size": 100,
        "embedding_size": 4,
        "matryoshka": Matryoshka(4),
        "pooling": "cls",
        "normalize": True,
        "dtype": "float32",
        "device": "cpu",
        "workers": 1,
        "parameters": 0,
        "max_num_batched_tokens": 64,
        "max_num_seqs": 8,
        "attention": "",
    }
    return ModelInfo(**{**known, **facts})


BI = model()
LATE = model(default_task="token_embed")
CROSS = model(tasks=frozenset({"classify", "token_classify"}), labels=("LABEL_0",), default_task="classify")
JOINED = model(tasks=frozenset({"classify"}), labels=(None,), default_task="classify", pairs="concatenated")


@pytest.mark.parametrize(
    ("queries", "documents", "pairs"),
    [
        (["q"], ["d"], [("q", "d")]),
        (["q"], ["d", "e"], [("q", "d"), ("q", "e")]),
        (["q", "r"], ["d", "e"], [("q", "d"), ("r", "e")]),
    ],
)
def test_one_query_goes_with_every_document_and_many_with_their_own(
    queries: list[str], documents: list[str], pairs: list[tuple[str, str]]
) -> None:
    crossed = plan(CROSS, queries, documents, NO_TEMPLATE)
    assert (crossed.task, crossed.prompts) == ("classify", pairs)
    for who, task in ((BI, "embed"), (LATE, "token_embed")):
        apart = plan(who, queries, documents, NO_TEMPLATE)
        assert isinstance(apart, Plan)
        assert (apart.task, apart.prompts) == (task, [*queries, *documents])  # a shared query once
        assert [(apart.prompts[a], apart.prompts[b]) for a, b in apart.pairs] == pairs


@pytest.mark.parametrize("who", [BI, LATE, CROSS])
@pytest.mark.parametrize("sizes", [(2, 1), (2, 3), (3, 2)])
def test_other_shapes_are_refused(who: ModelInfo, sizes: tuple[int, int]) -> None:
    with pytest.raises(InvalidInput, match="Input lengths must be either 1:1, 1:N or N:N"):
        plan(who, ["q"] * sizes[0], ["d"] * sizes[1], NO_TEMPLATE)


def test_each_side_needs_a_text() -> None:
    with pytest.raises(EmptyInput, match="At least one text element must be given") as refused:
        plan(CROSS, [], ["d"], NO_TEMPLATE)
    assert refused.value.param == "queries"
    with pytest.raises(EmptyInput, match="At least one text_pair element must be given") as refused:
        plan(CROSS, ["q"], [], NO_TEMPLATE)
    assert refused.value.param == "documents"


@pytest.mark.parametrize("labels", [(), ("a", "b")])
def test_a_classifier_of_several_labels_scores_nothing(labels: tuple[str, ...]) -> None:
    who = model(tasks=frozenset({"classify"}), labels=labels)
    assert who.score_type is None
    with pytest.raises(UnsupportedTask, match="The model does not support Score API"):
        plan(who, ["q"], ["d"], NO_TEMPLATE)


def test_a_model_of_token_labels_scores_nothing() -> None:
    assert model(tasks=frozenset({"token_classify"}), labels=("a",)).score_type is None


def test_without_separators_query_and_document_are_one_text() -> None:
    assert plan(JOINED, ["a query "], ["a document"], NO_TEMPLATE).prompts == ["a query a document"]


def test_a_template_renders_pairs_and_says_what_must_stay_behind_them() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    chat = ChatTemplate(tokenizer, tiny_heads.SCORE_TEMPLATE)

    def framed(*texts: str) -> list[Framed]:
        return [Framed((text,), (0,), " =", specials=True) for text in texts]

    for who in (CROSS, JOINED):
        assert plan(who, ["q"], ["d", "e"], chat.for_pairs()).prompts == framed(
            "judge: q ? d =", "judge: q ? e ="
        )
        asked = plan(who, ["q"], ["d"], chat.for_pairs(), {"instruction": "is it so"})
        assert asked.prompts == framed("is it so: q ? d =")
    once = plan(CROSS, ["q"], ["d"], chat.replaced("{{ messages[0].content }}!").for_pairs())
    assert once.prompts == [Framed(("q!",), (0,), "!", specials=True)]
    with pytest.raises(InvalidInput, match="must not set tools"):
        plan(CROSS, ["q"], ["d"], chat.for_pairs(), {"tools": []})


# ── what is wrong with a text, and whose ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("who", "queries", "documents", "param", "field"),
    [
        (CROSS, ["q"], ["d"], "input", "documents"),
        (CROSS, ["q"], ["d", "e"], "input[1]", "documents[1]"),
        (BI, ["q"], ["d", "e"], "input[0]", "queries"),
        (BI, ["q"], ["d", "e"], "input[2]", "documents[1]"),
        (BI, ["q", "r"], ["d", "e"], "input[1]", "queries[1]"),
        (LATE, ["q"], ["d"], "input[1]", "documents"),
    ],
)
def test_an_error_names_the_text_to_blame(
    who: ModelInfo, queries: list[str], documents: list[str], param: str, field: str
) -> None:
    planned = plan(who, queries, documents, NO_TEMPLATE)
    assert planned.blame(InputTooLong("too long", param)).param == field


def test_an_error_about_something_else_is_left_alone() -> None:
    planned = plan(BI, ["q"], ["d"], NO_TEMPLATE)
    for param in (None, "dimensions"):
        assert planned.blame(InvalidParameter("no", param)).param == param


# ── scores ───────────────────────────────────────────────────────────────────────────────────────────────────

_rows = npst.arrays(
    np.float32,
    st.tuples(st.integers(1, 5), st.just(4)),
    elements=st.floats(-8, 8, width=32),
)


def test_a_cross_encoders_score_is_its_one_number() -> None:
    planned = plan(CROSS, ["q"], ["d", "e"], NO_TEMPLATE)
    assert planned.scores([row([0.25]), row([-3])]) == [0.25, -3.0]


@given(_rows, _rows)
def test_max_sim_sums_the_best_product_of_each_query_token(
    query: np.ndarray[Any, np.dtype[np.float32]], document: np.ndarray[Any, np.dtype[np.float32]]
) -> None:
    by_hand = sum(max(float(a @ b) for b in document) for a in query)
    assert max_sim(query, document) == pytest.approx(by_hand, abs=1e-3)


@given(_rows)
def test_cosine_is_of_directions_alone(rows: np.ndarray[Any, np.dtype[np.float32]]) -> None:
    a, b = rows[0], rows[-1]
    found = cosine(a, b)
    assert -1.0001 <= found <= 1.0001
    assert cosine(b, a) == found
    if np.linalg.norm(a) > 1e-3 and np.linalg.norm(b) > 1e-3:
        assert cosine(a * np.float32(7), b) == pytest.approx(found, abs=1e-5)
        exact = (a.astype(float) @ b) / (np.linalg.norm(a.astype(float)) * np.linalg.norm(b.astype(float)))
        assert found == pytest.approx(exact, abs=1e-5)


def test_a_vector_of_no_length_goes_with_nothing() -> None:
    zeros, ones = np.zeros(3, np.float32), np.ones(3, np.float32)
    assert [cosine(zeros, ones), cosine(ones, zeros), cosine(zeros, zeros)] == [0.0, 0.0, 0.0]


def test_scores_and_ids_come_back_pair_by_pair() -> None:
    planned = plan(BI, ["q"], ["d", "e"], NO_TEMPLATE)
    rows = [row([1, 0]), row([2, 0]), row([0, 3])]
    assert planned.scores(rows) == [1.0, 0.0]
    assert planned.by_pair([[1], [2, 3], [4]]) == [[1, 2, 3], [1, 4]]
    assert planned.by_pair([16, 0, 32]) == [16, 48]
    crossed = Plan.of("classify", ["qd"], [(0, 0)], lambda row, _: float(row[0]), ["documents"])
    assert crossed.by_pair([[1, 2]]) == [[1, 2]]
    assert crossed.by_pair([16]) == [16]


def test_equal_documents_run_once_score_the_same_and_are_counted_each() -> None:
    planned = plan(BI, ["q"], ["d", "e", "d"], NO_TEMPLATE)

    assert planned.prompts == ["q", "d", "e"]
    scores = planned.scores([row([1, 2]), row([2, 1]), row([0, 3])])
    assert scores[0] == scores[2]
    assert planned.prompt_tokens([[1], [2, 2], [3, 3, 3]]) == 1 + 2 + 3 + 2
