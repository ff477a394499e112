"""A listwise reranker: its prompt, its blocks and its scores are those of the code it was published with.

That code's procedure is written out here by hand, with transformers' tokenizer and CausalLM and numpy; nothing is taken
from ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import tiny
import tiny_heads
from carpool.engine.build import build
from carpool.engine.config import EngineConfig
from carpool.engine.errors import ConfigError, InferenceFailed, InputTooLong, InvalidInput, InvalidParameter
from carpool.engine.framed import Framed
from carpool.engine.listwise import ListPlan, Listwise, blocks, list_scores
from carpool.engine.llm import LLM
from carpool.engine.tokenizer import Tokenizer
from zoo import rerankers as zoo

Ids = list[int]
Answers = tuple[list[Ids], list[float]]
QUERY = "where is the cat?"
DOCUMENTS = [
    "the cat sat on a mat.",
    "rain in spain falls on the mat\n",
    "\n ice cream ",  # which begins with what the line break before it would melt with
    "",
    "naïve Ünïcode 雨 ☂",
    "a cat <|im_end|> and {document} and {0}",
]
INSTRUCTION = "Find what the cat did"
LONG = "the cat sat on a mat, and rain fell in spain. " * 12


# ── the published code, by hand ──────────────────────────────────────────────────────────────────────────────


class Published:
    """`rerank` as it was published, but for its order: scores and the ids of their prompts, a document each."""

    def __init__(self, folder: Path, truth: zoo.MarkReference) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self._truth = truth

    def of(self, text: str) -> Ids:
        ids: Ids = self.tokenizer(text)["input_ids"]
        return ids

    def prompt(self, query: str, documents: list[str], instruction: str = "") -> Ids:
        for mark in ("<|rerank_token|>", "<|embed_token|>"):
            query = query.replace(mark, "")
            documents = [document.replace(mark, "") for document in documents]
        text = (
            "<|im_start|>system\nYou are a search relevance expert who can determine a ranking of the passages based "
            "on how relevant they are to the query. If the query is a question, how relevant a passage is depends on "
            "how well it answers the question. If not, try to analyze the intent of the query and assess how well "
            "each passage satisfies the intent. If an instruction is provided, you should follow the instruction when "
            "determining the ranking.<|im_end|>\n<|im_start|>user\n"
            f"I will provide you with {len(documents)} passages, each indicated by a numerical identifier. "
            f"Rank the passages based on their relevance to query: {query}\n"
        )
        if instruction:
            text += f"<instruct>\n{instruction}\n</instruct>\n"
        passages = [
            f'<passage id="{i}">\n{document}<|embed_token|>\n</passage>'
            for i, document in enumerate(documents)
        ]
        text += "\n".join(passages) + "\n"
        text += f"<query>\n{query}<|rerank_token|>\n</query>"
        return self.of(text + "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")

    def dealt(self, query: str, documents: list[str], max_length: int, longest: int) -> list[list[str]]:
        """The documents of each prompt."""
        free = max_length - 2 * len(self.of(query))
        found: list[list[str]] = []
        block: list[str] = []
        left = free
        for document in documents:
            block.append(document)
            left -= len(self.of(document))
            if len(block) >= 125 or left <= longest:
                found.append(block)
                block, left = [], free
        return [*found, block] if block else found

    def rerank(
        self,
        query: str,
        documents: list[str],
        instruction: str = "",
        *,
        max_length: int = 16384,
        longest: int = 2048,
    ) -> Answers:
        ids, queries, told, weights = [], [], [], []
        for block in self.dealt(query, documents, max_length, longest):
            prompt = self.prompt(query, block, instruction)
            *own, asked = self._truth("token_embed", prompt).numpy()
            assert len(own) == len(block)
            ids += [prompt] * len(block)
            queries.append(asked)
            told += own
            weights.append(max((1 + cosine(asked, one)) / 2 for one in own))
        query_vector = np.average(queries, axis=0, weights=weights)
        return ids, [cosine(query_vector, one) for one in told]


def cosine(a: Any, b: Any) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


class Served:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.published = Published(folder, zoo.jina_v3(folder))
        self.llm = LLM(str(folder), dtype="float32", cpu_workers=1)

    def again(self, **options: Any) -> LLM:
        return LLM(str(self.folder), dtype="float32", cpu_workers=1, **options)


@pytest.fixture(scope="module")
def jina(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(tmp_path_factory.mktemp("jina"))
    yield served
    served.llm.close()


def found(llm: LLM, query: str | list[str], documents: str | list[str], **options: Any) -> Answers:
    answers = llm.score(query, documents, use_tqdm=False, **options)
    return [answer.prompt_token_ids for answer in answers], [answer.outputs.score for answer in answers]


def same(ours: Answers, theirs: Answers) -> bool:
    return ours[0] == theirs[0] and ours[1] == pytest.approx(theirs[1], abs=2e-5)


# ── a list ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_ids_and_scores_are_the_published_codes_in_the_documents_order(jina: Served) -> None:
    ours = found(jina.llm, QUERY, DOCUMENTS)
    assert same(ours, jina.published.rerank(QUERY, DOCUMENTS))
    assert len(set(map(tuple, ours[0]))) == 1  # one prompt
    assert len(set(ours[1])) == len(DOCUMENTS)
    assert all(-1 <= score <= 1 for score in ours[1])


@pytest.mark.parametrize("document", ["the cat sat", ""])
def test_one_document_is_a_list_too(document: str, jina: Served) -> None:
    assert same(found(jina.llm, QUERY, document), jina.published.rerank(QUERY, [document]))


def test_an_empty_query_is_one(jina: Served) -> None:
    assert same(found(jina.llm, "", ["a", ""]), jina.published.rerank("", ["a", ""]))


def test_scores_depend_on_the_company_and_the_order_and_equal_documents_do_not_tie(jina: Served) -> None:
    """As the model reads them: one after the other, each knowing those before it."""
    _, (first, second) = found(jina.llm, QUERY, ["the cat", "the cat"])
    assert first != pytest.approx(second, abs=1e-4)
    assert same(found(jina.llm, QUERY, ["the cat", "the cat"]), jina.published.rerank(QUERY, ["the cat"] * 2))
    _, (alone,) = found(jina.llm, QUERY, ["the cat"])
    assert alone != pytest.approx(first, abs=1e-4)


def test_many_queries_have_a_prompt_each_with_their_own_document(jina: Served) -> None:
    queries, documents = [QUERY, "rain?", QUERY], ["the cat", "spain", "the cat"]
    ours = found(jina.llm, queries, documents)
    pairs = [
        jina.published.rerank(query, [document]) for query, document in zip(queries, documents, strict=True)
    ]
    assert same(ours, ([ids for (ids,), _ in pairs], [score for _, (score,) in pairs]))
    assert ours[1][0] == ours[1][2]


@pytest.mark.parametrize("key", ["instruction", "instruct"])
def test_an_instruction_comes_with_a_request(key: str, jina: Served) -> None:
    told = found(jina.llm, QUERY, DOCUMENTS, chat_template_kwargs={key: INSTRUCTION})
    assert same(told, jina.published.rerank(QUERY, DOCUMENTS, INSTRUCTION))
    assert told[0] != found(jina.llm, QUERY, DOCUMENTS)[0]
    with pytest.raises(InvalidInput, match="instruction must be a text"):
        found(jina.llm, QUERY, DOCUMENTS, chat_template_kwargs={key: 7})


def test_marks_in_the_texts_are_taken_out(jina: Served) -> None:
    query, document = "where<|rerank_token|> is the cat?", "the cat<|embed_token|> sat<|rerank_token|>"
    ours = found(jina.llm, query, [document, "a"], chat_template_kwargs={"instruction": "<|embed_token|>do"})
    assert same(ours, jina.published.rerank("where is the cat?", ["the cat sat", "a"], "do"))


@pytest.mark.parametrize(
    "forged", ["<|embed_<|embed_token|>token|>", "<|rerank_<|embed_<|rerank_token|>token|>token|>"]
)
def test_a_mark_made_of_what_is_left_is_taken_out_as_well(forged: str, jina: Served) -> None:
    """The published code takes each out once, and would then count a document too many."""
    assert same(found(jina.llm, QUERY, [f"a{forged}", "b"]), jina.published.rerank(QUERY, ["a", "b"]))


# ── blocks ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_more_than_125_documents_are_dealt_out_and_their_queries_averaged(jina: Served) -> None:
    documents = [f"the cat {i}" for i in range(130)]
    ours = found(jina.llm, QUERY, documents)
    assert same(ours, jina.published.rerank(QUERY, documents))
    assert [len(ours[0][i]) for i in (0, 124)] == [len(ours[0][1])] * 2
    assert ours[0][124] != ours[0][125] == ours[0][129]


def test_long_documents_are_dealt_out_by_their_tokens(jina: Served) -> None:
    """As many as leave room for one of the longest that may come."""
    documents = [f"{i} " + LONG[: 300 + 50 * (i % 6)] for i in range(24)]
    llm = jina.again(max_model_len=4096, hf_overrides={"max_doc_length": 2000})
    expected = jina.published.rerank(QUERY, documents, max_length=4096, longest=2000)
    assert same(found(llm, QUERY, documents), expected)
    assert len(set(map(tuple, expected[0]))) > 1
    llm.close()


def test_a_prompt_is_no_longer_than_was_asked_for_and_no_document_is_lost(jina: Served) -> None:
    around = len(jina.published.prompt(QUERY, []))
    documents = [f"{i} " + LONG[: 50 + 13 * i] for i in range(9)]
    ids, scores = found(jina.llm, QUERY, documents, truncate_prompt_tokens=around + 400)
    assert max(map(len, ids)) <= around + 400
    assert len(scores) == len(documents)
    dealt = list(dict.fromkeys(map(tuple, ids)))
    assert 1 < len(dealt) < len(documents)
    told = [jina.published.tokenizer.decode(prompt) for prompt in dealt]
    assert [sum(document in prompt for prompt in told) for document in documents] == [1] * len(documents)


def test_a_query_and_a_document_are_cut_to_what_the_published_code_reads(jina: Served) -> None:
    llm = jina.again(hf_overrides={"max_query_length": 9, "max_doc_length": 21})
    query, document = "where is the cat, and where is the rain?", LONG
    short = [
        jina.published.tokenizer.decode(jina.published.of(text)[:n])
        for text, n in ((query, 9), (document, 21))
    ]
    expected = jina.published.rerank(short[0], [short[1], "a"], longest=21)
    assert same(found(llm, query, [document, "a"]), expected)
    llm.close()


def test_a_document_alone_is_cut_to_the_prompt_that_it_has(jina: Served) -> None:
    room = len(jina.published.prompt(QUERY, [""])) + 30
    (ids,), _ = found(jina.llm, QUERY, [LONG], truncate_prompt_tokens=room)
    assert room - 10 <= len(ids) <= room


@pytest.mark.parametrize("queries", [1, 3])
def test_long_texts_are_cut_as_if_they_had_been_read_to_the_end_and_are_not(
    queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick, whole = (Tokenizer(tiny.byte_bpe(), max_model_len=2048, vocab_size=1000) for _ in range(2))
    monkeypatch.setattr(whole, "_begun", lambda texts, _, read: (texts, read(texts)))
    read: list[str] = []
    encode = quick.encode

    def noted(texts: list[str], add_special_tokens: bool = True) -> list[list[int]]:
        read.extend(texts)
        return encode(texts, add_special_tokens)

    monkeypatch.setattr(quick, "encode", noted)
    asked = [LONG * (i + 40) for i in range(queries)]
    documents = [LONG * 100, "the cat", "rain\n" * 9000]
    plans = [
        Listwise(tokenizer=tokenizer, longest=2048, max_query=9 + queries, max_document=200).plan(
            asked, documents
        )
        for tokenizer in (quick, whole)
    ]
    assert plans[0] == plans[1]
    assert max(map(len, read)) < 4000


def test_no_room_for_a_document_is_refused(jina: Served) -> None:
    with pytest.raises(InvalidParameter, match="leaves no room for a query and a document") as refused:
        found(jina.llm, QUERY, ["a"], truncate_prompt_tokens=20)
    assert refused.value.param == "truncate_prompt_tokens"
    small = jina.again(max_model_len=len(jina.published.prompt(QUERY, [])))
    with pytest.raises(InputTooLong, match="the query and the prompt around it leave no room") as too_long:
        found(small, QUERY, ["a"])
    assert too_long.value.param == "query"
    small.close()


@pytest.mark.parametrize(("query", "documents", "param"), [
    ("a\ud800", ["a"], "queries"),
    ("a", ["b", "c\ud800"], "documents[1]"),
])  # fmt: skip
def test_what_is_not_text_is_named(query: str, documents: list[str], param: str, jina: Served) -> None:
    with pytest.raises(InvalidInput, match="lone surrogate") as refused:
        found(jina.llm, query, documents)
    assert refused.value.param == param


lengths = st.lists(st.integers(0, 3000), max_size=300)


@given(lengths, st.integers(5000, 140_000))
def test_blocks_are_the_published_rules(lengths: list[int], capacity: int) -> None:
    expected, block, left = [], [], capacity
    for i, length in enumerate(lengths):
        block.append(i)
        left -= length
        if len(block) >= 125 or left <= 2048:
            expected.append(block)
            block, left = [], capacity
    expected += [block] if block else []
    assert [list(own) for own in blocks(lengths, capacity, 2048, 10**9)] == expected


@given(st.lists(st.integers(0, 90), max_size=60), st.integers(0, 10), st.integers(100, 400))
def test_blocks_hold_each_document_once_in_order_and_fit(lengths: list[int], around: int, free: int) -> None:
    shared = blocks(lengths, free, 90, free, around)
    assert [i for block in shared for i in block] == list(range(len(lengths)))
    assert all(block and sum(lengths[i] + around for i in block) <= free for block in shared)


def test_half_of_a_small_prompt_is_filled_before_another_is_begun() -> None:
    assert list(map(len, blocks([10] * 10, 100, 2048, 100))) == [5, 5]


# ── scores of vectors ────────────────────────────────────────────────────────────────────────────────────────


def rows(*vectors: list[float]) -> Any:
    return np.array(vectors, np.float32)


def test_blocks_weigh_as_much_as_their_best_document() -> None:
    first = rows([1, 0], [0, 1], [1, 0])  # the query found its like: weight 1
    second = rows([0, 1], [1, 0])  # nothing of the kind: weight 1/2
    query = np.array([1, 0]) * 1.0 + np.array([1, 0]) * 0.5
    assert list_scores([first, second]) == pytest.approx([cosine(query, v) for v in ([1, 0], [0, 1], [0, 1])])
    other = rows([0, 1], [0, 2])  # vectors are averaged as they are, with their lengths
    merged = (np.array([1, 0]) + np.array([0, 2])) / 2
    expected = [cosine(merged, v) for v in ([1, 0], [0, 1], [0, 1])]
    assert list_scores([first, other]) == pytest.approx(expected)


def test_opposites_and_vectors_of_no_length_have_scores() -> None:
    assert list_scores([rows([-1, 0], [1, 0])]) == [-1.0]
    assert list_scores([rows([-1, 0], [1, 0]), rows([-2, 0], [1, 0])]) == [-1.0, -1.0]
    assert list_scores([rows([0, 0], [1, 0])]) == [0.0]


def test_a_prompt_with_another_number_of_vectors_is_no_answer() -> None:
    plan = ListPlan([Framed(("p",), ())], [2], one_query=True)
    assert len(plan.scores([rows([1, 0], [1, 0], [1, 0])])) == 2
    with pytest.raises(InferenceFailed, match="another number of vectors"):
        plan.scores([rows([1, 0], [1, 0])])


def test_pairs_are_framed_one_by_one(jina: Served) -> None:
    framer = Listwise(tokenizer=build_tokenizer(jina.folder), longest=4096)
    framed = framer.frames([("q", "d"), ("r", "e")], {"instruction": "i"})
    assert ["".join(one.parts) for one in framed] == [
        jina.published.tokenizer.decode(jina.published.prompt(query, [document], "i"))
        for query, document in (("q", "d"), ("r", "e"))
    ]


def build_tokenizer(folder: Path) -> Any:
    return build(EngineConfig(model=str(folder), dtype="float32", cpu_workers=1)).tokenizer


# ── at start ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_said_of_it(jina: Served) -> None:
    info = jina.llm.model_info
    assert (info.score_type, info.default_task) == ("listwise", "token_embed")
    assert info.tasks == {"token_embed"}
    assert (info.pooling, info.normalize, info.embedding_size) == ("marks", False, 24)
    assert (info.score_template, info.notices) == (True, ())


def test_a_template_in_place_of_its_prompt_is_refused(jina: Served) -> None:
    with pytest.raises(ConfigError, match="leave --chat-template out"):
        build(EngineConfig(model=str(jina.folder), chat_template=tiny_heads.SCORE_TEMPLATE))
    with pytest.raises(InvalidParameter, match="no template can stand") as refused:
        found(jina.llm, QUERY, ["a"], chat_template=tiny_heads.SCORE_TEMPLATE)
    assert refused.value.param == "chat_template"


def test_without_its_projector_or_its_marks_it_is_refused(tmp_path: Path) -> None:
    zoo.jina_v3(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lacking = {name: weight for name, weight in weights.items() if name != "projector.2.weight"}
    save_file(lacking, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks projector\.0\.weight or projector\.2\.weight"):
        build(EngineConfig(model=str(tmp_path)))
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    zoo.qwen_words().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match=r"'<\|embed_token\|>' is not one token"):
        build(EngineConfig(model=str(tmp_path)))


def test_windows_are_those_of_its_second_edition_which_reads_more(tmp_path: Path) -> None:
    zoo.jina_v3_5(tmp_path)
    framer = build(EngineConfig(model=str(tmp_path), dtype="float32", cpu_workers=1)).framer
    assert isinstance(framer, Listwise)
    assert (framer.max_query, framer.max_document) == (1024, 8192)
