"""Architecture: what a model is for, by the name of its class, its configuration and the user."""

from __future__ import annotations

from typing import Any

import pytest

from carpool.engine.architecture import Architecture, Kind, Scorer, activation_of, labels_of
from carpool.engine.config import CONVERT_OF_TASK, Convert
from carpool.engine.errors import ConfigError

IDENTITY = "torch.nn.modules.linear.Identity"
SIGMOID = "torch.nn.modules.activation.Sigmoid"
SOFTMAX = "torch.nn.modules.activation.Softmax"
TANH = "torch.nn.modules.activation.Tanh"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("BertForSequenceClassification", "classify"),
        ("SomeForVideoClassification", "classify"),
        ("MyClassificationModel", "classify"),
        ("BertForTokenClassification", "token_classify"),
        ("RoFormerForTokenClassification", "token_classify"),  # its own name begins with For, too
        ("RoFormerForSequenceClassification", "classify"),
        ("InternLM2ForRewardModel", "reward"),
        ("SomeForRewardModeling", "reward"),
        ("SomeRewardModel", "reward"),
        ("Qwen2ForProcessRewardModel", "process_reward"),
        ("SomeForTextEncoding", "embed"),
        ("SomeEmbeddingModel", "embed"),
        ("BertModel", "embed"),
        ("HF_ColBERT", "multi_vector"),
        ("ColBERTModernBertModel", "multi_vector"),
        ("BertSpladeSparseEmbeddingModel", "sparse"),
        ("BgeM3EmbeddingModel", "bge_m3"),
        ("JinaForRanking", "listwise"),
        ("LlamaForCausalLM", "embed"),
        ("GPT2LMHeadModel", "embed"),
        ("RobertaForMaskedLM", "embed"),
        ("BertForPreTraining", "embed"),
        ("Gemma3ForConditionalGeneration", "embed"),
    ],
)
def test_the_most_specific_suffix_says_what_a_model_is_for(name: str, kind: Kind) -> None:
    assert Architecture.of((name,), "auto").kind == kind


@pytest.mark.parametrize(
    ("name", "activates"),
    [
        ("BertForSequenceClassification", True),
        ("Qwen2ForProcessRewardModel", True),
        ("Qwen2ForRewardModel", False),
        ("InternLM2ForRewardModel", False),
        ("JambaForSequenceClassification", False),
    ],
)
def test_rewards_are_told_as_they_are(name: str, activates: bool) -> None:
    assert Architecture.of((name,), "auto").activates is activates


def test_the_first_name_that_says_anything_counts() -> None:
    assert (
        Architecture.of(("Strange", "BertForSequenceClassification", "BertModel"), "auto").kind == "classify"
    )


def test_a_config_without_names_is_taken_for_an_embedding_model() -> None:
    assert Architecture.of((), "auto").kind == "embed"


def test_a_name_that_says_nothing_is_refused_with_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"Strange does not say .* --convert embed, classify or reward"):
        Architecture.of(("Strange",), "auto")
    assert Architecture.of(("Strange",), "embed").kind == "embed"


@pytest.mark.parametrize("files", ["multi_vector", "sparse", "bge_m3"])
def test_the_files_beside_an_embedding_model_say_more_than_its_name(files: Kind) -> None:
    for name in ("BertModel", "BertForMaskedLM", "HF_ColBERT", "Strange"):
        assert Architecture.of((name,), "auto", files=files).kind == files
        assert Architecture.of((name,), "embed", files=files).kind == files
        assert Architecture.of((name,), "classify", files=files).kind == "classify"
    assert Architecture.of(("BertForSequenceClassification",), "auto", files=files).kind == "classify"


def test_embedding_models_of_every_kind_have_no_labels() -> None:
    embeds = {
        name: Architecture.of((name,), "auto").embeds for name in ("HF_ColBERT", "BertModel", "MyRewardModel")
    }
    assert embeds == {"HF_ColBERT": True, "BertModel": True, "MyRewardModel": False}


@pytest.mark.parametrize(
    ("kind", "tasks"),
    [
        ("BertModel", ("embed", "token_embed")),
        ("HF_ColBERT", ("token_embed",)),
        ("BertSpladeSparseEmbeddingModel", ("embed", "sparse_embed")),
        ("BgeM3EmbeddingModel", ("embed", "token_embed", "sparse_embed", "token_classify")),
        ("BertForSequenceClassification", ("classify", "token_classify")),
        ("BertForTokenClassification", ("token_classify",)),
        ("Qwen2ForRewardModel", ("token_classify",)),
        ("Qwen2ForProcessRewardModel", ("token_classify",)),
    ],
)
def test_the_first_task_is_what_a_model_does_unasked(kind: str, tasks: tuple[str, ...]) -> None:
    assert Architecture.of((kind,), "auto").tasks == tasks


@pytest.mark.parametrize(
    ("name", "convert", "kind"),
    [
        ("BertForSequenceClassification", "embed", "embed"),
        ("Qwen2ForRewardModel", "embed", "embed"),
        ("LlamaForCausalLM", "classify", "classify"),
        ("LlamaForCausalLM", "reward", "reward"),
        ("BertModel", "reward", "reward"),
        ("Strange", "reward", "reward"),
        ("BertModel", "none", "embed"),
        # The class does it already, and more precisely than the conversion would.
        ("BertForTokenClassification", "classify", "token_classify"),
        ("Qwen2ForProcessRewardModel", "reward", "process_reward"),
        ("Qwen2ForRewardModel", "reward", "reward"),
        ("BertForSequenceClassification", "classify", "classify"),
    ],
)
def test_the_user_overrules_the_class_unless_it_fits(name: str, convert: Convert, kind: Kind) -> None:
    assert Architecture.of((name,), convert).kind == kind


