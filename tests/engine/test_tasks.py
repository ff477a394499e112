"""Every task, through the whole engine, against transformers and sentence-transformers alone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.base.modules.dense import Dense
from sentence_transformers.base.modules.transformer import Transformer
from sentence_transformers.sentence_transformer.modules.pooling import Pooling
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import tiny
import tiny_heads
from carpool.engine.async_engine import AsyncEngine
from carpool.engine.build import build
from carpool.engine.config import EngineConfig, PoolerConfig
from carpool.engine.errors import ConfigError, InputTooLong, InvalidInput, InvalidParameter, UnsupportedTask
from carpool.engine.loop_thread import LoopThread
from carpool.engine.outputs import PoolingResult, ScoreResult
from carpool.engine.params import PoolingParams, Task, TokenizationParams
from head_oracle import HeadOracle, answer, close
from oracle import Oracle

QUERY = "where is the cat?"
DOCUMENTS = ["the cat sat on a mat", "rain in spain falls on a mat, " * 3, "", "naïve Ünïcode 雨 ☂"]
TEXTS = [text for text in tiny.TEXTS if text]
PLAIN = PoolingParams(use_activation=False)


class Engine:
    """An AsyncEngine for tests that have no loop of their own."""

    def __init__(self, loop: LoopThread, path: Path, **options: Any) -> None:
        self._loop = loop
        config = {"model": str(path), "cpu_workers": 1, "dtype": "float32", **options}
        self.engine = AsyncEngine(EngineConfig(**config))
        loop.run(self.engine.start())
        self.model = self.engine.model

    def pool(
        self,
        prompts: list[Any],
        task: Task = "embed",
        params: PoolingParams | None = None,
        **tokenization: Any,
    ) -> PoolingResult:
        options = TokenizationParams(**tokenization)
        return self._loop.run(self.engine.pool(prompts, params or PoolingParams(), options, task=task))

    def rows(
        self, prompts: list[Any], task: Task = "embed", params: PoolingParams | None = None, **more: Any
    ) -> list[Tensor]:
        return [torch.from_numpy(row) for row in self.pool(prompts, task, params, **more).rows]

    def score(
        self, queries: list[str], documents: list[str], params: PoolingParams | None = None, **more: Any
    ) -> ScoreResult:
        mine = {name: more.pop(name) for name in ("template", "template_kwargs") if name in more}
        options = TokenizationParams(**more)
        return self._loop.run(
            self.engine.score(queries, documents, params or PoolingParams(), options, **mine)
        )

    def all(self, *calls: Any) -> list[Any]:
        """Several calls at once, each (prompts, task, params)."""

        async def gather() -> list[Any]:
            pools = [
                self.engine.pool(p, params, TokenizationParams(), task=task) for p, task, params in calls
            ]
            return await asyncio.gather(*pools)

        return self._loop.run(gather())


@pytest.fixture(scope="module")
def start() -> Iterator[Callable[..., Engine]]:
    """Starts engines, each once; they all stop at the end."""
    loop = LoopThread("test-tasks")
    engines: dict[str, Engine] = {}

    def started(path: Path, **options: Any) -> Engine:
        key = f"{path} {options}"
        if key not in engines:
            engines[key] = Engine(loop, path, **options)
        return engines[key]

    yield started
    for engine in engines.values():
        loop.run(engine.engine.stop(1.0))
    loop.close()


@pytest.fixture(scope="module")
def serve(start: Callable[..., Engine], checkpoint: Callable[[str], Path]) -> Callable[..., Engine]:
    return lambda family, **options: start(checkpoint(family), **options)


@pytest.fixture(scope="module")
def oracle(checkpoint: Callable[[str], Path]) -> Callable[..., HeadOracle]:
    return cache(lambda family, auto=AutoModelForSequenceClassification: HeadOracle(checkpoint(family), auto))


def scores(values: Any) -> Tensor:
    return torch.tensor(values)


# ── cross-encoders ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("family", "activation"),
    [("bert_cross", lambda x: x), ("xlmr_cross", torch.sigmoid), ("bert_regression", lambda x: x)],
)
def test_a_cross_encoder_reads_the_pair_as_transformers_does(
    family: str, activation: Any, serve: Callable[..., Engine], oracle: Callable[..., HeadOracle]
) -> None:
    engine, theirs = serve(family), oracle(family)
    pairs = [theirs.pair(QUERY, document) for document in DOCUMENTS]
    logits = torch.cat([theirs.logits(*pair) for pair in pairs])
    result = engine.score([QUERY], DOCUMENTS)
    assert close(scores(result.scores), activation(logits))
    assert result.pair_token_ids == [ids for ids, _ in pairs]
    assert result.prompt_tokens == sum(len(ids) for ids, _ in pairs)
    assert close(scores(engine.score([QUERY], DOCUMENTS, PLAIN).scores), logits)
    alone = [engine.score([QUERY], [document]).scores[0] for document in DOCUMENTS]
    assert close(scores(alone), scores(result.scores))


def test_the_second_text_of_a_pair_is_of_another_type(
    serve: Callable[..., Engine], oracle: Callable[..., HeadOracle]
) -> None:
    """That the models of these tests can tell: without types, the scores above would be others."""
    ids, types = oracle("bert_cross").pair(QUERY, DOCUMENTS[0])
    typed, untyped = oracle("bert_cross").logits(ids, types), oracle("bert_cross").logits(ids)
    assert not close(typed, untyped)


def test_every_query_meets_its_own_document(
    serve: Callable[..., Engine], oracle: Callable[..., HeadOracle]
) -> None:
    engine, theirs = serve("bert_cross"), oracle("bert_cross")
    queries = ["a", "where is the cat?", "night", "is it war"]
    expected = [theirs.logits(*theirs.pair(q, d)) for q, d in zip(queries, DOCUMENTS, strict=True)]
    assert close(scores(engine.score(queries, DOCUMENTS).scores), torch.cat(expected))


@pytest.mark.parametrize("family", ["bert_cross", "xlmr_cross"])
@pytest.mark.parametrize("limit", [8, 12, 20])
def test_pairs_are_truncated_as_transformers_does(
    family: str, limit: int, serve: Callable[..., Engine], oracle: Callable[..., HeadOracle]
) -> None:
    engine, theirs = serve(family), oracle(family)
    pairs = [theirs.pair(QUERY, d, truncation=True, max_length=limit) for d in DOCUMENTS]
    result = engine.score([QUERY], DOCUMENTS, PLAIN, truncate_prompt_tokens=limit)
    assert close(scores(result.scores), torch.cat([theirs.logits(*pair) for pair in pairs]))
    assert result.prompt_tokens == sum(len(ids) for ids, _ in pairs)


def test_a_causal_cross_encoder_that_nobody_knows_how_to_ask_reads_both_texts_as_its_tokenizer_has_them(
    serve: Callable[..., Engine], oracle: Callable[..., HeadOracle]
) -> None:
    engine, theirs = serve("qwen2_cross"), oracle("qwen2_cross")
    ids = [theirs.tokenizer(text)["input_ids"] for text in (QUERY, *DOCUMENTS)]
    expected = [theirs.logits(ids[0] + own) for own in ids[1:]]
    assert close(scores(engine.score([QUERY], DOCUMENTS, PLAIN).scores), torch.cat(expected))


def test_a_language_model_whose_words_are_scored_reads_a_pair_as_one_text(
    serve: Callable[..., Engine],
) -> None:
    yes = {"classifier_from_token": ["yes"], "method": "no_post_processing"}
    assert serve("qwen3_lm", hf_overrides=yes).model.pairs == "concatenated"
    assert serve("qwen3_lm", hf_overrides={**yes, "use_sep_token": True}).model.pairs == "separated"


_ONE_TEXT = {"use_sep_token": False}


def test_a_causal_cross_encoder_reads_one_text_if_clients_write_it(
    serve: Callable[..., Engine], oracle: Callable[..., HeadOracle]
) -> None:
    engine, theirs = serve("qwen2_cross", hf_overrides=_ONE_TEXT), oracle("qwen2_cross")
    assert engine.model.pairs == "concatenated"
    expected = [theirs.logits(theirs.tokenizer(QUERY + d)["input_ids"]) for d in DOCUMENTS]
    assert close(scores(engine.score([QUERY], DOCUMENTS, PLAIN).scores), torch.cat(expected))


def test_use_sep_token_makes_two_texts_of_a_causal_pair(serve: Callable[..., Engine]) -> None:
    assert serve("qwen2_cross", hf_overrides={"use_sep_token": True}).model.pairs == "separated"
    assert serve("bert_cross", hf_overrides={"use_pad_token": False}).model.pairs == "concatenated"


def test_a_template_asks_a_causal_model_for_its_judgement(
    serve: Callable[..., Engine], oracle: Callable[..., HeadOracle]
) -> None:
    theirs = oracle("qwen2_cross")

    def expected(instruction: str) -> Tensor:
        prompts = [f"{instruction}: {QUERY} ? {d} =" for d in DOCUMENTS]
        return torch.cat([theirs.logits(theirs.tokenizer(prompt)["input_ids"]) for prompt in prompts])

    templated = serve("qwen2_cross", chat_template=tiny_heads.SCORE_TEMPLATE)
    assert templated.model.score_template
    assert close(scores(templated.score([QUERY], DOCUMENTS, PLAIN).scores), expected("judge"))
    asked = templated.score([QUERY], DOCUMENTS, PLAIN, template_kwargs={"instruction": "is it so"})
    assert close(scores(asked.scores), expected("is it so"))
    for_once = serve("qwen2_cross").score([QUERY], DOCUMENTS, PLAIN, template=tiny_heads.SCORE_TEMPLATE)
    assert close(scores(for_once.scores), expected("judge"))


def test_texts_too_long_are_named_by_their_side(serve: Callable[..., Engine]) -> None:
    with pytest.raises(InputTooLong) as refused:
        serve("bert_cross").score([QUERY], ["a", "cat " * 200])
    assert refused.value.param == "documents[1]"
    with pytest.raises(InputTooLong) as refused:
        serve("bert").score(["cat " * 200], ["a", "b"])
    assert refused.value.param == "queries"


@pytest.mark.parametrize("family", ["bert_cross", "bert"])
@pytest.mark.parametrize("limit", [0, 3])
def test_text_that_is_no_text_is_named_by_its_side(
    family: str, limit: int, serve: Callable[..., Engine]
) -> None:
    """Texts that are alike are tokenised once: its place among the others is not its own."""
    for query, documents, param in (
        ("a", ["b", "b", "c\ud800"], "documents[2]"),
        ("a", ["\ud800"], "documents"),
        ("a\ud800", ["b", "b"], "queries"),
    ):
        with pytest.raises(InvalidInput, match="lone surrogate") as refused:
            serve(family).score([query], documents, max_tokens_per_doc=limit)
        assert refused.value.param == param


def test_classifiers_of_several_labels_and_of_tokens_do_not_score(serve: Callable[..., Engine]) -> None:
    for family in ("bert_3", "bert_tokens", "qwen2_reward"):
        with pytest.raises(UnsupportedTask, match="does not support Score API"):
            serve(family).score(["a"], ["b"])


# ── bi-encoders and late interaction ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("family", ["bert", "qwen3"])
def test_a_bi_encoder_scores_the_cosine_and_counts_the_query_once(
    family: str, serve: Callable[..., Engine], checkpoint: Callable[[str], Path]
) -> None:
    engine = serve(family)
    theirs = Oracle(checkpoint(family), ["mean" if family == "bert" else "lasttoken"])
    query, *documents = (theirs.embed(theirs.ids(text)) for text in [QUERY, *DOCUMENTS])
    expected = torch.stack(documents) @ query
    result = engine.score([QUERY], DOCUMENTS)
    assert close(scores(result.scores), expected)
    assert close(scores(engine.score([QUERY], DOCUMENTS, PLAIN).scores), expected)
    assert result.prompt_tokens == sum(len(theirs.ids(text)) for text in [QUERY, *DOCUMENTS])
    twice = engine.score([QUERY, QUERY], DOCUMENTS[:2])
    assert close(scores(twice.scores), expected[:2])
    assert twice.prompt_tokens == sum(len(theirs.ids(text)) for text in [QUERY, QUERY, *DOCUMENTS[:2]])


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_late_interaction_sums_the_best_match_of_each_query_token(
    family: str, serve: Callable[..., Engine], checkpoint: Callable[[str], Path]
) -> None:
    engine = serve(family, pooler_config=PoolerConfig(task="token_embed"))
    assert (engine.model.default_task, engine.model.score_type) == ("token_embed", "late-interaction")
    activations = [torch.tanh] if family == "modernbert" else []
    theirs = Oracle(checkpoint(family), ["cls"], activations=activations)  # of one row: that row, finished

    def vectors(text: str) -> list[Tensor]:
        finished = []
        for row in theirs.hidden(theirs.ids(text)):
            theirs.hidden = lambda ids, row=row: row[None]  # type: ignore[method-assign,misc]
            finished.append(theirs.embed([0]))
            del theirs.hidden
        return finished

    query = vectors(QUERY)
    expected = []
    for document in DOCUMENTS:
        best = [max(float(q @ d) for d in vectors(document)) for q in query]
        expected.append(sum(best))
    result = engine.score([QUERY], DOCUMENTS)
    assert close(scores(result.scores), scores(expected))
    assert result.prompt_tokens == sum(len(theirs.ids(text)) for text in [QUERY, *DOCUMENTS])


@pytest.mark.parametrize("family", ["bert", "bert_cross", "qwen2_cross"])
def test_each_side_can_be_cut_to_tokens_of_its_own(family: str, serve: Callable[..., Engine]) -> None:
    engine = serve(family, **({"hf_overrides": _ONE_TEXT} if family == "qwen2_cross" else {}))
    query, document = " the cat" * 10, " a mat in spain" * 10

    def tokens(**limits: Any) -> int:
        return engine.score([query], [document], **limits).prompt_tokens

    whole = tokens()
    specials = whole - 20 - 40
    assert specials in (0, 3, 4)
    assert tokens(max_tokens_per_query=5) == specials + 5 + 40
    assert tokens(max_tokens_per_doc=7) == specials + 20 + 7
    assert tokens(max_tokens_per_query=5, max_tokens_per_doc=7) == specials + 12
    assert tokens(max_tokens_per_query=0, max_tokens_per_doc=0) == whole
    with pytest.raises(
        InvalidParameter, match="max_tokens_per_doc must be a non-negative integer"
    ) as refused:
        tokens(max_tokens_per_doc=-5)
    assert refused.value.param == "max_tokens_per_doc"
    with pytest.raises(
        InvalidParameter, match=r"max_tokens_per_query \(128\) must be less than max_model_len \(128\)"
    ):
        tokens(max_tokens_per_query=128)


# ── rerankers made of language models ────────────────────────────────────────────────────────────────────────

_QWEN = {"classifier_from_token": ["no", "yes"], "is_original_qwen3_reranker": True}


@pytest.mark.parametrize(
    "overrides",
    [
        {**_QWEN, "architectures": ["Qwen3ForSequenceClassification"]},
        _QWEN,  # the words alone say what is meant
        {"classifier_from_token": ["no", "yes"], "method": "from_2_way_softmax"},
    ],
)
def test_two_words_of_a_language_model_make_a_reranker(
    overrides: dict[str, Any], serve: Callable[..., Engine], oracle: Callable[..., HeadOracle]
) -> None:
    engine = serve("qwen3_lm", hf_overrides=overrides, chat_template=tiny_heads.SCORE_TEMPLATE)
    theirs = oracle("qwen3_lm", AutoModelForCausalLM)
    no, yes = theirs.tokenizer.convert_tokens_to_ids(["no", "yes"])
    expected = []
    for document in DOCUMENTS:
        logits = theirs.logits(theirs.tokenizer(f"judge: {QUERY} ? {document} =")["input_ids"])[-1]
        expected.append(logits[[no, yes]].softmax(-1)[1])
    assert close(scores(engine.score([QUERY], DOCUMENTS).scores), torch.stack(expected))
    assert engine.model.score_type == "cross-encoder"
    assert engine.model.labels == ("LABEL_0",)


def test_one_word_of_a_language_model_is_a_logit(
    serve: Callable[..., Engine], oracle: Callable[..., HeadOracle]
) -> None:
    overrides = {"classifier_from_token": ["yes"], "method": "no_post_processing"}
    engine = serve("qwen3_lm", hf_overrides={**overrides, **_ONE_TEXT})
    theirs = oracle("qwen3_lm", AutoModelForCausalLM)
    (yes,) = theirs.tokenizer.convert_tokens_to_ids(["yes"])
    logits = torch.stack(
        [theirs.logits(theirs.tokenizer(QUERY + d)["input_ids"])[-1][yes] for d in DOCUMENTS]
    )
    assert close(scores(engine.score([QUERY], DOCUMENTS).scores), torch.sigmoid(logits))
    assert close(scores(engine.score([QUERY], DOCUMENTS, PLAIN).scores), logits)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"classifier_from_token": ["no", "yes"]}, 'needs "method"'),
        (
            {"classifier_from_token": ["no", "perhaps"], "method": "from_2_way_softmax"},
            "'perhaps' is not one token",
        ),
        ({"classifier_from_token": ["yes"], "is_original_qwen3_reranker": True}, "needs two words"),
    ],
)
def test_a_scorer_that_cannot_be_made_is_refused(
    overrides: dict[str, Any], sentence: str, checkpoint: Callable[[str], Path]
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        build(EngineConfig(model=str(checkpoint("qwen3_lm")), hf_overrides=overrides))


def test_a_model_without_a_language_models_head_makes_no_scorer(checkpoint: Callable[[str], Path]) -> None:
    overrides = {"classifier_from_token": ["a"], "method": "no_post_processing"}
    with pytest.raises(ConfigError):
        build(EngineConfig(model=str(checkpoint("xlmr_cross")), hf_overrides=overrides))


# ── rewards ──────────────────────────────────────────────────────────────────────────────────────────────────


def reward_head(path: Path, hidden: Tensor) -> Tensor:
    from safetensors.torch import load_file

    weights = load_file(path / "model.safetensors")
    inner = torch.relu(hidden @ weights["score.0.weight"].T + weights["score.0.bias"])
    return inner @ weights["score.2.weight"].T + weights["score.2.bias"]


def test_a_reward_model_gives_every_token_a_number_as_it_is(
    serve: Callable[..., Engine], oracle: Callable[..., HeadOracle], checkpoint: Callable[[str], Path]
) -> None:
    engine, theirs = serve("qwen2_reward"), oracle("qwen2_reward", AutoModel)
    assert engine.model.tasks == {"token_classify"}
    assert engine.model.default_task == "token_classify"
    ids = [theirs.tokenizer(text)["input_ids"] for text in TEXTS]
    expected = [reward_head(checkpoint("qwen2_reward"), theirs.hidden(own)) for own in ids]
    for asked, activation in ((None, lambda x: x), (False, lambda x: x), (True, torch.sigmoid)):
        rows = engine.rows(TEXTS, "token_classify", PoolingParams(use_activation=asked))
        assert all(close(row, activation(theirs)) for row, theirs in zip(rows, expected, strict=True))


def test_a_process_reward_model_judges_each_step(
    serve: Callable[..., Engine], oracle: Callable[..., HeadOracle], checkpoint: Callable[[str], Path]
) -> None:
    theirs = oracle("qwen2_prm", AutoModel)
    tag = theirs.tokenizer.convert_tokens_to_ids(tiny_heads.STEP)
    text = f"the cat sat{tiny_heads.STEP}on a mat{tiny_heads.STEP}{tiny_heads.STEP}night"
    ids = theirs.tokenizer(text)["input_ids"]
    logits = reward_head(checkpoint("qwen2_prm"), theirs.hidden(ids))
    steps = [i for i, token in enumerate(ids) if token == tag]
    assert len(steps) == 3
    both = serve("qwen2_prm")
    (found,) = both.rows([text], "token_classify")
    assert close(found, logits[steps].softmax(-1))
    (found,) = both.rows([text], "token_classify", PLAIN)
    assert close(found, logits[steps])
    assert [row.shape for row in both.rows(["no step", text], "token_classify")] == [(0, 2), (3, 2)]
    good = PoolerConfig(tok_pooling_type="STEP", step_tag_id=tag, returned_token_ids=[1])  # type: ignore[arg-type]
    kept = serve("qwen2_prm", pooler_config=good)
    (found,) = kept.rows([text], "token_classify", PLAIN)
    assert close(found, logits[steps][:, [1]])
    (found,) = kept.rows([text], "token_classify")
    assert close(found, logits[steps][:, [1]].sigmoid())  # of one logit alone there is no softmax
    (found,) = serve("qwen2_prm", pooler_config=PoolerConfig(pooling_type="ALL")).rows(
        [text], "token_classify"
    )
    assert close(found, logits.softmax(-1))


def test_a_step_may_end_with_another_token_than_its_familys(serve: Callable[..., Engine]) -> None:
    engine = serve("qwen2_prm", pooler_config=PoolerConfig(step_tag_id=3))
    (found,) = engine.rows([f"the cat{tiny_heads.STEP}sat"], "token_classify")
    assert found.shape == (0, 2)


@pytest.mark.parametrize(
    ("pooler", "sentence"),
    [
        ({}, "tokenizer has no <extra_0> to end a step with"),
        ({"step_tag_id": 10**6}, "step_tag_id 1000000 is none of this model's ids"),
        (
            {"step_tag_id": 3, "returned_token_ids": [0, 2]},
            r"returned_token_ids \[0, 2\] go beyond .* 2 labels",
        ),
    ],
)
def test_steps_that_would_never_be_found_are_refused(
    pooler: dict[str, Any], sentence: str, fresh: Callable[[str], Path]
) -> None:
    """They would make every result empty without a word."""
    path = fresh("qwen2_prm")
    words = path / "tokenizer.json"
    words.write_text(words.read_text().replace(tiny_heads.STEP, "<other>"))
    with pytest.raises(ConfigError, match=sentence):
        build(EngineConfig(model=str(path), pooler_config=PoolerConfig(**pooler)))


@pytest.mark.parametrize("family", ["qwen3_lm", "gemma2_lm"])
@pytest.mark.parametrize("convert", ["auto", "reward"])
def test_a_language_model_judges_steps_by_its_own_words(
    family: str, convert: Any, serve: Callable[..., Engine], oracle: Callable[..., HeadOracle]
) -> None:
    """math-shepherd: the probability of + against - where a step ends, soft-capped where the model does that."""
    theirs = oracle(family, AutoModelForCausalLM)
    tag = theirs.tokenizer.convert_tokens_to_ids(tiny_heads.STEP)
    good, bad = 20, 30
    text = f"the cat sat{tiny_heads.STEP}on a mat{tiny_heads.STEP}"
    ids = theirs.tokenizer(text)["input_ids"]
    logits = theirs.logits(ids)[[i for i, token in enumerate(ids) if token == tag]][:, [good, bad]]
    pooler = PoolerConfig(pooling_type="STEP", step_tag_id=tag, returned_token_ids=[good, bad])  # type: ignore[arg-type]
    engine = serve(family, convert=convert, pooler_config=pooler)
    (found,) = engine.rows([text], "token_classify")
    assert close(found, logits.softmax(-1))
    (found,) = engine.rows([text], "token_classify", PLAIN)
    assert close(found, logits)


def test_a_judge_of_words_that_do_not_exist_is_refused(checkpoint: Callable[[str], Path]) -> None:
    pooler = PoolerConfig(pooling_type="STEP", step_tag_id=1, returned_token_ids=[10**6])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"returned_token_ids \[1000000\] go beyond"):
        build(EngineConfig(model=str(checkpoint("qwen3_lm")), pooler_config=pooler))


@pytest.mark.parametrize("family", ["bert", "qwen2"])
def test_a_plain_model_told_to_reward_gives_its_hidden_states(
    family: str, serve: Callable[..., Engine], oracle: Callable[..., HeadOracle]
) -> None:
    engine, theirs = serve(family, convert="reward"), oracle(family, AutoModel)
    assert engine.model.tasks == {"token_classify"}
    assert engine.model.labels == ()
    rows = engine.rows(TEXTS[:3], "token_classify")
    expected = [theirs.hidden(theirs.tokenizer(text)["input_ids"]) for text in TEXTS[:3]]
    assert all(close(row, hidden) for row, hidden in zip(rows, expected, strict=True))


def test_a_reward_model_without_its_head_is_refused(fresh: Callable[[str], Path]) -> None:
    path = fresh("qwen2")
    tiny.edit_json(path / "config.json", architectures=["Qwen2ForRewardModel"])
    with pytest.raises(ConfigError, match="neither a score nor a v_head weight"):
        build(EngineConfig(model=str(path)))


# ── conversions and configuration ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("family", "mode"), [("bert_3", "cls"), ("qwen2_3", "lasttoken"), ("xlmr_cross", "cls")]
)
def test_a_classifier_told_to_embed_gives_its_backbones_vectors(
    family: str, mode: str, serve: Callable[..., Engine], checkpoint: Callable[[str], Path]
) -> None:
    engine, theirs = serve(family, convert="embed"), Oracle(checkpoint(family), [mode])
    assert engine.model.tasks == {"embed", "token_embed"}
    assert engine.model.labels == ()
    for row, text in zip(engine.rows(TEXTS), TEXTS, strict=True):
        assert close(row, theirs.embed(theirs.ids(text)))


@pytest.mark.parametrize("mean", ["logit_mean", "logit_bias"])
def test_logits_are_calibrated_before_the_activation(
    mean: str, serve: Callable[..., Engine], oracle: Callable[..., HeadOracle]
) -> None:
    engine = serve("xlmr_cross", pooler_config=PoolerConfig(**{mean: 2.65, "logit_sigma": 0.5}))  # type: ignore[arg-type]
    theirs = oracle("xlmr_cross")
    logits = torch.cat([theirs.logits(theirs.pair(QUERY, d)[0]) for d in DOCUMENTS])
    assert close(scores(engine.score([QUERY], DOCUMENTS).scores), torch.sigmoid((logits - 2.65) / 0.5))
    assert close(scores(engine.score([QUERY], DOCUMENTS, PLAIN).scores), (logits - 2.65) / 0.5)


@pytest.mark.parametrize("name", ["use_activation", "activation", "softmax", "normalize"])
def test_the_operator_sets_whether_results_are_activated(
    name: str, serve: Callable[..., Engine], oracle: Callable[..., HeadOracle]
) -> None:
    engine, theirs = serve("bert_3", pooler_config=PoolerConfig(**{name: False})), oracle("bert_3")  # type: ignore[arg-type]
    logits = theirs.logits(theirs.tokenizer(TEXTS[0])["input_ids"])
    assert close(engine.rows(TEXTS[:1], "classify")[0], logits)
    assert close(engine.rows(TEXTS[:1], "token_classify")[0][0], logits)  # of [CLS]
    assert close(
        engine.rows(TEXTS[:1], "classify", PoolingParams(use_activation=True))[0], logits.softmax(-1)
    )
    assert serve("bert", pooler_config=PoolerConfig(**{name: False})).rows(["a"])[0].norm() > 1.5  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("family", "task"),
    [("bert", "classify"), ("bert_3", "embed"), ("bert_tokens", "classify"), ("qwen2_reward", "embed")],
)
def test_a_task_the_model_does_not_have_is_refused(
    family: str, task: Task, serve: Callable[..., Engine]
) -> None:
    with pytest.raises(UnsupportedTask):
        serve(family).pool(["a"], task)
    with pytest.raises(ConfigError, match=f"Unsupported task: '{task}'; this model supports"):
        build(EngineConfig(model=serve(family).model.root, pooler_config=PoolerConfig(task=task)))


@pytest.mark.parametrize(
    ("family", "overrides", "expected"),
    [
        ("bert_2", {}, ("LABEL_0", "LABEL_1")),
        ("bert_3", {}, tiny_heads.MOODS),
        ("bert_3", {"id2label": {"0": "bad", "1": "so-so", "2": "good"}}, ("bad", "so-so", "good")),
        ("bert_cross", {}, ("LABEL_0",)),
    ],
)
def test_labels_are_those_of_config_json_and_the_users(
    family: str, overrides: dict[str, Any], expected: tuple[str, ...], serve: Callable[..., Engine]
) -> None:
    assert serve(family, hf_overrides=overrides).model.labels == expected


def _activation_fn(name: str) -> dict[str, Any]:
    return {"problem_type": None, "sentence_transformers": {"activation_fn": f"torch.nn.modules.{name}"}}


@pytest.mark.parametrize(
    ("overrides", "activation"),
    [
        ({"problem_type": "multi_label_classification"}, torch.sigmoid),
        ({"problem_type": "regression"}, lambda x: x),
        (_activation_fn("linear.Identity"), lambda x: x),
        (_activation_fn("activation.Tanh"), torch.tanh),
        ({"problem_type": None, "sentence_transformers": {"activation_fn": "torch.nn.Tanh"}}, torch.tanh),
        (_activation_fn("activation.Sigmoid"), lambda x: x.softmax(-1)),
    ],
)
def test_the_user_can_name_another_activation(
    overrides: dict[str, Any],
    activation: Any,
    serve: Callable[..., Engine],
    oracle: Callable[..., HeadOracle],
) -> None:
    engine, theirs = serve("bert_3", hf_overrides=overrides), oracle("bert_3")
    logits = theirs.logits(theirs.tokenizer(TEXTS[0])["input_ids"])
    assert close(engine.rows(TEXTS[:1], "classify")[0], activation(logits))


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "torch.nn.modules.linear.Linear",
        "torch.nn.modules.nothing.Here",
        "torch.nn.modules.activation.X",
        "torch.nn.modules.linear.Tensor",
        "torch.nn.Linear",
    ],
)
def test_an_activation_that_is_none_is_refused(name: str, checkpoint: Callable[[str], Path]) -> None:
    overrides = {"sentence_transformers": {"activation_fn": name}}
    with pytest.raises(ConfigError, match="Activation"):
        build(EngineConfig(model=str(checkpoint("bert_cross")), hf_overrides=overrides))


# ── sentence-transformers ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("family", "activation"),
    [("xlmr_cross", None), ("xlmr_cross", torch.nn.Identity()), ("bert_cross", torch.nn.Sigmoid())],
)
def test_a_cross_encoder_saved_by_sentence_transformers_scores_as_it_does_there(
    family: str,
    activation: Any,
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    start: Callable[..., Engine],
) -> None:
    """The activation stands in config_sentence_transformers.json, of version 6, and wins over config.json's."""
    saved = CrossEncoder(str(checkpoint(family)), activation_fn=activation, device="cpu")
    saved.save_pretrained(str(tmp_path / "saved"))
    documents = [
        document for document in DOCUMENTS if document
    ]  # it makes a pair of an empty text, others do not
    expected = torch.from_numpy(saved.predict([(QUERY, document) for document in documents]))
    assert close(scores(start(tmp_path / "saved").score([QUERY], documents).scores), expected)


