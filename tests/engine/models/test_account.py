"""Account: what does not fit is refused, the shapes first, and by name; what lies beside the layers is not."""

from __future__ import annotations

import pytest
from transformers import BertConfig, BertModel

from carpool.engine.errors import ConfigError
from carpool.engine.models.account import Account

MODEL = BertModel(
    BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=9),
    add_pooling_layer=False,
)
LAYER = "encoder.layer.0.attention.self"


def account(
    missing: tuple[str, ...] = (),
    misfits: tuple[tuple[str, tuple[int], tuple[int]], ...] = (),
    unexpected: tuple[str, ...] = (),
    *,
    reads_pooler: bool = False,
) -> Account:
    info = {"missing_keys": missing, "mismatched_keys": misfits, "unexpected_keys": unexpected}
    return Account.of(MODEL, info, reads_pooler=reads_pooler)


def test_nothing_amiss_is_nothing_to_say() -> None:
    account().check()
    account(("pooler.dense.weight", "embeddings.position_ids"), (), ("cls.bias", "encoder.layer.1.x")).check()


def test_the_pooler_is_missed_where_it_is_read() -> None:
    assert account(("pooler.dense.bias",), reads_pooler=True).missing == ("pooler.dense.bias",)


def test_weights_are_named_three_at_most_in_their_order() -> None:
    lacking = account(tuple(f"{LAYER}.{name}" for name in "dacb"))
    with pytest.raises(ConfigError) as refused:
        lacking.check()
    assert f"lacks 4 of the weights that BertModel needs ({LAYER}.a, {LAYER}.b, {LAYER}.c, …)" in str(
        refused.value
    )
    assert "damaged" in str(refused.value)
    with pytest.raises(ConfigError, match=r"…\) because of that\."):
        lacking.check(" because of that.")


def test_a_weight_within_a_layer_that_has_no_place_is_unplaced() -> None:
    beside = ("classifier.weight", "encoder.layer.7.x", "pooler.other", f"bert.{LAYER}.rotary.inv_freq")
    assert account(unexpected=beside).unplaced == ()
    within = account(unexpected=(f"bert.{LAYER}.gate.weight", f"{LAYER}.query.scale"))
    assert within.unplaced == (f"bert.{LAYER}.gate.weight", f"{LAYER}.query.scale")
    with pytest.raises(
        ConfigError, match=r"holds 2 weights that the layers of BertModel.*compute something else"
    ):
        within.check()


def test_shapes_come_first() -> None:
    wrong = account(("a.b",), (("z", (3,), (2,)), ("embeddings.w", (4,), (5,))), (f"{LAYER}.gate",))
    with pytest.raises(ConfigError, match=r"2 of .*: embeddings\.w is of shape \(4,\) .* of \(5,\)"):
        wrong.check()
