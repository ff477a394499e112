"""LLM: the reference's examples of every task as printed there, and what else scripts say."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

import carpool
import tiny_heads
from carpool.engine.errors import ConfigError, InvalidInput, InvalidParameter, UnsupportedTask
from carpool.engine.llm import LLM
from carpool.engine.llm_absent import ABSENT
from carpool.engine.params import PoolingParams
from goldens import SHARED
from head_oracle import HeadOracle, close
from tiny_adapters import write_lora

REFERENCE = SHARED / "reference"
TEXTS = ["the cat sat on a mat", "a", "rain in spain"]
# The reference's models, and the tiny ones that stand for them.
STAND_INS = {
    "intfloat/e5-small": "bert",
    "intfloat/e5-mistral-7b-instruct": "mistral",
    "jason9693/Qwen2.5-1.5B-apeach": "qwen2_3",
    "BAAI/bge-reranker-v2-m3": "xlmr_cross",
    "internlm/internlm2-1_8b-reward": "qwen2_reward",
    "Qwen/Qwen2.5-Math-RM-72B": "qwen2_reward",
    "jinaai/jina-embeddings-v3": "qwen3",
}

# As printed, page by page (the newer one imports `from vllm`, where ours is `from carpool`).
NEWER = [
    """
llm = LLM(model="intfloat/e5-small", runner="pooling")
(output,) = llm.embed("Hello, my name is")

embeds = output.outputs.embedding
print(f"Embeddings: {embeds!r} (size={len(embeds)})")
""",
    """
llm = LLM(model="jason9693/Qwen2.5-1.5B-apeach", runner="pooling")
(output,) = llm.classify("Hello, my name is")

probs = output.outputs.probs
print(f"Class Probabilities: {probs!r} (size={len(probs)})")
""",
    """
llm = LLM(model="BAAI/bge-reranker-v2-m3", runner="pooling")
(output,) = llm.score(
    "What is the capital of France?",
    "The capital of Brazil is Brasilia.",
)

score = output.outputs.score
print(f"Score: {score}")
""",
    """
llm = LLM(model="internlm/internlm2-1_8b-reward", runner="pooling", trust_remote_code=True)
(output,) = llm.reward("Hello, my name is")

data = output.outputs.data
print(f"Data: {data!r}")
""",
    """
llm = LLM(model="intfloat/e5-small", runner="pooling")
(output,) = llm.encode("Hello, my name is", pooling_task="embed")

data = output.outputs.data
print(f"Data: {data!r}")
""",
    """
llm = LLM(
    model="jinaai/jina-embeddings-v3",
    runner="pooling",
    trust_remote_code=True,
)
outputs = llm.embed(
    ["Follow the white rabbit."],
    pooling_params=PoolingParams(dimensions=32),
)
print(outputs[0].outputs)
""",
]
OLDER = [
    """
llm = LLM(model="Qwen/Qwen2.5-Math-RM-72B", task="reward")
(output,) = llm.encode("Hello, my name is")

data = output.outputs.data
print(f"Data: {data!r}")
""",
    """
llm = LLM(model="intfloat/e5-mistral-7b-instruct", task="embed")
(output,) = llm.embed("Hello, my name is")

embeds = output.outputs.embedding
print(f"Embeddings: {embeds!r} (size={len(embeds)})")
""",
    """
llm = LLM(model="jason9693/Qwen2.5-1.5B-apeach", task="classify")
(output,) = llm.classify("Hello, my name is")

probs = output.outputs.probs
print(f"Class Probabilities: {probs!r} (size={len(probs)})")
""",
    """
llm = LLM(model="BAAI/bge-reranker-v2-m3", task="score")
(output,) = llm.score("What is the capital of France?",
                      "The capital of Brazil is Brasilia.")

