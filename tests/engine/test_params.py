"""PoolingParams' older names, and values. Matryoshka's rules are in test_checkpoint.py, beside what they come from."""

from __future__ import annotations

from typing import Any

import pytest

from carpool.engine.errors import InvalidParameter
from carpool.engine.params import Matryoshka, PoolingParams, Task, TokenizationParams, check_dimensions


@pytest.mark.parametrize("alias", ["use_activation", "normalize", "softmax", "activation"])
@pytest.mark.parametrize("value", [True, False])
def test_every_name_of_the_activation_means_the_same(alias: str, value: bool) -> None:
    options: dict[str, Any] = {alias: value}
    assert PoolingParams(**options).use_activation is value


def test_the_newest_name_wins() -> None:
    assert PoolingParams(use_activation=False, normalize=True).use_activation is False


def test_nothing_said_is_the_models_choice() -> None:
    assert PoolingParams().use_activation is None


def test_params_can_be_keys() -> None:
    assert len({PoolingParams(), PoolingParams(), PoolingParams(dimensions=3)}) == 2


@pytest.mark.parametrize(
    ("made", "options", "message"),
    [
        (PoolingParams, {"dimensions": "32"}, "dimensions must be an int, got '32'."),
        (PoolingParams, {"dimensions": 32.5}, "dimensions must be an int, got 32.5."),
        (PoolingParams, {"dimensions": True}, "dimensions must be an int, got True."),
        (PoolingParams, {"softmax": "no"}, "softmax must be None, True or False, got 'no'."),
        (PoolingParams, {"embed_dtype": "int8"}, "embed_dtype must be 'float32', 'float16' or 'bfloat16', got 'int8'."),
        (PoolingParams, {"truncate_prompt_tokens": [3]}, "truncate_prompt_tokens must be an int, got [3]."),
        (PoolingParams, {"extra_kwargs": ["a"]}, "extra_kwargs must be a dict, got ['a']."),
        (PoolingParams, {"late_chunking_params": {}}, "late_chunking_params must be LateChunkingParams, got {}."),
        (TokenizationParams, {"max_tokens_per_doc": None}, "max_tokens_per_doc must be an int, got None."),
        (TokenizationParams, {"prompt": 5}, "prompt must be a text, got 5."),
        (TokenizationParams, {"input_type": ["query"]}, "input_type must be a text, got ['query']."),
        (TokenizationParams, {"truncate_prompt_tokens": "3"}, "truncate_prompt_tokens must be an int, got '3'."),
        (TokenizationParams, {"truncation_side": "top"}, "truncation_side must be None, 'left' or 'right', got 'top'."),
        (TokenizationParams, {"padding": []}, "padding must be None, 'max_length' or 'do_not_pad', got []."),
        (TokenizationParams, {"add_special_tokens": None}, "add_special_tokens must be True or False, got None."),
    ],
)  # fmt: skip
def test_values_of_other_types_are_refused(made: type, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidParameter) as refused:
        made(**options)
    assert str(refused.value) == message
    assert refused.value.param == next(iter(options))


def test_a_clone_is_the_same() -> None:
    params = PoolingParams(dimensions=3, extra_kwargs={"max_tokens_per_doc": 5})
    assert params.clone() == params
    assert hash(params.clone()) == hash(params)


@pytest.mark.parametrize("tasks", [("classify",), ("sparse_embed", "token_classify")])
def test_only_dense_vectors_have_a_width_to_ask_for(tasks: tuple[Task, ...]) -> None:
    check_dimensions(None, tasks, Matryoshka(8), "m")
    check_dimensions(8, ("token_embed", *tasks), Matryoshka(8), "m")
    with pytest.raises(InvalidParameter, match="dimensions is for dense embeddings"):
        check_dimensions(8, tasks, Matryoshka(8), "m")