def _of_modules(base: Path, folder: Path, mode: Any, *, layers: int = 1) -> CrossEncoder:
    """A cross-encoder with pooling and `layers` of its own behind a model that has no head, saved in `folder`."""
    torch.manual_seed(4)
    wider = [Dense(tiny.HIDDEN, tiny.HIDDEN, activation_function=torch.nn.GELU()) for _ in range(layers - 1)]
    last = Dense(tiny.HIDDEN, 1, activation_function=torch.nn.Identity(), module_output_name="scores")
    modules = [Transformer(str(base)), Pooling(tiny.HIDDEN, pooling_mode=mode), *wider, last]
    saved = CrossEncoder(modules=modules, device="cpu")
    saved.save_pretrained(str(folder))
    return saved


@pytest.mark.parametrize(
    ("family", "mode", "layers"), [("bert", "cls", 2), ("modernbert", "mean", 1), ("qwen2", "lasttoken", 1)]
)
def test_a_cross_encoder_made_of_modules_scores_as_it_does_there(
    family: str,
    mode: str,
    layers: int,
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    start: Callable[..., Engine],
) -> None:
    """By its class it is an embedding model; its files put a layer behind the pooling that makes one number."""
    saved = _of_modules(checkpoint(family), tmp_path / "saved", mode, layers=layers)
    engine = start(tmp_path / "saved")
    documents = [document for document in DOCUMENTS if document]
    expected = torch.from_numpy(saved.predict([(QUERY, document) for document in documents]))
    assert close(scores(engine.score([QUERY], documents).scores), expected)
    assert engine.model.tasks == {"classify", "token_classify"}
    assert engine.model.labels == ("LABEL_0",)


