"""Heads: every family of classifiers answers as stock transformers does, alone, in company and in threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

import tiny
import tiny_heads
from carpool.engine.build import Parts, build
from carpool.engine.config import EngineConfig, PoolerConfig
from carpool.engine.errors import ConfigError
from carpool.engine.params import PoolingParams
from carpool.engine.poolers.classifier import head_from_tokens, head_from_weights, keep_words
from head_oracle import HeadOracle, answer, close
from zoo import rerankers

TEXTS = [text for text in tiny.TEXTS if text]
LOGITS = PoolingParams(use_activation=False)
CLASSIFIERS = sorted(tiny_heads.CLASSIFIERS)
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "bert_2": lambda x: x.softmax(-1),
    "bert_3": lambda x: x.softmax(-1),
    "bert_multilabel": torch.sigmoid,
    "bert_regression": lambda x: x,
    "bert_cross": lambda x: x,
    "albert_3": lambda x: x.softmax(-1),
    "distilbert_2": lambda x: x.softmax(-1),
    "xlmr_cross": torch.sigmoid,
    "modernbert_mean": lambda x: x.softmax(-1),
    "eurobert_late": lambda x: x.softmax(-1),
    "qwen2_3": lambda x: x.softmax(-1),
    "qwen2_cross": torch.sigmoid,
    "gemma3_both_ways": lambda x: x.softmax(-1),
}


def made(path: Path, **options: Any) -> Parts:
    return build(EngineConfig(**{"model": str(path), "cpu_workers": 1, "dtype": "float32", **options}))


@pytest.fixture(scope="module")
def oracle(checkpoint: Callable[[str], Path]) -> Callable[[str], HeadOracle]:
    @cache
    def of(family: str) -> HeadOracle:
        auto = {"auto": AutoModelForTokenClassification} if family == "bert_tokens" else {}
        return HeadOracle(checkpoint(family), **auto)

    return of


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_alone_and_in_company_the_logits_are_transformers(
    family: str, parts: Callable[[str], Parts], oracle: Callable[[str], HeadOracle]
) -> None:
    ids = parts(family).tokenizer.encode(TEXTS)
    expected = [oracle(family).logits(own) for own in ids]
    assert max(float((a - b).abs().max()) for a, b in pairwise(expected)) > 0.01
    for together, own, theirs in zip(answer(parts(family), ids, params=LOGITS), ids, expected, strict=True):
        (alone,) = answer(parts(family), [own], params=LOGITS)
        assert close(alone, theirs)
        assert close(together, theirs)


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_probabilities_are_the_activation_of_the_logits(
    family: str, parts: Callable[[str], Parts], oracle: Callable[[str], HeadOracle]
) -> None:
    ids = parts(family).tokenizer.encode(TEXTS)
    for asked in (None, True):
        rows = answer(parts(family), ids, params=PoolingParams(use_activation=asked))
        for row, own in zip(rows, ids, strict=True):
            assert close(row, ACTIVATIONS[family](oracle(family).logits(own)))


def test_every_classifier_is_expected_to_be_something() -> None:
    assert set(ACTIVATIONS) == set(CLASSIFIERS)


def test_a_token_classifier_labels_every_token(
    parts: Callable[[str], Parts], oracle: Callable[[str], HeadOracle]
) -> None:
    ids = parts("bert_tokens").tokenizer.encode(TEXTS)
    logits = answer(parts("bert_tokens"), ids, "token_classify", LOGITS)
    probabilities = answer(parts("bert_tokens"), ids, "token_classify")
    for own, plain, likely in zip(ids, logits, probabilities, strict=True):
        expected = oracle("bert_tokens").logits(own)
        assert close(plain, expected)
        assert close(likely, expected.softmax(-1))
    assert parts("bert_tokens").model.labels == ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")


def test_a_sequence_classifier_labels_tokens_with_the_head_of_its_texts(
    parts: Callable[[str], Parts], oracle: Callable[[str], HeadOracle]
) -> None:
    bert, qwen = oracle("bert_3"), oracle("qwen2_3")
    ids = parts("bert_3").tokenizer.encode(TEXTS[:4])
    for own, rows in zip(ids, answer(parts("bert_3"), ids, "token_classify", LOGITS), strict=True):
        pooled = torch.tanh(bert.full.bert.pooler.dense(bert.hidden(own)))
        assert close(rows, bert.full.classifier(pooled).detach())
    ids = parts("qwen2_3").tokenizer.encode(TEXTS[:4])
    for own, rows in zip(ids, answer(parts("qwen2_3"), ids, "token_classify", LOGITS), strict=True):
        assert close(rows, qwen.full.score(qwen.hidden(own)).detach())


def test_a_head_answers_two_threads_at_once(checkpoint: Callable[[str], Path]) -> None:
    """Workers share it: transformers' forward must leave nothing behind that another thread could read."""
    for family in ("bert_3", "qwen2_3"):
        shared = build(EngineConfig(model=str(checkpoint(family)), cpu_workers=2, dtype="float32"))
        ids = shared.tokenizer.encode(TEXTS)
        expected = answer(shared, ids)
        wrong: list[str] = []

        def hammer(worker: int, shared: Parts, ids: Any, expected: Any, wrong: list[str]) -> None:
            own = replace(shared, runners=[shared.runners[worker]])
            for turn in range(40):
                some = list(range(turn % 3, len(ids), 1 + turn % 4))
                rows = answer(own, [ids[i] for i in some])
                if not all(close(row, expected[i]) for row, i in zip(rows, some, strict=True)):
                    wrong.append(f"worker {worker} in turn {turn}")

        threads = [
            threading.Thread(target=hammer, args=(worker, shared, ids, expected, wrong))
            for worker in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong


def test_a_16_bit_classifier_has_a_head_in_float32(checkpoint: Callable[[str], Path]) -> None:
    parts = made(checkpoint("bert_3"), dtype="bfloat16")
    (row,) = answer(parts, parts.tokenizer.encode(TEXTS[:1]))
    assert row.sum().item() == pytest.approx(1, abs=1e-6)
    (full,) = answer(made(checkpoint("bert_3")), parts.tokenizer.encode(TEXTS[:1]))
    assert torch.allclose(row, full, atol=0.05)


# ── which rows a class pools ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("family", ["modernbert_mean", "eurobert_late"])
def test_a_classifier_that_names_its_pooling_keeps_it(
    family: str, checkpoint: Callable[[str], Path], oracle: Callable[[str], HeadOracle]
) -> None:
    parts = made(checkpoint(family), pooler_config=PoolerConfig(pooling_type="CLS"))
    ids = parts.tokenizer.encode(TEXTS[:2])
    for own, row in zip(ids, answer(parts, ids, params=LOGITS), strict=True):
        assert close(row, oracle(family).logits(own))


def test_other_classifiers_pool_what_the_user_says(
    checkpoint: Callable[[str], Path], oracle: Callable[[str], HeadOracle]
) -> None:
    parts = made(checkpoint("qwen2_3"), pooler_config=PoolerConfig(seq_pooling_type="MEAN"))
    ids = parts.tokenizer.encode(TEXTS[:1])
    (row,) = answer(parts, ids, params=LOGITS)
    qwen = oracle("qwen2_3")
    assert close(row, qwen.full.score(qwen.hidden(ids[0]).mean(0)).detach())


def test_a_modernbert_that_embeds_pools_its_first_token(checkpoint: Callable[[str], Path]) -> None:
    """`classifier_pooling` in its config.json is about classifiers only."""
    parts = made(checkpoint("modernbert_mean"), convert="embed")
    assert parts.model.pooling == "cls"
    assert parts.model.tasks == {"embed", "token_embed"}


def test_the_bias_of_a_causal_classifier_is_honoured(
    fresh: Callable[[str], Path], parts: Callable[[str], Parts]
) -> None:
    path = fresh("qwen2_3")
    weights = load_file(path / "model.safetensors")
    weights["score.bias"] = torch.tensor([1.0, -2.0, 3.0])
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    ids = parts("qwen2_3").tokenizer.encode(TEXTS[:1])
    (without,) = answer(parts("qwen2_3"), ids, params=LOGITS)
    (biased,) = answer(made(path), ids, params=LOGITS)
    assert close(biased, without + weights["score.bias"])


def test_one_label_that_applies_alone_is_a_sigmoid_though_transformers_refuses_to_train_it(
    fresh: Callable[[str], Path],
) -> None:
    """Such cross-encoders were published before it did, and its tokenizers go by the same config.json."""
    path = fresh("bert_cross")
    tiny.edit_json(path / "config.json", sentence_transformers=None)
    plain = made(path)
    tiny.edit_json(path / "config.json", problem_type="single_label_classification")
    told = made(path)
    (ids,) = told.tokenizer.encode([TEXTS[0]])
    logits = answer(plain, [ids], params=LOGITS)[0]
    assert told.model.score_type == "cross-encoder"
    assert close(answer(told, [ids])[0], logits.sigmoid())


def test_a_class_that_calls_its_pooler_without_a_look_is_served(tmp_path: Path) -> None:
    """SqueezeBERT's does, whose pooler belongs to the head here."""
    tiny_heads._save(tmp_path, AutoModelForSequenceClassification, "squeezebert", 3, embedding_size=tiny.HIDDEN,
                     vocab_size=tiny.wordpiece().get_vocab_size(), pad_token_id=0)  # fmt: skip
    tiny_heads._save_wordpiece(tiny.wordpiece(), tmp_path)
    parts, theirs = made(tmp_path), HeadOracle(tmp_path)
    batch = parts.tokenizer.encode(TEXTS[:3])
    found = answer(parts, batch, params=LOGITS)
    assert all(close(ours, theirs.logits(ids)) for ids, ours in zip(batch, found, strict=True))


@pytest.mark.parametrize("auto", ["AutoModelForMaskedLM", "AutoModelForTokenClassification"])
def test_a_head_of_tokens_that_reads_more_of_its_backbone_is_refused(auto: str, tmp_path: Path) -> None:
    tiny_heads._save(tmp_path, getattr(transformers, auto), "longformer", 3, attention_window=[8, 8],
                     vocab_size=tiny.wordpiece().get_vocab_size(), pad_token_id=0)  # fmt: skip
    tiny_heads._save_wordpiece(tiny.wordpiece(), tmp_path)
    sparse = {"architectures": ["LongformerSpladeSparseEmbeddingModel"]} if "Masked" in auto else {}
    with pytest.raises(ConfigError, match="cannot be served: its head wants more than the hidden state"):
        made(tmp_path, hf_overrides=sparse)


@pytest.mark.parametrize("architectures", [["BertModel"], None])
def test_a_head_that_an_embedding_model_does_not_read_is_said(
    architectures: list[str] | None, fresh: Callable[[str], Path]
) -> None:
    path = fresh("bert_3")
    tiny.edit_json(path / "config.json", architectures=architectures)
    (notice,) = (sentence for sentence in made(path).model.notices if "brings a head" in sentence)
    assert "classifier.bias, classifier.weight" in notice
    for settled in (
        {"convert": "embed"},
        {"hf_overrides": {"architectures": ["BertForSequenceClassification"]}},
    ):
        assert not any("brings a head" in sentence for sentence in made(path, **settled).model.notices)


def test_a_model_without_the_weights_of_a_classifier_is_refused(checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match=r"lacks .* weights that BertForSequenceClassification needs"):
        made(checkpoint("bert"), convert="classify")
    with pytest.raises(ConfigError, match=r"lacks 1 of the weights .* \(score\.weight\)"):
        made(checkpoint("qwen2"), convert="classify")


# ── heads out of weights ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["score", "v_head"])
@pytest.mark.parametrize("bias", [True, False])
def test_one_linear_layer_under_either_name_is_a_head(name: str, bias: bool) -> None:
    weights = {f"{name}.weight": torch.randn(2, 8)}
    if bias:
        weights[f"{name}.bias"] = torch.randn(2)
    x = torch.randn(5, 8)
    assert close(
        head_from_weights(weights)(x), x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)
    )


