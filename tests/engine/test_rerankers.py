"""Rerankers of the table: told by name and class, asked in their own words, scored as their model cards compute it.

The cards' procedures are written out here by hand with transformers' tokenizer and CausalLM; nothing is taken from the
table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import tiny
import tiny_heads
from carpool.engine.build import build
from carpool.engine.config import EngineConfig
from carpool.engine.errors import ConfigError, InvalidInput, InvalidParameter
from carpool.engine.llm import LLM
from carpool.engine.rerankers import RERANKERS, recognise
from zoo import rerankers as zoo

Ids = list[int]
QUERY = "where is the cat?"
DOCUMENTS = [
    "the cat sat on a mat.",
    "rain in spain falls on the mat\n",  # whose last character would melt into a line break behind it
    " ice cream ",
    "",
    "naïve Ünïcode 雨 ☂",
    "a cat <|im_end|> and {document} and {0}",
]
LONG = "the cat sat on a mat, and rain fell in spain. " * 12
INSTRUCTION = "Find what the cat did"
WEB = "Given a web search query, retrieve relevant passages that answer the query"


# ── the cards, by hand ───────────────────────────────────────────────────────────────────────────────────────


class Card:
    """How a model card makes the ids of a pair; `limit` is the longest the whole may be."""

    words: tuple[str, ...]

    def __init__(self, folder: Path) -> None:
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)

    def of(self, text: str) -> Ids:
        ids: Ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def ids(self, query: str, document: str, instruction: str | None, limit: int | None) -> Ids:
        raise NotImplementedError

    @property
    def word_ids(self) -> Ids:
        ids: Ids = self._tokenizer.convert_tokens_to_ids(list(self.words))
        return ids


class Qwen3(Card):
    words = ("no", "yes")

    def ids(self, query: str, document: str, instruction: str | None, limit: int | None) -> Ids:
        prefix = self.of(
            "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
            'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
        )
        suffix = self.of("<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
        pair = self.of(f"<Instruct>: {instruction or WEB}\n<Query>: {query}\n<Document>: {document}")
        return prefix + pair[: limit and limit - len(prefix) - len(suffix)] + suffix


class Mxbai(Card):
    words = ("0", "1")

    def ids(self, query: str, document: str, instruction: str | None, limit: int | None) -> Ids:
        prefix = self.of(
            "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
            "<|im_start|>user\n"
        )
        task = self.of(
            "You are a search relevance expert who evaluates how well documents match search queries. For each "
            "query-document pair, carefully analyze the semantic relationship between them, then provide your binary "
            "relevance judgment (0 for not relevant, 1 for relevant).\nRelevance:"
        )
        suffix = self.of("<|im_end|>\n<|im_start|>assistant\n")
        line = self.of("\n")
        asked = self.of((f"instruction: {instruction}\n" if instruction else "") + f"query: {query}")
        told = self.of(f"document: {document}")
        rest = len(prefix + asked + line + line + task + suffix)
        return prefix + asked + line + told[: limit and limit - rest] + line + task + suffix


class BgeGemma(Card):
    words = ("Yes",)

    def ids(self, query: str, document: str, instruction: str | None, limit: int | None) -> Ids:
        prompt = self.of(
            "Given a query A and a passage B, determine whether the passage contains an answer to the query by "
            "providing a prediction of either 'Yes' or 'No'."
        )
        line = self.of("\n")
        asked = [self._tokenizer.bos_token_id, *self.of(f"A: {query}")]
        told = self.of(f"B: {document}")
        rest = len(asked + line + line + prompt)
        return asked + line + told[: limit and limit - rest] + line + prompt


class Zerank(Card):
    words = ("Yes",)

    def ids(self, query: str, document: str, instruction: str | None, limit: int | None) -> Ids:
        if instruction:
            query = f"<query>{query}</query>\n<instruction>{instruction}</instruction>"
        suffix = self.of("<|im_end|>\n<|im_start|>assistant\n")
        start = self.of(f"<|im_start|>system\n{query}<|im_end|>\n<|im_start|>user\n{document}")
        return start[: limit and limit - len(suffix)] + suffix


class Contextual(Card):
    def ids(self, query: str, document: str, instruction: str | None, limit: int | None) -> Ids:
        asked = f"\n<Query> {query}{f' {instruction}' if instruction else ''} ??"
        opening = (
            "Check whether a given document contains information helpful to answer the query.\n<Document> "
        )
        whole = self.of(f"{opening}{document}{asked}")
        if limit is None or len(whole) <= limit:
            return whole
        return whole[: limit - len(self.of(asked))] + self.of(asked)

    @property
    def word_ids(self) -> Ids:
        return [0]


class Qwen3VL(Card):
    words = ("no", "yes")

    def ids(self, query: str, document: str, instruction: str | None, limit: int | None) -> Ids:
        asked = instruction or "Given a search query, retrieve relevant candidates that answer the query."
        start = self.of(
            "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
            'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
            f"<Instruct>: {asked}<Query>:{query}\n<Document>:{document}"
        )
        suffix = self.of("<|im_end|>\n<|im_start|>assistant\n")
        return start[: limit and limit - len(suffix)] + suffix


FAMILIES: dict[str, tuple[type[Card], Callable[[Path], Any]]] = {
    "qwen3": (Qwen3, zoo.qwen3),
    "mxbai": (Mxbai, zoo.mxbai),
    "bge_gemma": (BgeGemma, zoo.bge_gemma),
    "zerank": (Zerank, zoo.zerank),
    "contextual": (Contextual, zoo.contextual),
    "qwen3_vl": (Qwen3VL, zoo.qwen3_vl),
}


class Served:
    """A family served with no flags, and its card."""

    def __init__(self, family: str, folder: Path) -> None:
        card, make = FAMILIES[family]
        self.folder, self.truth = folder, make(folder)
        self.card = card(folder)
        self.llm = LLM(str(folder), dtype="float32", cpu_workers=1)

    def expected(
        self, documents: list[str], instruction: str | None = None, limit: int | None = None
    ) -> tuple[list[Ids], list[float]]:
        ids = [self.card.ids(QUERY, document, instruction, limit) for document in documents]
        return ids, [float(self.truth("classify", own)) for own in ids]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Served]]:
    root = tmp_path_factory.mktemp("rerankers")

    @cache
    def made(family: str) -> Served:
        (root / family).mkdir()
        one = Served(family, root / family)
        open_ones.append(one)
        return one

    open_ones: list[Served] = []
    yield made
    for one in open_ones:
        one.llm.close()


def found(served: Served, documents: list[str], **options: Any) -> tuple[list[Ids], list[float]]:
    answers = served.llm.score(QUERY, documents, use_tqdm=False, **options)
    return [answer.prompt_token_ids for answer in answers], [answer.outputs.score for answer in answers]


def same(ours: tuple[list[Ids], list[float]], theirs: tuple[list[Ids], list[float]]) -> bool:
    return ours[0] == theirs[0] and ours[1] == pytest.approx(theirs[1], abs=2e-5)


# ── scores ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_and_ids_are_the_model_cards(family: str, served: Callable[[str], Served]) -> None:
    one = served(family)
    assert same(found(one, DOCUMENTS), one.expected(DOCUMENTS))
    assert len(set(found(one, DOCUMENTS)[1])) == len(DOCUMENTS)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("key", ["instruction", "instruct"])
def test_an_instruction_comes_with_a_request(family: str, key: str, served: Callable[[str], Served]) -> None:
    one = served(family)
    told = found(one, DOCUMENTS, chat_template_kwargs={key: INSTRUCTION})
    assert same(told, one.expected(DOCUMENTS, INSTRUCTION))
    assert (told[0] != found(one, DOCUMENTS)[0]) is (family != "bge_gemma")  # which knows no instruction


def test_an_empty_instruction_is_none_and_another_thing_is_refused(served: Callable[[str], Served]) -> None:
    one = served("qwen3")
    assert same(found(one, ["a"], chat_template_kwargs={"instruction": ""}), one.expected(["a"]))
    with pytest.raises(InvalidInput, match="instruction must be a text"):
        found(one, ["a"], chat_template_kwargs={"instruction": ["find"]})


@pytest.mark.parametrize("family", FAMILIES)
def test_the_document_is_cut_and_never_what_stands_behind_it(
    family: str, served: Callable[[str], Served]
) -> None:
    one = served(family)
    whole = len(one.card.ids(QUERY, LONG, None, None))
    for limit in (whole - 1, whole - 20, whole - 100):
        for options in ({}, {"truncation_side": "right"}):
            cut = found(one, [LONG, "a"], tokenization_kwargs={"truncate_prompt_tokens": limit, **options})
            assert same(cut, one.expected([LONG, "a"], None, limit))
            assert len(cut[0][0]) == limit
    uncut = found(one, [LONG], tokenization_kwargs={"truncate_prompt_tokens": whole})
    assert same(uncut, one.expected([LONG]))


@pytest.mark.parametrize("family", FAMILIES)
def test_when_the_document_is_gone_the_query_gives_way(family: str, served: Callable[[str], Served]) -> None:
    one = served(family)
    empty = len(one.card.ids(QUERY, "", None, None))
    (ids,), _ = found(one, [LONG], truncate_prompt_tokens=empty - 8)
    suffix = one.card.ids(QUERY, "", None, None)[-8:]
    assert len(ids) == empty - 8
    assert ids[-8:] == suffix


@pytest.mark.parametrize("family", FAMILIES)
def test_a_limit_that_leaves_no_room_for_a_pair_is_refused(
    family: str, served: Callable[[str], Served]
) -> None:
    with pytest.raises(InvalidParameter, match="leaves no room for a query and a document") as refused:
        found(served(family), ["a"], truncate_prompt_tokens=4)
    assert refused.value.param == "truncate_prompt_tokens"


def test_a_left_side_that_is_asked_for_keeps_the_end(served: Callable[[str], Served]) -> None:
    one = served("qwen3")
    whole = one.card.ids(QUERY, LONG, None, None)
    options = {"truncate_prompt_tokens": 50, "truncation_side": "left"}
    assert found(one, [LONG], tokenization_kwargs=options)[0] == [whole[-50:]]


@pytest.mark.parametrize("family", FAMILIES)
def test_each_side_can_be_shortened_by_itself(family: str, served: Callable[[str], Served]) -> None:
    one = served(family)
    limits = {"max_tokens_per_query": 5, "max_tokens_per_doc": 7}
    (ids,), _ = found(one, [LONG], tokenization_kwargs=limits)
    (whole,), _ = found(one, [LONG])
    spared = len(one.card.of(QUERY)) + len(one.card.of(LONG)) - 12
    assert abs((len(whole) - len(ids)) - spared) <= 2  # a token at a seam may be split anew
    behind = 2 if family == "contextual" else 8  # tokens behind both texts
    assert ids[-behind:] == whole[-behind:]


@pytest.mark.parametrize(
    "family", [name for name in FAMILIES if name != "contextual"]
)  # its query stands last
def test_a_pair_in_its_prompt_already_is_not_put_into_it_again(
    family: str, served: Callable[[str], Served]
) -> None:
    """As scripts for the reference write it: half of the prompt around the query, half around the document."""
    one = served(family)
    document = "the cat sat on a mat"
    query, rest = {
        "qwen3": (
            "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
            'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
            f"<Instruct>: {WEB}\n<Query>: {QUERY}\n",
            f"<Document>: {document}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        ),
        "mxbai": (
            "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
            f"<|im_start|>user\nquery: {QUERY}\n",
            f"document: {document}\nYou are a search relevance expert who evaluates how well documents match search "
            "queries. For each query-document pair, carefully analyze the semantic relationship between them, then "
            "provide your binary relevance judgment (0 for not relevant, 1 for relevant).\nRelevance:<|im_end|>\n"
            "<|im_start|>assistant\n",
        ),
        "bge_gemma": (
            f"A: {QUERY}\n",
            f"B: {document}\nGiven a query A and a passage B, determine whether the passage contains an answer to the "
            "query by providing a prediction of either 'Yes' or 'No'.",
        ),
        "zerank": (
            f"<|im_start|>system\n{QUERY}<|im_end|>\n",
            f"<|im_start|>user\n{document}<|im_end|>\n<|im_start|>assistant\n",
        ),
        "qwen3_vl": (
            "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
            'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n<Instruct>: '
            f"Given a search query, retrieve relevant candidates that answer the query.<Query>:{QUERY}\n",
            f"<Document>:{document}<|im_end|>\n<|im_start|>assistant\n",
        ),
    }[family]
    (answer,) = one.llm.score(query, rest, use_tqdm=False)
    assert same(([answer.prompt_token_ids], [answer.outputs.score]), one.expected([document]))
    (cut,) = one.llm.score(
        query, rest, use_tqdm=False, truncate_prompt_tokens=len(answer.prompt_token_ids) - 3
    )
    assert cut.prompt_token_ids[-8:] == answer.prompt_token_ids[-8:]


# ── other prompts ────────────────────────────────────────────────────────────────────────────────────────────


def test_the_users_template_wins_and_that_of_a_request_over_it(
    served: Callable[[str], Served], tmp_path: Path
) -> None:
    one = served("qwen3")
    llm = LLM(str(one.folder), dtype="float32", cpu_workers=1, chat_template=tiny_heads.SCORE_TEMPLATE)
    document = "the cat sat on a mat"
    (given,) = llm.score(QUERY, document, use_tqdm=False)
    assert given.prompt_token_ids == one.card.of(f"judge: {QUERY} ? {document} =")
    once = "{{ messages[1].content }} {{ messages[0].content }}"
    for server in (llm, one.llm):
        (asked,) = server.score(QUERY, document, use_tqdm=False, chat_template=once)
        assert asked.prompt_token_ids == one.card.of(f"{document} {QUERY}")
    llm.close()


def test_a_template_of_the_users_keeps_its_end_too(served: Callable[[str], Served]) -> None:
    one = served("qwen3")
    (answer,) = one.llm.score(
        QUERY, LONG, use_tqdm=False, chat_template=tiny_heads.SCORE_TEMPLATE, truncate_prompt_tokens=40
    )
    whole = one.card.of(f"judge: {QUERY} ? {LONG} =")
    end = one.card.of(" =")
    assert answer.prompt_token_ids == [*whole[: 40 - len(end)], *end]


@pytest.mark.parametrize("name", ["somebody/else", "Qwen/Qwen3-Reranker-0.6B"])
def test_with_the_references_flags_pairs_are_put_as_there(tmp_path: Path, name: str) -> None:
    """Its clients write the whole prompt themselves: it would be there twice."""
    truth = zoo.qwen3(tmp_path)
    zoo.named(tmp_path, name)
    flags = {
        "architectures": ["Qwen3ForSequenceClassification"],
        "classifier_from_token": ["no", "yes"],
        "is_original_qwen3_reranker": True,
    }
    llm = LLM(str(tmp_path), dtype="float32", cpu_workers=1, hf_overrides=flags)
    card = Qwen3(tmp_path)
    query, end = "<|im_start|>user\n<Query>: where is the cat?\n", "<|im_end|>\n<|im_start|>assistant\n"
    for document in DOCUMENTS:
        (answer,) = llm.score(query, f"<Document>: {document}{end}", use_tqdm=False)
        ids = card.of(f"{query}<Document>: {document}{end}")
        assert answer.prompt_token_ids == ids
        assert answer.outputs.score == pytest.approx(float(truth("classify", ids)), abs=2e-5)
    llm.close()
    notices = build(EngineConfig(model=str(tmp_path), hf_overrides=flags, cpu_workers=1)).model.notices
    assert any("pairs are put as vLLM puts them" in notice for notice in notices)


def test_words_that_the_user_names_answer_in_the_users_template(served: Callable[[str], Served]) -> None:
    one = served("mxbai")
    template = tiny_heads.SCORE_TEMPLATE

    def asked(words: list[str]) -> float:
        flags = {
            "architectures": ["Qwen2ForSequenceClassification"],
            "classifier_from_token": words,
            "method": "from_2_way_softmax",
        }
        llm = LLM(str(one.folder), dtype="float32", cpu_workers=1, hf_overrides=flags, chat_template=template)
        (answer,) = llm.score(QUERY, "a", use_tqdm=False)
        llm.close()
        assert answer.prompt_token_ids == one.card.of(f"judge: {QUERY} ? a =")
        return answer.outputs.score

    assert asked(["1", "0"]) == pytest.approx(1 - asked(["0", "1"]), abs=2e-5)


def test_a_calibration_of_the_users_takes_the_place_of_the_familys(served: Callable[[str], Served]) -> None:
    one = served("zerank")
    llm = LLM(str(one.folder), dtype="float32", cpu_workers=1, pooler_config={"logit_sigma": 2.0})
    (answer,) = llm.score(QUERY, "a", use_tqdm=False)
    _, (score,) = one.expected(["a"])
    logit = torch.logit(torch.tensor(score, dtype=torch.float64)) * 5
    assert answer.outputs.score == pytest.approx(float(torch.sigmoid(logit / 2)), abs=1e-4)
    llm.close()


# ── who is one of them ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "architecture", "family"),
    [
        ("Qwen3-Reranker-0.6B", "Qwen3ForCausalLM", "Qwen3-Reranker"),
        ("qwen3-reranker-8b-finetuned", "Qwen3ForCausalLM", "Qwen3-Reranker"),
        ("Qwen3-Reranker-0.6B-seq-cls", "Qwen3ForSequenceClassification", "Qwen3-Reranker"),
        ("mxbai-rerank-base-v2", "Qwen2ForCausalLM", "mxbai-rerank-v2"),
        ("mxbai-rerank-large-v2", "Qwen2ForSequenceClassification", "mxbai-rerank-v2"),
        ("bge-reranker-v2-gemma", "GemmaForCausalLM", "bge-reranker-v2-gemma"),
        ("zerank-2", "Qwen3ForCausalLM", "zerank-2"),
        ("zerank-2-reranker", "Qwen3ForSequenceClassification", "zerank-2"),
        ("Qwen3-Embedding-0.6B", "Qwen3ForCausalLM", None),
        ("Qwen3-0.6B", "Qwen3ForCausalLM", None),
        ("Qwen3-VL-Reranker-2B", "Qwen3VLForConditionalGeneration", "Qwen3-VL-Reranker"),
        ("Qwen3-VL-Embedding-2B", "Qwen3VLForConditionalGeneration", None),
        ("Qwen3-VL-Reranker-2B", "Qwen3ForCausalLM", None),
        ("Qwen3-Reranker-0.6B", "LlamaForCausalLM", None),
        ("mxbai-rerank-base-v1", "DebertaV2ForSequenceClassification", None),
        ("bge-reranker-v2-m3", "XLMRobertaForSequenceClassification", None),
        ("zerank-1", "Qwen3ForCausalLM", "zerank-1"),
        ("zerank-1-small", "Qwen3ForCausalLM", "zerank-1"),
        ("ctxl-rerank-v2-instruct-multilingual-1b", "Qwen3ForCausalLM", "ctxl-rerank-v2"),
        ("ctxl-rerank-v2-instruct-multilingual-6b", "MistralForCausalLM", "ctxl-rerank-v2"),
    ],
)
def test_name_and_class_together_tell_a_family(name: str, architecture: str, family: str | None) -> None:
    for called in (name, name.upper()):
        row = recognise([called], {}, [architecture], None)
        assert (row and row.name) == family


def test_nvidias_is_told_by_its_dialect() -> None:
    told = recognise([], {}, ["LlamaForSequenceClassification"], "llama-bidirectional")
    assert told is not None
    (framed,) = told.frames([("q", "d")], None)
    assert framed.parts == ("question:q \n \n passage:d",)
    assert framed.specials
    assert recognise([], {}, ["LlamaForSequenceClassification"], None) is None
    assert recognise([], {}, ["LlamaModel"], "llama-bidirectional") is None


def test_every_row_has_a_place_for_both_texts_and_for_words() -> None:
    for row in RERANKERS:
        (framed,) = row.frames([("QQ", "DD")], {"instruction": "II"})
        text = "".join(framed.parts)
        assert text.count("QQ") == text.count("DD") == 1
        assert all("QQ" in framed.parts[i] or "DD" in framed.parts[i] for i in framed.yields)
        answers = row.words or row.token_ids
        assert row.dialect or answers
        assert len(answers) == (2 if row.method == "from_2_way_softmax" else 1) or not answers


def test_a_folder_of_the_name_is_known_by_it(tmp_path: Path) -> None:
    tail = Path("Qwen3-Reranker-0.6B"), Path("models--Qwen--Qwen3-Reranker-0.6B", "snapshots", "0123abc")
    for place in tail:
        folder = tmp_path / place
        folder.mkdir(parents=True)
        zoo.save(folder, "qwen3", zoo.qwen_words())
        model = build(EngineConfig(model=str(folder), cpu_workers=1)).model
        assert model.score_type == "cross-encoder"
        assert model.score_template
        (notice,) = [notice for notice in model.notices if "by its name" in notice]
        assert "Qwen3-Reranker" in notice
        assert "--convert embed" in notice


def test_a_folder_above_it_does_not_name_it(tmp_path: Path) -> None:
    folder = tmp_path / "qwen3-reranker-and-friends" / "embedding"
    folder.mkdir(parents=True)
    zoo.save(folder, "qwen3", zoo.qwen_words())
    assert build(EngineConfig(model=str(folder), cpu_workers=1)).model.score_type == "bi-encoder"


def test_files_that_pool_for_vectors_or_the_user_make_it_an_embedding_model(tmp_path: Path) -> None:
    zoo.qwen3(tmp_path)
    asked = build(EngineConfig(model=str(tmp_path), cpu_workers=1, convert="embed")).model
    assert asked.score_type == "bi-encoder"
    assert not asked.score_template
    tiny.sentence_transformers_files(tmp_path, ["lasttoken"])
    assert build(EngineConfig(model=str(tmp_path), cpu_workers=1)).model.score_type == "bi-encoder"


def test_a_tokenizer_that_cannot_write_the_prompt_is_refused(tmp_path: Path) -> None:
    tokenizer = tiny.byte_bpe()
    tokenizer.add_tokens(["yes", "no"])
    zoo.save(tmp_path, "qwen3", tokenizer)
    zoo.named(tmp_path, "Qwen/Qwen3-Reranker-0.6B")
    with pytest.raises(ConfigError, match=r"Qwen3-Reranker.*<\|im_start\|>.*--chat-template"):
        build(EngineConfig(model=str(tmp_path)))
    assert build(
        EngineConfig(model=str(tmp_path), chat_template=tiny_heads.SCORE_TEMPLATE)
    ).model.score_template