def test_a_cross_encoder_of_other_modules_is_refused(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    _of_modules(checkpoint("bert"), tmp_path / "saved", "cls")
    tiny.edit_json(tmp_path / "saved/1_Pooling/config.json", pooling_mode=["cls", "mean"])
    with pytest.raises(
        ConfigError, match=r"makes a cross-encoder of Transformer, Pooling, Dense; carpool serves"
    ):
        build(EngineConfig(model=str(tmp_path / "saved")))


def test_a_classifier_saved_by_sentence_transformers_keeps_its_logits(
    checkpoint: Callable[[str], Path],
    oracle: Callable[..., HeadOracle],
    tmp_path: Path,
    start: Callable[..., Engine],
) -> None:
    """Several labels: what is written is Identity, which only a `problem_type` would overrule."""
    CrossEncoder(str(checkpoint("bert_2")), device="cpu").save_pretrained(str(tmp_path / "saved"))
    theirs = oracle("bert_2")
    rows = start(tmp_path / "saved").rows(TEXTS[:3], "classify")
    expected = [theirs.logits(theirs.tokenizer(text)["input_ids"]) for text in TEXTS[:3]]
    assert all(close(a, b) for a, b in zip(rows, expected, strict=True))


def test_a_language_model_that_sentence_transformers_reranks_with_is_not_taken_for_an_embedding_model(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    saved = CrossEncoder(str(checkpoint("qwen3_lm")), device="cpu")
    saved.save_pretrained(str(tmp_path / "saved"))
    each: list[dict[str, Any]] = [
        {},
        {"hf_overrides": _QWEN, "chat_template": tiny_heads.SCORE_TEMPLATE},
    ]
    for options in each:
        made = build(EngineConfig(model=str(tmp_path / "saved"), **options))
        assert made.model.score_type == "cross-encoder"


_SEVERAL = [
    ("cls", "mean"),
    ("max", "mean", "lasttoken"),
    ("weightedmean", "mean_sqrt_len_tokens"),
    tiny.ST_MODES,
]


@pytest.mark.parametrize("modes", [*((mode,) for mode in tiny.ST_MODES), *_SEVERAL], ids="+".join)
@pytest.mark.parametrize("dialect", ["old", "new"])
def test_pooling_of_any_modes_is_sentence_transformers(
    modes: tuple[str, ...], dialect: str, fresh: Callable[[str], Path]
) -> None:
    path = fresh("bert")
    tiny.sentence_transformers_files(path, modes, dialect=dialect, normalize=len(modes) % 2 == 0)
    theirs = SentenceTransformer(str(path), device="cpu")
    expected = [torch.from_numpy(theirs.encode(text)) for text in TEXTS[:5]]
    parts = build(EngineConfig(model=str(path), cpu_workers=1, dtype="float32"))
    assert parts.model.embedding_size == len(modes) * tiny.HIDDEN
    rows = answer(parts, parts.tokenizer.encode(TEXTS[:5]), "embed")
    assert all(close(a, b) for a, b in zip(rows, expected, strict=True))


def test_a_head_made_for_several_modes_takes_no_single_token(fresh: Callable[[str], Path]) -> None:
    path = fresh("bert")
    tanh = "torch.nn.modules.activation.Tanh"
    tiny.sentence_transformers_files(path, ["cls", "mean"], dense=[(2 * tiny.HIDDEN, 24, tanh)])
    theirs = SentenceTransformer(str(path), device="cpu")
    parts = build(EngineConfig(model=str(path), cpu_workers=1, dtype="float32"))
    assert parts.model.tasks == {"embed"}
    (row,) = answer(parts, parts.tokenizer.encode(TEXTS[:1]), "embed")
    assert close(row, torch.from_numpy(theirs.encode(TEXTS[0])))
    with pytest.raises(ConfigError, match="Unsupported task: 'token_embed'; this model supports embed"):
        build(EngineConfig(model=str(path), pooler_config=PoolerConfig(task="token_embed")))


def test_tokens_of_a_model_of_several_modes_have_vectors_without_them(fresh: Callable[[str], Path]) -> None:
    path = fresh("bert")
    tiny.sentence_transformers_files(path, ["cls", "mean"])
    parts = build(EngineConfig(model=str(path), cpu_workers=1, dtype="float32"))
    ids = parts.tokenizer.encode(TEXTS[:1])
    hidden = HeadOracle(path, AutoModel).hidden(ids[0])
    assert close(answer(parts, ids, "token_embed")[0], hidden / hidden.norm(dim=1, keepdim=True))


# ── long texts ───────────────────────────────────────────────────────────────────────────────────────────────

LONG = "the cat sat on a mat in spain " * 30


@pytest.mark.parametrize("normalize", [True, False])
def test_a_long_text_is_embedded_in_slices_of_its_own_tokens(
    normalize: bool, serve: Callable[..., Engine], checkpoint: Callable[[str], Path]
) -> None:
    engine = serve(
        "bert",
        max_model_len=50,
        pooler_config=PoolerConfig(enable_chunked_processing=True, use_activation=normalize),
    )
    assert engine.model.max_embed_len is None
    theirs = Oracle(checkpoint("bert"), ["mean"], normalize=normalize)
    ids = theirs.ids(LONG)
    slices = [ids[i : i + 50] for i in range(0, len(ids), 50)]  # special tokens at the ends of the text only
    assert len(slices) == 5
    assert len(slices[-1]) < 50
    expected = torch.stack([len(part) * theirs.embed(part) for part in slices]).sum(0) / len(ids)
    if normalize:
        expected = expected / expected.norm()
    result = engine.pool([LONG, "a", LONG + LONG])
    assert close(torch.from_numpy(result.rows[0]), expected)
    assert close(torch.from_numpy(result.rows[1]), theirs.embed(theirs.ids("a")))
    assert result.prompt_tokens == len(ids) + 3 + 2 * len(ids) - 2
    assert result.prompt_token_ids[0] == ids


def test_a_long_text_of_exactly_one_slice_is_just_embedded(
    serve: Callable[..., Engine], checkpoint: Callable[[str], Path]
) -> None:
    engine = serve("bert", max_model_len=50, pooler_config=PoolerConfig(enable_chunked_processing=True))
    theirs = Oracle(checkpoint("bert"), ["mean"])
    ids = theirs.ids(LONG)[:50]
    assert close(engine.rows([ids])[0], theirs.embed(ids))


def test_slices_have_a_bound_that_can_be_set(serve: Callable[..., Engine]) -> None:
    pooler = PoolerConfig(enable_chunked_processing=True, max_embed_len=100)
    engine = serve("bert", max_model_len=50, pooler_config=pooler)
    assert engine.model.max_embed_len == 100
    assert engine.pool([list(range(5, 35)) * 3]).prompt_tokens == 90
    with pytest.raises(InputTooLong, match="maximum context length is 100 tokens"):
        engine.pool([LONG])
    for truncate, length in ((-1, 100), (70, 70), (10, 10)):
        assert engine.pool([LONG], truncate_prompt_tokens=truncate).prompt_tokens == length
    with pytest.raises(InvalidParameter, match="Please request a smaller truncation size"):
        engine.pool([LONG], truncate_prompt_tokens=101)


def test_a_text_longer_than_a_batch_is_embedded_in_slices(
    serve: Callable[..., Engine], checkpoint: Callable[[str], Path]
) -> None:
    pooler = PoolerConfig(enable_chunked_processing=True, use_activation=False)
    engine = serve("bert", max_model_len=50, max_num_batched_tokens=64, pooler_config=pooler)
    theirs = Oracle(checkpoint("bert"), ["mean"], normalize=False)
    ids = theirs.ids(LONG)
    assert len(ids) > 64
    slices = [ids[i : i + 50] for i in range(0, len(ids), 50)]
    expected = torch.stack([len(part) * theirs.embed(part) for part in slices]).sum(0) / len(ids)
    assert close(torch.from_numpy(engine.pool([LONG]).rows[0]), expected)


def test_texts_to_embed_have_a_bound_of_their_own_without_slices(serve: Callable[..., Engine]) -> None:
    engine = serve("bert", max_model_len=50, pooler_config=PoolerConfig(max_embed_len=8))
    assert engine.model.max_embed_len == 8
    with pytest.raises(InputTooLong, match="maximum context length is 8 tokens"):
        engine.pool([LONG])
    assert engine.pool([LONG], truncate_prompt_tokens=-1).prompt_tokens == 8
    assert engine.pool(["a"], padding="max_length").prompt_tokens == 8
    assert engine.pool([list(range(5, 35))], "token_embed").prompt_tokens == 30
    engine = serve("bert", max_model_len=50, pooler_config=PoolerConfig(max_embed_len=60))
    assert engine.model.max_embed_len == 50


def test_other_tasks_take_no_text_in_slices(serve: Callable[..., Engine]) -> None:
    engine = serve("bert", max_model_len=50, pooler_config=PoolerConfig(enable_chunked_processing=True))
    with pytest.raises(InputTooLong, match="maximum context length is 50 tokens"):
        engine.pool([LONG], "token_embed")


def test_a_cut_long_text_is_still_of_unit_length(serve: Callable[..., Engine]) -> None:
    engine = serve("qwen3", max_model_len=20, pooler_config=PoolerConfig(enable_chunked_processing=True))
    (row,) = engine.rows([LONG], params=PoolingParams(dimensions=8))
    assert row.shape == (8,)
    assert row.norm().item() == pytest.approx(1, abs=1e-5)


# ── company ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("family", "tasks"),
    [
        ("bert", ("embed", "token_embed")),
        ("qwen3", ("embed", "token_embed")),
        ("bert_3", ("classify", "token_classify")),
        ("eurobert_late", ("classify", "token_classify")),
        ("qwen2_3", ("classify", "token_classify")),
        ("gemma3_both_ways", ("classify", "token_classify")),
    ],
)
def test_whatever_mix_of_tasks_rides_in_a_batch_each_text_comes_out_as_alone(
    family: str, tasks: tuple[Task, Task], serve: Callable[..., Engine]
) -> None:
    engine = serve(family, cpu_workers=2, max_num_batched_tokens=300)
    calls = [
        (TEXTS[i : i + 3], tasks[i % 2], PoolingParams(use_activation=wish))
        for i in range(len(TEXTS) - 2)
        for wish in (None, False)
    ]
    together = engine.all(*calls)
    for (prompts, task, params), result in zip(calls, together, strict=True):
        for prompt, row in zip(prompts, result.rows, strict=True):
            (alone,) = engine.pool([prompt], task, params).rows
            assert close(torch.from_numpy(row), torch.from_numpy(alone))


def test_pairs_and_single_texts_ride_together(serve: Callable[..., Engine]) -> None:
    """Of one batch, the pairs have a second type and the texts have none."""
    engine = serve("bert_cross")

    async def both() -> tuple[ScoreResult, PoolingResult]:
        one, other = PoolingParams(), TokenizationParams()
        return await asyncio.gather(
            engine.engine.score([QUERY], DOCUMENTS, one, other),
            engine.engine.pool(TEXTS, one, other, task="classify"),
        )

    scored, classified = engine._loop.run(both())
    assert close(scores(scored.scores), scores([engine.score([QUERY], [d]).scores[0] for d in DOCUMENTS]))
    alone = [engine.rows([text], "classify")[0] for text in TEXTS]
    assert all(close(torch.from_numpy(a), b) for a, b in zip(classified.rows, alone, strict=True))


def test_vectors_of_tokens_obey_the_widths_of_the_model(serve: Callable[..., Engine]) -> None:
    (row,) = serve("qwen3").rows(["the cat"], "token_embed", PoolingParams(dimensions=8))
    assert row.shape[1] == 8
    assert torch.allclose(row.norm(dim=1), torch.ones(len(row)), atol=1e-5)
    with pytest.raises(InvalidParameter, match="does not support matryoshka representation"):
        serve("bert").pool(["a"], "token_embed", PoolingParams(dimensions=8))


def test_a_conversation_is_rendered_by_the_engine(serve: Callable[..., Engine]) -> None:
    engine = serve(
        "qwen2_3", chat_template="{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    text = engine.engine.render([{"role": "user", "content": [{"type": "text", "text": "hi"}]}])
    assert text == "user: hi\n"
    with pytest.raises(InvalidInput, match="no chat template"):
        serve("bert_3").engine.render([{"role": "user", "content": "hi"}])