def test_numbered_layers_have_a_relu_between_them() -> None:
    weights = {
        "score.0.weight": torch.randn(8, 8),
        "score.0.bias": torch.randn(8),
        "score.2.weight": torch.randn(1, 8),
    }
    x = torch.randn(5, 8)
    inner = torch.relu(x @ weights["score.0.weight"].T + weights["score.0.bias"])
    assert close(head_from_weights(weights)(x), inner @ weights["score.2.weight"].T)


def test_16_bit_weights_make_a_float32_head() -> None:
    head = head_from_weights({"score.weight": torch.randn(2, 8, dtype=torch.bfloat16)})
    assert all(weight.dtype == torch.float32 for weight in head.parameters())


def test_no_head_in_the_weights_is_said() -> None:
    with pytest.raises(ConfigError, match="neither a score nor a v_head"):
        head_from_weights({})


def test_two_words_make_one_logit_and_single_words_one_each() -> None:
    rows, x = torch.randn(2, 8), torch.randn(5, 8)
    logits = x @ rows.T
    probability = torch.sigmoid(head_from_tokens(rows, "from_2_way_softmax")(x))[:, 0]
    assert close(probability, logits.softmax(-1)[:, 1])
    assert close(head_from_tokens(rows, "no_post_processing")(x), logits)