score = output.outputs.score
print(f"Score: {score}")
""",
]
_LIST = r"\[-?[\d.e-]+(, -?[\d.e-]+)*\]"
PRINTED = {
    "Embeddings": rf"Embeddings: {_LIST} \(size=32\)",
    "Class Probabilities": rf"Class Probabilities: {_LIST} \(size=3\)",
    "Score": r"Score: 0\.\d+",
    "Data": r"Data: tensor\(\[.*\]\)",
    "outputs[0].outputs": r"EmbeddingOutput\(hidden_size=32\)",
}


@pytest.fixture(scope="module")
def llm(checkpoint: Callable[[str], Path]) -> Iterator[Callable[..., LLM]]:
    made: dict[str, LLM] = {}

    def of(family: str, **options: Any) -> LLM:
        key = f"{family} {options}"
        if key not in made:
            made[key] = LLM(str(checkpoint(family)), **{"dtype": "float32", "cpu_workers": 1, **options})
        return made[key]

    yield of
    for one in made.values():
        one.close()


@pytest.fixture(scope="module")
def oracle(checkpoint: Callable[[str], Path]) -> Callable[..., HeadOracle]:
    return cache(lambda family: HeadOracle(checkpoint(family)))


# ── the reference's pages ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "example", [*NEWER, *OLDER], ids=lambda text: re.sub(r"\W+", "-", text[:60]).strip("-")
)
def test_an_example_of_the_reference_runs_as_printed(
    example: str, checkpoint: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for name, family in STAND_INS.items():
        example = example.replace(name, str(checkpoint(family)))
    scope: dict[str, Any] = {}
    exec("from carpool import LLM, PoolingParams\n" + example, scope)
    scope["llm"].close()
    printed = capsys.readouterr().out.strip()
    expected = next(pattern for start, pattern in PRINTED.items() if f"{start}" in example)
    assert re.fullmatch(expected, printed, re.DOTALL), printed


@pytest.mark.skipif(not REFERENCE.is_dir(), reason="the reference's pages are not here")
def test_the_examples_are_the_references_own() -> None:
    """Word for word: the pages lost their line breaks and indents, so blanks do not count."""
    pages = re.sub(r"\s", "", "".join(path.read_text() for path in sorted(REFERENCE.glob("*.txt"))))
    for example in (*NEWER, *OLDER):
        assert re.sub(r"\s", "", example) in pages


# ── classify ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_classify_gives_probabilities_and_logits(
    llm: Callable[..., LLM], oracle: Callable[..., HeadOracle]
) -> None:
    theirs = oracle("bert_3")
    logits = [theirs.logits(theirs.tokenizer(text)["input_ids"]) for text in TEXTS]
    outputs = llm("bert_3").classify(TEXTS)
    assert all(
        close(torch.tensor(o.outputs.probs), x.softmax(-1)) for o, x in zip(outputs, logits, strict=True)
    )
    assert [o.outputs.num_classes for o in outputs] == [3, 3, 3]
    assert repr(outputs[0].outputs) == "ClassificationOutput(num_classes=3)"
    assert outputs[0].prompt_token_ids == theirs.tokenizer(TEXTS[0])["input_ids"]
    assert [o.request_id for o in outputs] == ["0", "1", "2"]
    raw = llm("bert_3").classify(TEXTS, pooling_params=PoolingParams(use_activation=False))
    assert all(close(torch.tensor(o.outputs.probs), x) for o, x in zip(raw, logits, strict=True))


@pytest.mark.parametrize("alias", ["use_activation", "activation", "softmax", "normalize"])
def test_each_prompt_may_have_parameters_of_its_own(alias: str, llm: Callable[..., LLM]) -> None:
    wishes: list[dict[str, Any]] = [{alias: wish} for wish in (True, False, True)]
    params = [PoolingParams(**wish) for wish in wishes]
    sums = [sum(o.outputs.probs) for o in llm("bert_3").classify(TEXTS, pooling_params=params)]
    assert sums[0] == pytest.approx(1)
    assert sums[1] != pytest.approx(1, abs=1e-3)
    assert sums[2] == pytest.approx(1)


def test_prompts_are_texts_ids_or_dicts_of_them(llm: Callable[..., LLM]) -> None:
    one = llm("bert_3")
    (first,) = one.classify(TEXTS[0])
    ids = first.prompt_token_ids
    prompts: list[Any] = [ids, {"prompt": TEXTS[0]}, {"prompt_token_ids": ids}, [TEXTS[0]], [ids]]
    for prompt in prompts:
        (same,) = one.classify(prompt)
        assert close(torch.tensor(same.outputs.probs), torch.tensor(first.outputs.probs))
    assert len(one.classify(prompts[:3])) == 3


# ── score ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_score_takes_one_to_one_one_to_many_and_many_to_many(
    llm: Callable[..., LLM], oracle: Callable[..., HeadOracle]
) -> None:
    theirs, one = oracle("xlmr_cross"), llm("xlmr_cross")

    def expected(query: str, document: str) -> float:
        return float(torch.sigmoid(theirs.logits(*theirs.pair(query, document))))

    for queries, documents in (
        (TEXTS[0], TEXTS[1]),
        (TEXTS[0], TEXTS),
        ([TEXTS[0]], TEXTS),
        (TEXTS, TEXTS[::-1]),
    ):
        many = [documents] if isinstance(documents, str) else documents
        firsts = [queries] if isinstance(queries, str) else queries
        firsts = firsts * len(many) if len(firsts) == 1 else firsts
        outputs = one.score(queries, documents, use_tqdm=False)
        pairs = list(zip(firsts, many, strict=True))
        assert [o.outputs.score for o in outputs] == pytest.approx(
            [expected(q, d) for q, d in pairs], abs=1e-5
        )
        assert [o.prompt_token_ids for o in outputs] == [theirs.pair(q, d)[0] for q, d in pairs]
    with pytest.raises(InvalidInput, match="Input lengths must be either 1:1, 1:N or N:N"):
        one.score(TEXTS, TEXTS[:2])


def test_score_takes_texts_in_parts(llm: Callable[..., LLM]) -> None:
    plain = llm("bert").score("the cat", ["a mat\nin spain", "night"])
    parts: list[dict[str, Any]] = [
        {"content": [{"type": "text", "text": "a mat"}, {"type": "text", "text": "in spain"}]},
        {"content": "night"},
    ]
    same = llm("bert").score({"content": [{"type": "text", "text": "the cat"}]}, parts)
    assert [o.outputs.score for o in same] == [o.outputs.score for o in plain]
    with pytest.raises(InvalidInput, match="This model accepts text only"):
        llm("bert").score("a", {"content": [{"type": "image_url", "image_url": {"url": "x"}}]})
    with pytest.raises(TypeError, match=r"data_2\[0\] is a text or"):
        llm("bert").score("a", [3])  # type: ignore[list-item]


def test_score_of_an_embedding_model_is_the_cosine_or_late_interaction(llm: Callable[..., LLM]) -> None:
    one = llm("bert")
    a, b = (torch.tensor(o.outputs.embedding) for o in one.embed(TEXTS[:2]))
    (output,) = one.score(TEXTS[0], TEXTS[1])
    assert output.outputs.score == pytest.approx(float(a @ b), abs=1e-5)
    late = llm("bert", pooler_config={"task": "token_embed"})
    x, y = (o.outputs.data for o in late.encode(TEXTS[:2]))
    (output,) = late.score(TEXTS[0], TEXTS[1])
    assert output.outputs.score == pytest.approx(float((x @ y.T).max(1).values.sum()), abs=1e-4)


def test_score_may_bring_its_template(llm: Callable[..., LLM], oracle: Callable[..., HeadOracle]) -> None:
    theirs = oracle("qwen2_cross")
    (output,) = llm("qwen2_cross").score(
        "q", "d", chat_template=tiny_heads.SCORE_TEMPLATE, chat_template_kwargs={"instruction": "say"}
    )
    logits = theirs.logits(theirs.tokenizer("say: q ? d =")["input_ids"])
    assert output.outputs.score == pytest.approx(float(torch.sigmoid(logits)), abs=1e-5)
    params = PoolingParams(extra_kwargs={"chat_template_kwargs": {"instruction": "say"}})
    (same,) = llm("qwen2_cross").score(
        "q", "d", chat_template=tiny_heads.SCORE_TEMPLATE, pooling_params=params
    )
    assert same.outputs.score == output.outputs.score


def test_score_cuts_as_it_is_told(llm: Callable[..., LLM]) -> None:
    one = llm("xlmr_cross")
    (cut,) = one.score("the cat " * 40, "the mat " * 90, truncate_prompt_tokens=20)
    assert len(cut.prompt_token_ids) == 20
    (cut,) = one.score("the cat", "the mat " * 20, tokenization_kwargs={"max_tokens_per_doc": 5})
    assert len(cut.prompt_token_ids) == 4 + 2 + 5
    (cut,) = one.score("the cat", "the mat " * 200, tokenization_kwargs={"truncation": True})
    assert len(cut.prompt_token_ids) == 128


# ── reward, encode ───────────────────────────────────────────────────────────────────────────────────────────


def test_reward_gives_a_number_a_token(llm: Callable[..., LLM]) -> None:
    outputs = llm("qwen2_reward").reward(TEXTS)
    for output in outputs:
        assert output.outputs.data.shape == (len(output.prompt_token_ids), 1)
    for task in ("reward", "token_classify", "encode", None):
        same = llm("qwen2_reward").encode(TEXTS, pooling_task=task)
        assert [o.outputs.data.tolist() for o in same] == [o.outputs.data.tolist() for o in outputs]


@pytest.mark.parametrize(
    ("family", "shapes"),
    [
        ("bert", {"embed": (32,), "token_embed": (8, 32), "encode": (8, 32), None: (32,)}),
        (
            "bert_3",
            {"classify": (3,), "token_classify": (8, 3), "encode": (8, 3), "reward": (8, 3), None: (3,)},
        ),
        ("bert_cross", {"classify": (1,), "score": (1,), None: (1,)}),
        ("bert_tokens", {"token_classify": (8, 5), "encode": (8, 5), None: (8, 5)}),
    ],
)
def test_encode_gives_what_is_asked_for_or_what_the_model_is_for(
    family: str, shapes: dict[str | None, tuple[int, ...]], llm: Callable[..., LLM]
) -> None:
    for task, shape in shapes.items():
        (output,) = llm(family).encode("the cat sat on a mat", pooling_task=task)
        assert tuple(output.outputs.data.shape) == shape
        assert output.outputs.data.dtype == torch.float32


def test_what_the_model_cannot_do_is_said_with_a_way_out(llm: Callable[..., LLM]) -> None:
    for call, sentence in (
        (lambda: llm("bert_3").embed("a"), "Embedding API is not supported by this model. Try converting the model "
         "using `--convert embed`."),
        (lambda: llm("bert").classify("a"), "Classification API is not supported by this model. Try converting the "
         "model using `--convert classify`."),
        (lambda: llm("bert").reward("a"), "Reward API is not supported by this model. Try converting the model "
         "using `--convert reward`."),
        (lambda: llm("bert_3").score("a", "b"), "Scoring API is only enabled for num_labels == 1."),
        (lambda: llm("bert_tokens").score("a", "b"), "This model does not support the Scoring API."),
        (lambda: llm("bert").encode("a", pooling_task="token_classify"), "Classification API is not supported by this "
         "model. Try converting the model using `--convert classify`."),
        (lambda: llm("bert_3").encode("a", pooling_task="token_embed"), "Embedding API is not supported by this model. "
         "Try converting the model using `--convert embed`."),
        (lambda: llm("bert").encode("a", pooling_task="sparse_embed"),
         "Unsupported task: 'sparse_embed' Supported tasks: embed, token_embed."),
        (lambda: llm("bert").encode("a", pooling_task="plugin"),
         "No IOProcessor plugin installed. carpool has none: send texts or token ids."),
        (lambda: llm("bert").encode("a", pooling_task="generate"),
         "pooling_task='generate' is not one of embed, classify, token_embed, sparse_embed, token_classify, encode, "
         "reward, score."),
    ):  # fmt: skip
        with pytest.raises(UnsupportedTask) as refused:
            call()
        assert str(refused.value) == sentence


def test_the_ways_out_lead_somewhere(checkpoint: Callable[[str], Path]) -> None:
    for family, convert, call in (("bert_3", "embed", "embed"), ("bert", "reward", "reward")):
        one = LLM(str(checkpoint(family)), convert=convert, dtype="float32", cpu_workers=1)
        assert getattr(one, call)("a")
        one.close()


# ── options ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("family", "task", "tasks"),
    [
        ("bert", "embed", {"embed", "token_embed"}),
        ("bert", "score", {"embed", "token_embed"}),
        ("bert", "auto", {"embed", "token_embed"}),
        ("bert_3", "classify", {"classify", "token_classify"}),
        ("bert_3", "embed", {"embed", "token_embed"}),
        ("bert_tokens", "classify", {"token_classify"}),
        ("xlmr_cross", "score", {"classify", "token_classify"}),
        ("qwen2_prm", "reward", {"token_classify"}),
        ("qwen2", "reward", {"token_classify"}),
    ],
)
def test_the_older_task_says_what_to_make_of_a_model(
    family: str, task: str, tasks: set[str], llm: Callable[..., LLM]
) -> None:
    assert llm(family, task=task)._engine.model.tasks == tasks


@pytest.mark.parametrize("task", ["generate", "transcription", "clasify"])
def test_other_tasks_are_refused_before_anything_is_loaded(task: str) -> None:
    with pytest.raises(ConfigError, match=f"task='{task}' is not one of auto, embed"):
        LLM("/nowhere", task=task)


def test_the_pooler_configuration_is_a_dict_or_an_object_under_either_name(llm: Callable[..., LLM]) -> None:
    config: dict[str, Any] = {"pooling_type": "MEAN", "use_activation": False}
    for options in (
        {"pooler_config": config},
        {"override_pooler_config": config},
        {"pooler_config": carpool.PoolerConfig(**config)},
        {"override_pooler_config": carpool.PoolerConfig(**config)},
    ):
        model = llm("xlmr", **options)._engine.model
        assert (model.pooling, model.normalize) == ("mean", False)
    with pytest.raises(
        ConfigError, match="pooler_config has no option 'pooling_typ'; did you mean 'pooling_type'"
    ):
        LLM("/nowhere", pooler_config={"pooling_typ": "MEAN"})
    with pytest.raises(ConfigError, match="pooler_config is a dict or a PoolerConfig, not 'MEAN'"):
        LLM("/nowhere", pooler_config="MEAN")


def test_options_may_be_torchs_own_or_the_words_of_a_command_line(llm: Callable[..., LLM]) -> None:
    made = llm("bert", dtype=torch.bfloat16, max_model_len="auto").model_info
    assert (made.dtype, made.max_model_len) == ("bfloat16", llm("bert").model_info.max_model_len)


def test_overrides_make_a_reranker_of_a_language_model(llm: Callable[..., LLM]) -> None:
    overrides = {
        "architectures": ["Qwen3ForSequenceClassification"],
        "classifier_from_token": ["no", "yes"],
        "is_original_qwen3_reranker": True,
    }
    one = llm("qwen3_lm", runner="pooling", hf_overrides=overrides, chat_template=tiny_heads.SCORE_TEMPLATE)
    (output,) = one.score("where is the cat", "the cat sat on a mat")
    assert 0 < output.outputs.score < 1


def test_overrides_may_be_a_function_of_the_configuration(checkpoint: Callable[[str], Path]) -> None:
    def renamed(config: Any) -> Any:
        config.id2label = {0: "low", 1: "middle", 2: "high"}
        return config

    one = LLM(str(checkpoint("bert_3")), hf_overrides=renamed, served_model_name="any", cpu_workers=1)
    assert one.model_info.labels == ("low", "middle", "high")
    one.close()
    wrong: list[tuple[Any, str]] = [
        ([1], r"hf_overrides is a dict, or a function of the configuration, not \[1\]"),
        (lambda config: None, "must return the configuration, not None"),
    ]
    for overrides, message in wrong:
        with pytest.raises(ConfigError, match=message):
            LLM(str(checkpoint("bert_3")), hf_overrides=overrides)


def test_a_judge_of_steps_is_configured_in_one_line(llm: Callable[..., LLM]) -> None:
    tag = llm("qwen3_lm").embed(tiny_heads.STEP)[0].prompt_token_ids[0]
    config = {"pooling_type": "STEP", "step_tag_id": tag, "returned_token_ids": [20, 30]}
    judge = llm("qwen3_lm", task="reward", pooler_config=config)
    (output,) = judge.encode(f"the cat{tiny_heads.STEP}sat{tiny_heads.STEP}")
    assert output.outputs.data.shape == (2, 2)
    assert output.outputs.data.sum(1).tolist() == pytest.approx([1, 1])


def test_tokenization_can_be_told_in_a_tokenizers_words(llm: Callable[..., LLM]) -> None:
    def length(text: Any, **kwargs: Any) -> int:
        return len(llm("bert_3").classify(text, tokenization_kwargs=kwargs)[0].prompt_token_ids)

    long = "the cat sat " * 10
    assert length(long) == 32
    assert length(long, add_special_tokens=False) == 30
    assert length(long, max_length=10) == 10
    assert length(long, truncation=True, max_length=10) == 10
    assert length(long, truncation=False, max_length=10) == 32
    assert length(long, truncation="do_not_truncate", max_length=10) == 32
    assert length(long, padding=True) == length(long, padding="longest") == length(long, padding=False) == 32
    assert length(long, padding="max_length") == length(long, padding="max_length", max_length=128) == 128
    with pytest.raises(InvalidParameter, match="fills up to the model's 128 tokens, not to max_length=40"):
        length(long, padding="max_length", max_length=40)
    assert length(long * 9, truncation=True) == 128
    assert length(long, truncate_prompt_tokens=7, truncation_side="left") == 7
    with pytest.raises(InvalidParameter, match="tokenization_kwargs has no 'stride'"):
        length(long, stride=3)
    for name, value in (("truncation", "yes"), ("truncation", []), ("padding", "left"), ("padding", [1])):
        with pytest.raises(InvalidParameter, match=f"{name} must be one of None, ") as refused:
            length(long, **{name: value})
        assert refused.value.param == name
    with pytest.raises(InvalidParameter, match=r"max_tokens_per_doc are for LLM\.score"):
        length(long, max_tokens_per_doc=3)
    with pytest.raises(InvalidParameter, match="tokenization_kwargs must be a dict"):
        llm("bert_3").classify("a", tokenization_kwargs=["truncation"])  # type: ignore[arg-type]


def test_parameters_may_say_what_they_are_for_and_how_long(llm: Callable[..., LLM]) -> None:
    params = PoolingParams(task="classify", truncate_prompt_tokens=4)
    one = llm("bert_3")
    assert [
        len(o.prompt_token_ids) for o in one.classify(TEXTS[:1] * 2, pooling_params=[params, PoolingParams()])
    ] == [
        4,
        8,
    ]
    (output,) = one.classify(TEXTS[0], pooling_params=params, truncate_prompt_tokens=5)
    assert len(output.prompt_token_ids) == 5
    assert one.encode(TEXTS[0], params, pooling_task="classify")
    for call in (
        lambda: one.encode(TEXTS[0], params, pooling_task="token_classify"),
        lambda: llm("bert").embed(TEXTS[0], pooling_params=params),
        lambda: llm("bert").score(TEXTS[0], TEXTS[1], pooling_params=params),
    ):
        with pytest.raises(
            ValueError, match=r"You cannot overwrite param\.task='classify' with pooling_task="
        ):
            call()
    assert params.task == "classify"


def test_a_scores_parameters_may_cut_either_side(llm: Callable[..., LLM]) -> None:
    one, params = llm("xlmr_cross"), PoolingParams(extra_kwargs={"max_tokens_per_doc": 2})
    (whole,), (short,) = one.score("a cat", TEXTS[0]), one.score("a cat", TEXTS[0], pooling_params=params)
    (same,) = one.score("a cat", TEXTS[0], tokenization_kwargs={"max_tokens_per_doc": 2})
    assert len(short.prompt_token_ids) < len(whole.prompt_token_ids)
    assert short.outputs == same.outputs
    with pytest.raises(InvalidParameter, match="extra_kwargs has no 'max_tokens'"):
        one.score("a", "b", pooling_params=PoolingParams(extra_kwargs={"max_tokens": 2}))
    with pytest.raises(InvalidParameter, match="chat_template_kwargs must be a dict, got 5"):
        one.score("a", "b", chat_template_kwargs=5)  # type: ignore[arg-type]
    with pytest.raises(InvalidParameter, match=r"extra_kwargs is for LLM\.score"):
        one.classify("a", pooling_params=params)
    with pytest.raises(TypeError, match="made of PoolingParams, not of list"):
        one.score("a", "b", pooling_params=[params])  # type: ignore[arg-type]


def test_a_width_is_refused_where_there_is_none(llm: Callable[..., LLM]) -> None:
    params = PoolingParams(dimensions=2)
    for call in (
        lambda: llm("bert_3").classify("a", pooling_params=params),
        lambda: llm("xlmr_cross").score("a", "b", pooling_params=params),
    ):
        with pytest.raises(InvalidParameter, match="dimensions is for dense embeddings"):
            call()


def test_what_a_caller_did_wrong_is_a_value_error_as_in_the_reference(llm: Callable[..., LLM]) -> None:
    for call in (
        lambda: llm("bert").classify("a"),
        lambda: llm("bert").embed("the cat " * 200),
        lambda: llm("bert").embed([[-1]]),
        lambda: llm("bert").score(["a", "b"], "a"),
        lambda: llm("bert").embed("a", pooling_params=PoolingParams(dimensions=3)),
    ):
        with pytest.raises(ValueError):  # noqa: PT011  that it is one is what is tested
            call()


def test_answers_are_of_the_classes_of_the_reference(llm: Callable[..., LLM]) -> None:
    assert isinstance(llm("bert").embed("a")[0], carpool.EmbeddingRequestOutput)
    assert isinstance(llm("bert_3").classify("a")[0], carpool.ClassificationRequestOutput)
    assert isinstance(llm("bert").score("a", "b")[0], carpool.ScoringRequestOutput)
    assert isinstance(llm("bert").encode("a", pooling_task="token_embed")[0], carpool.PoolingRequestOutput)


def test_the_tokenizer_can_be_had_and_is_the_callers_own(llm: Callable[..., LLM]) -> None:
    one = llm("bert_3")
    theirs = one.get_tokenizer()
    (before,) = one.classify(TEXTS[0])
    assert theirs(TEXTS[0])["input_ids"] == before.prompt_token_ids
    assert theirs.truncation_side == "right"
    theirs.add_tokens([TEXTS[0]])
    assert one.classify(TEXTS[0])[0].prompt_token_ids == before.prompt_token_ids
    assert one.get_tokenizer()(TEXTS[0])["input_ids"] == before.prompt_token_ids


@pytest.fixture(scope="module")
def adapters(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two for qwen3: name → folder."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate("ab"):
        model = AutoModel.from_pretrained(checkpoint("qwen3"))
        write_lora(folder / name, model, seed, target_modules=["q_proj", "v_proj"])
    return {name: str(folder / name) for name in "ab"}


def test_prompts_ride_on_the_adapters_they_name(
    checkpoint: Callable[[str], Path], adapters: dict[str, str]
) -> None:
    llm = carpool.LLM(str(checkpoint("qwen3")), lora_modules=adapters, dtype="float32", cpu_workers=1)
    a, b = (carpool.LoRARequest(name, i, adapters[name]) for i, name in enumerate("ab", start=1))

    def vectors(request: Any) -> list[list[float]]:
        return [
            output.outputs.embedding for output in llm.embed(["the cat", "the cat"], lora_request=request)
        ]

    bare, of_a, of_b, mixed = (vectors(request) for request in (None, a, b, [b, a]))
    assert bare[0] != of_a[0] != of_b[0] != bare[0]
    assert mixed[0] == pytest.approx(of_b[0], abs=1e-5)
    assert mixed[1] == pytest.approx(of_a[0], abs=1e-5)
    scores = [
        llm.score("the cat", "a mat", lora_request=request)[0].outputs.score for request in (None, a, b)
    ]
    assert len(set(scores)) == 3
    assert vectors(carpool.LoRARequest("a", 7))[0] == pytest.approx(of_a[0], abs=1e-5)
    with pytest.raises(ValueError, match="2 prompts but 1 lora_request"):
        vectors([a])
    with pytest.raises(InvalidParameter, match="was loaded from"):
        vectors(carpool.LoRARequest("a", 1, adapters["b"]))
    with pytest.raises(InvalidParameter, match=r"no adapter 'c'.*LLM\(lora_modules=\{'c': '/x'\}\)"):
        vectors(carpool.LoRARequest("c", 1, "/x"))
    llm.close()


def test_adapters_are_loaded_when_they_are_first_asked_for(
    checkpoint: Callable[[str], Path], adapters: dict[str, str]
) -> None:
    """As with the reference's enable_lora; and equal to what start would have loaded."""
    folder = str(checkpoint("qwen3"))
    options: dict[str, Any] = {"dtype": "float32", "cpu_workers": 1}
    early = carpool.LLM(folder, lora_modules=adapters, **options)
    late = carpool.LLM(folder, enable_lora=True, max_loras=2, max_lora_rank=16, **options)
    a, b = (carpool.LoRARequest(name, i, adapters[name]) for i, name in enumerate("ab", start=1))

    def vectors(llm: LLM, request: Any) -> list[list[float]]:
        return [output.outputs.embedding for output in llm.embed(["the cat", "a mat"], lora_request=request)]

    for request in (None, [b, a], a):
        for one, other in zip(vectors(late, request), vectors(early, request), strict=True):
            assert one == pytest.approx(other, abs=1e-5)
    assert late.model_info.lora_modules == adapters
    assert late.score("the cat", "a mat", lora_request=a)[0].outputs.score == pytest.approx(
        early.score("the cat", "a mat", lora_request=a)[0].outputs.score, abs=1e-5
    )
    with pytest.raises(InvalidParameter, match="was loaded from"):
        vectors(late, carpool.LoRARequest("a", 1, adapters["b"]))
    for impossible in ("~nobody-of-this-name/a", "a\0b"):
        with pytest.raises(InvalidParameter, match="was loaded from"):
            vectors(late, carpool.LoRARequest("a", 1, impossible))
    with pytest.raises(InvalidParameter, match="needs a name"):
        vectors(late, carpool.LoRARequest("", 1, adapters["a"]))
    again = carpool.LoRARequest("a", 1, adapters["b"], load_inplace=True)
    for one, other in zip(vectors(late, again), vectors(early, b), strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    with pytest.raises(InvalidParameter, match="There is no adapter 'c'"):
        vectors(late, carpool.LoRARequest("c"))
    with pytest.raises(InvalidParameter, match="no adapter folder"):
        vectors(late, carpool.LoRARequest("c", 3, "/nowhere"))
    early.close()
    late.close()


def test_caches_can_be_reset(checkpoint: Callable[[str], Path]) -> None:
    llm = carpool.LLM(str(checkpoint("qwen3")), dtype="float32", cpu_workers=1, enable_prefix_caching=True)
    text = "the cat sat on the mat " * 8

    def cached() -> int:
        return llm.embed(text)[0].num_cached_tokens

    assert cached() == 0
    assert cached() > 0
    assert llm.reset_prefix_cache() is True
    assert cached() == 0
    assert cached() > 0
    llm.close()


@pytest.mark.parametrize("name", sorted(ABSENT))
def test_what_is_not_here_says_what_to_do_instead(llm: Callable[..., LLM], name: str) -> None:
    assert not hasattr(llm("bert"), name)
    with pytest.raises(AttributeError, match=rf"^There is no LLM\.{name}: .*\.$"):
        getattr(llm("bert"), name)


def test_what_is_unknown_is_unknown(llm: Callable[..., LLM]) -> None:
    with pytest.raises(AttributeError, match="'LLM' object has no attribute 'embedd'"):
        llm("bert").embedd  # noqa: B018
    assert (llm("bert").get_world_size(), llm("bert").get_world_size(include_dp=False)) == (1, 1)


def test_no_adapter_is_no_adapter(llm: Callable[..., LLM]) -> None:
    assert llm("bert").embed("a", lora_request=None)
    with pytest.raises(TypeError, match="lora_request is made of LoRARequest, not of object"):
        llm("bert").embed("a", lora_request=object())  # type: ignore[arg-type]


def test_progress_may_be_shown_by_something_else(llm: Callable[..., LLM]) -> None:
    shown: list[Any] = []

    class Bar:
        def __init__(self, total: int, **options: Any) -> None:
            shown.append(total)

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *error: object) -> None:
            shown.append("closed")

        def update(self, done: int) -> None:
            shown.append(done)

    llm("bert").embed(TEXTS, use_tqdm=Bar)
    assert shown == [3, 1, 1, 1, "closed"]
    shown.clear()
    llm("bert").score(TEXTS[0], TEXTS, use_tqdm=Bar)
    assert shown == [4, 1, 1, 1, 1, "closed"]  # the query too