@pytest.mark.parametrize("convert", ["auto", "reward"])
def test_a_language_model_asked_for_words_at_step_tags_is_a_judge(convert: Convert) -> None:
    judge = Architecture.of(("LlamaForCausalLM",), convert, step_words=True)
    assert (judge.kind, judge.tasks) == ("judge", ("token_classify",))
    assert Architecture.of(("Qwen2ForProcessRewardModel",), convert, step_words=True).kind == "process_reward"
    assert Architecture.of(("LlamaForCausalLM",), "embed", step_words=True).kind == "embed"


def test_the_older_task_option_is_one_of_todays_conversions() -> None:
    kinds = {
        task: Architecture.of(("XForSequenceClassification",), to).kind
        for task, to in CONVERT_OF_TASK.items()
    }
    assert kinds == {
        "auto": "classify",
        "embed": "embed",
        "embedding": "embed",
        "classify": "classify",
        "score": "classify",
        "reward": "reward",
    }
    assert Architecture.of(("BertModel",), CONVERT_OF_TASK["score"]).kind == "embed"


# ── scorers ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("config", "scorer"),
    [
        ({}, None),
        ({"method": "something else's"}, None),
        (
            {"classifier_from_token": ["no", "yes"], "is_original_qwen3_reranker": True},
            Scorer(("no", "yes"), "from_2_way_softmax"),
        ),
        (
            {"classifier_from_token": ["0", "1"], "method": "from_2_way_softmax"},
            Scorer(("0", "1"), "from_2_way_softmax"),
        ),
        (
            {"classifier_from_token": ["Yes"], "method": "no_post_processing"},
            Scorer(("Yes",), "no_post_processing"),
        ),
    ],
)
def test_a_scorer_is_words_and_a_method(config: dict[str, Any], scorer: Scorer | None) -> None:
    assert Scorer.of(config) == scorer


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"classifier_from_token": ["no", "yes"]}, 'needs "method"'),
        ({"classifier_from_token": ["no", "yes"], "method": "mean"}, "got 'mean'"),
        (
            {"classifier_from_token": ["yes"], "method": "from_2_way_softmax"},
            r"needs two words .* got \['yes'\]",
        ),
        ({"classifier_from_token": ["a", "b", "c"], "is_original_qwen3_reranker": True}, "needs two words"),
        ({"method": "no_post_processing"}, r"needs a word in classifier_from_token, got \[\]"),
        ({"is_original_qwen3_reranker": True}, r"needs two words .* got \[\]"),
    ],
)
def test_half_a_scorer_is_refused(config: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Scorer.of(config)


# ── activations and labels ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("config", "one_label", "three_labels"),
    [
        ({}, "sigmoid", "softmax"),
        ({"problem_type": None}, "sigmoid", "softmax"),
        ({"problem_type": "regression"}, "identity", "identity"),
        ({"problem_type": "single_label_classification"}, "sigmoid", "softmax"),
        ({"problem_type": "multi_label_classification"}, "sigmoid", "sigmoid"),
        ({"sentence_transformers": {"activation_fn": IDENTITY}}, "identity", "identity"),
        ({"sentence_transformers": {"activation_fn": SIGMOID}}, "sigmoid", "softmax"),
        ({"sentence_transformers": {"activation_fn": SOFTMAX}}, "sigmoid", "softmax"),
        ({"sentence_transformers": {"activation_fn": TANH}}, TANH, TANH),
        ({"sentence_transformers": {"version": "4.1.0"}}, "sigmoid", "softmax"),
        ({"sbert_ce_default_activation_function": IDENTITY}, "identity", "identity"),
        ({"sbert_ce_default_activation_function": "torch.nn.Sigmoid"}, "sigmoid", "softmax"),
        ({"sentence_transformers": {"activation_fn": "torch.nn.Tanh"}}, "torch.nn.Tanh", "torch.nn.Tanh"),
        (
            {
                "sentence_transformers": {"activation_fn": IDENTITY},
                "sbert_ce_default_activation_function": TANH,
            },
            "identity",
            "identity",
        ),
        (
            {"problem_type": "regression", "sentence_transformers": {"activation_fn": TANH}},
            "identity",
            "identity",
        ),
    ],
)
def test_the_problem_decides_then_the_cross_encoders_files_then_the_number_of_labels(
    config: dict[str, Any], one_label: str, three_labels: str
) -> None:
    assert (activation_of(config, 1), activation_of(config, 3)) == (one_label, three_labels)


@pytest.mark.parametrize(
    "dotted", ["os.system", "torch.nn.modules", "torch.nn.functional.relu", "my.torch.nn.modules.X"]
)
def test_no_activation_from_elsewhere_is_imported(dotted: str) -> None:
    with pytest.raises(ConfigError, match=r"only torch\.nn's own classes"):
        activation_of({"sbert_ce_default_activation_function": dotted}, 1)


@pytest.mark.parametrize(
    ("config", "labels"),
    [
        ({"id2label": {"0": "no", "1": "yes"}}, ("no", "yes")),
        ({"id2label": {0: "no", 1: "yes"}}, ("no", "yes")),
        ({"id2label": {"0": 0, "1": 1}}, ("0", "1")),
        ({"id2label": {"1": "yes"}}, (None, "yes")),
        ({}, ("LABEL_0", "LABEL_1")),  # as transformers has it: config.json leaves these out
        ({"id2label": None}, ("LABEL_0", "LABEL_1")),
    ],
)
def test_a_label_is_what_config_json_says_or_its_number(
    config: dict[str, Any], labels: tuple[str | None, ...]
) -> None:
    assert labels_of(config, 2) == labels