@pytest.mark.parametrize("words", [("no", "yes"), ("yes",)], ids=len)
@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("qwen3", {}),
        ("qwen3", {"tie_word_embeddings": False}),
        ("granite", {"logits_scaling": 8.0}),
        ("cohere2", {"logit_scale": 0.25}),
        ("gemma2", {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}),
        ("phi", {"tie_word_embeddings": False}),  # a bias
        (  # its multiplier is the backbone's
            "falcon_h1",
            {"lm_head_multiplier": 0.25, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8,
             "mamba_d_state": 8, "mamba_chunk_size": 16},
        ),
        ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}),
        ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 16}),
    ],
)  # fmt: skip
def test_a_score_of_words_is_of_the_logits_that_the_whole_model_gives(
    model_type: str, config: dict[str, Any], words: tuple[str, ...], tmp_path: Path
) -> None:
    reference = rerankers.judged(model_type, *words, **config)(tmp_path)
    parts = made(tmp_path)
    batch = parts.tokenizer.encode(TEXTS[:3])
    for ids, ours in zip(batch, answer(parts, batch, params=LOGITS), strict=True):
        *no, yes = reference("classify", ids)
        assert close(ours, (yes - sum(no))[None])


def test_a_language_model_narrowed_to_some_words_gives_their_logits(
    checkpoint: Callable[[str], Path],
) -> None:
    whole = AutoModelForCausalLM.from_pretrained(checkpoint("gemma2_lm")).eval()
    narrow = AutoModelForCausalLM.from_pretrained(checkpoint("gemma2_lm")).eval()
    keep_words(narrow, [7, 3])
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert close(narrow(ids).logits, whole(ids).logits[..., [7, 3]])
    assert isinstance(whole.get_output_embeddings(), nn.Linear)
    with pytest.raises(ConfigError, match=r"returned_token_ids \[3, 100000\] go beyond this model's ids"):
        keep_words(whole, [3, 100000])
