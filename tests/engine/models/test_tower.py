"""A model of texts and images is taken apart only where its language model alone does all that the whole does."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

import tiny
from carpool.engine.models.tower import text_tower
from zoo import towers


def whole() -> Any:
    model = transformers.AutoModel.from_config(towers.gemma3(), attn_implementation="eager").eval()
    tiny.inflate(model)
    return model


def test_the_language_model_is_taken_out() -> None:
    model = whole()
    assert text_tower(model) is model.language_model


def test_not_where_the_whole_does_something_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: a factor behind the language model."""
    model = whole()
    forward = model.forward

    def more(*args: Any, **options: Any) -> Any:
        out = forward(*args, **options)
        out.last_hidden_state = out.last_hidden_state * 1.01
        return out

    monkeypatch.setattr(model, "forward", more)
    assert text_tower(model) is model


def test_a_model_that_cannot_be_asked_is_left_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = whole()

    def fails(*_: Any, **__: Any) -> Any:
        raise ValueError("an image is wanted")

    monkeypatch.setattr(model, "forward", fails)
    assert text_tower(model) is model


def test_a_model_of_texts_is_what_it_is() -> None:
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=50
    )
    model = transformers.BertModel(config)
    assert text_tower(model) is model
