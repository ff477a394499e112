"""Pairing: a language model that sentence-transformers scores pairs with is asked and read as it asks and reads it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sentence_transformers import CrossEncoder
from transformers import AutoTokenizer

import tiny
import tiny_heads
from carpool.engine.build import build
from carpool.engine.config import EngineConfig
from carpool.engine.errors import ConfigError, InvalidInput
from carpool.engine.llm import LLM
from carpool.engine.model_info import ModelInfo
from zoo import rerankers as zoo

QUERY = "where is the cat?"
DOCUMENTS = [
    "the cat sat on a mat.",
    "rain in spain falls on the mat\n",
    "",
    "naïve Ünïcode 雨 ☂",
    "ice cream " * 40,
]
NO_PROMPT = "No prompt is known"


def scores(folder: Path, documents: list[str] = DOCUMENTS, **options: Any) -> list[float]:
    asking = {"truncate_prompt_tokens", "chat_template_kwargs"} & options.keys()
    own = {name: options.pop(name) for name in asking}
    llm = LLM(str(folder), dtype="float32", cpu_workers=1, **options)
    answers = llm.score(QUERY, documents, use_tqdm=False, **own)
    llm.close()
    return [answer.outputs.score for answer in answers]


def theirs(folder: Path, documents: list[str] = DOCUMENTS, **options: Any) -> list[float]:
    """One pair at a time, so that no padding comes in."""
    model = CrossEncoder(str(folder), device="cpu", max_length=options.pop("max_length", None))
    model.transformers_model.float()
    return [float(model.predict((QUERY, document), **options)) for document in documents]


def served(folder: Path, **options: Any) -> ModelInfo:
    return build(EngineConfig(model=str(folder), dtype="float32", cpu_workers=1, **options)).model


def close(ours: list[float], reference: list[float]) -> bool:
    return ours == pytest.approx(reference, rel=2e-5, abs=2e-5)


@pytest.mark.parametrize(
    "make",
    [
        zoo.qwen3_with_files,
        zoo.zerank_with_files,
        zoo.judged("granite", "no", "yes", logits_scaling=8.0),
        zoo.judged("gemma2", "yes", final_logit_softcapping=2.0, query_pre_attn_scalar=8),
    ],
)
def test_pairs_are_scored_as_sentence_transformers_scores_them(
    make: Callable[[Path], Any], tmp_path: Path
) -> None:
    make(tmp_path)
    ours = scores(tmp_path)
    assert close(ours, theirs(tmp_path))
    assert len(set(ours)) == len(DOCUMENTS)
    assert not [notice for notice in served(tmp_path).notices if NO_PROMPT in notice]


def test_an_instruction_is_their_prompt(tmp_path: Path) -> None:
    zoo.qwen3_with_files(tmp_path)
    ours = scores(tmp_path, chat_template_kwargs={"instruction": "Find the cat"})
    assert close(ours, theirs(tmp_path, prompt="Find the cat"))
    assert not close(ours, theirs(tmp_path))  # whose files have another by default


def test_a_request_may_name_another_of_their_prompts_or_bring_its_own(tmp_path: Path) -> None:
    zoo.qwen3_with_files(tmp_path)
    side = tmp_path / "config_sentence_transformers.json"
    tiny.edit_json(side, prompts={"web_search": "Find pages", "cats": "Find the cat"})
    found = {
        words: scores(tmp_path, ["the cat sat"], chat_template_kwargs=dict([words] if words else []))
        for words in (None, ("prompt_name", "cats"), ("prompt_name", None), ("prompt", "See"), ("prompt", ""))
    }
    assert close(found[None], theirs(tmp_path, ["the cat sat"]))
    assert found["prompt_name", None] == found[None]
    assert close(found["prompt_name", "cats"], theirs(tmp_path, ["the cat sat"], prompt_name="cats"))
    assert close(found["prompt", "See"], theirs(tmp_path, ["the cat sat"], prompt="See"))
    assert len({tuple(each) for each in found.values()}) == 4  # "" is none at all
    for wrong, why in (
        ({"prompt_name": "dogs"}, "Unsupported prompt_name 'dogs'. Supported values: cats, web_search"),
        ({"prompt_name": ["cats"]}, "Unsupported prompt_name"),
        ({"prompt": 1}, "prompt must be a text"),
    ):
        with pytest.raises(InvalidInput, match=why) as refused:
            scores(tmp_path, ["a"], chat_template_kwargs=wrong)
        assert refused.value.param == "chat_template_kwargs"


def test_what_is_cut_keeps_the_end_of_their_template(tmp_path: Path) -> None:
    zoo.qwen3_with_files(tmp_path)
    assert close(scores(tmp_path, truncate_prompt_tokens=150), theirs(tmp_path, max_length=150))
    assert scores(tmp_path)[-1] != scores(tmp_path, truncate_prompt_tokens=150)[-1]


def test_a_template_of_parts_gets_parts(tmp_path: Path) -> None:
    zoo.qwen3_with_files(tmp_path)
    template = (
        "{%- for message in messages %}<|im_start|>{{ message.role }} {{ message.content[0].text }}<|im_end|>"
        "{% endfor %}"
    )
    (tmp_path / "chat_template.jinja").write_text(template)
    logits = {"method": "forward", "method_output_name": "logits"}
    tiny.edit_json(
        tmp_path / "sentence_bert_config.json",
        modality_config={"text": logits, "message": {**logits, "format": "structured"}},
    )
    assert close(scores(tmp_path), theirs(tmp_path))


def test_the_users_template_wins_over_the_files(tmp_path: Path) -> None:
    truth = zoo.qwen3_with_files(tmp_path)
    llm = LLM(str(tmp_path), dtype="float32", cpu_workers=1, chat_template=tiny_heads.SCORE_TEMPLATE)
    (answer,) = llm.score(QUERY, "a", use_tqdm=False)
    words = AutoTokenizer.from_pretrained(tmp_path)
    assert answer.prompt_token_ids == words(f"judge: {QUERY} ? a =")["input_ids"]
    assert answer.outputs.score == pytest.approx(float(truth("classify", answer.prompt_token_ids)), abs=2e-5)
    llm.close()


def test_two_texts_to_the_tokenizer_are_two_texts_here(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """A language model without a chat template: what sentence-transformers computes, and a warning of what it is."""
    CrossEncoder(str(checkpoint("qwen3_lm")), device="cpu").save_pretrained(str(tmp_path))
    assert close(scores(tmp_path), theirs(tmp_path))
    (notice,) = [notice for notice in served(tmp_path).notices if NO_PROMPT in notice]
    assert "--chat-template" in notice


def test_a_template_without_a_place_for_pairs_is_refused_unless_the_family_is_known(tmp_path: Path) -> None:
    zoo.qwen3_with_files(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(zoo.CHATML)
    with pytest.raises(ConfigError, match=r"no place for a query and a document: .* --chat-template"):
        served(tmp_path)
    assert served(tmp_path, chat_template=tiny_heads.SCORE_TEMPLATE).score_template
    zoo.named(tmp_path, "Qwen/Qwen3-Reranker-0.6B")
    assert served(tmp_path).score_template


@pytest.mark.parametrize("family", ["xlmr_cross", "qwen2_cross"])
def test_a_template_of_the_users_that_loses_pairs_is_not_asked_with(
    family: str, checkpoint: Callable[[str], Path]
) -> None:
    """It is there for conversations; every pair would score the same."""
    folder = checkpoint(family)
    users = "{% for message in messages if message.role == 'user' %}{{ message.content }}{% endfor %}!"
    model = served(folder, chat_template=users)
    (notice,) = [notice for notice in model.notices if "no place for a query and a document" in notice]
    assert "--chat-template" in notice
    assert not model.score_template
    assert not [each for each in served(folder, chat_template=zoo.JUDGING).notices if "no place" in each]
    if family == "xlmr_cross":
        assert scores(folder, chat_template=users) == scores(folder)


@pytest.mark.parametrize("make", [zoo.qwen3_with_files, zoo.zerank_with_files])
def test_in_its_place_stands_the_files_own(make: Callable[[Path], Any], tmp_path: Path) -> None:
    make(tmp_path)
    users = "{% for message in messages if message.role == 'user' %}{{ message.content }}{% endfor %}!"
    assert scores(tmp_path, DOCUMENTS[:2], chat_template=users) == scores(tmp_path, DOCUMENTS[:2])


def test_an_embedding_model_may_have_any_template(checkpoint: Callable[[str], Path]) -> None:
    assert not [
        n for n in served(checkpoint("bert"), chat_template="{{ 'hello' }}").notices if "no place" in n
    ]


def test_a_word_beyond_the_vocabulary_is_refused(tmp_path: Path) -> None:
    zoo.qwen3_with_files(tmp_path)
    tiny.edit_json(tmp_path / "1_LogitScore" / "config.json", true_token_id=9693)
    with pytest.raises(ConfigError, match="LogitScore reads token 9693"):
        served(tmp_path)


def test_words_of_the_users_win_over_the_files(tmp_path: Path) -> None:
    zoo.qwen3_with_files(tmp_path)

    def answered(*words: str) -> list[float]:
        flags = {"classifier_from_token": list(words), "method": "from_2_way_softmax"}
        return scores(tmp_path, hf_overrides=flags)

    assert close(answered("yes", "no"), [1 - score for score in answered("no", "yes")])


# ── when nobody knows the prompt ─────────────────────────────────────────────────────────────────────────────

_YES = {"classifier_from_token": ["yes"], "method": "no_post_processing"}


@pytest.mark.parametrize(
    ("family", "options", "warned"),
    [
        ("qwen3_lm", {"hf_overrides": _YES}, True),
        ("qwen2_cross", {}, True),
        ("qwen2_cross", {"chat_template": tiny_heads.SCORE_TEMPLATE}, False),
        ("qwen2_cross", {"hf_overrides": {"use_sep_token": False}}, False),  # the user knows
        ("qwen2_3", {}, False),  # scores nothing
        ("qwen3_lm", {}, False),  # a cosine needs no prompt
        ("bert_cross", {}, False),
        ("xlmr_cross", {}, False),
    ],
)
def test_a_language_model_asked_in_no_words_of_its_own_is_warned_of(
    family: str, options: dict[str, Any], warned: bool, checkpoint: Callable[[str], Path]
) -> None:
    notices = served(checkpoint(family), **options).notices
    assert any(NO_PROMPT in notice for notice in notices) is warned
