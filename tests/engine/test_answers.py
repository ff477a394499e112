"""What LLM gives back: printed, compared and told apart as scripts of the reference do it."""

from __future__ import annotations

import torch

import carpool
from carpool.engine.answers import (
    EmbeddingOutput,
    EmbeddingRequestOutput,
    PoolingOutput,
    PoolingRequestOutput,
)


def test_answers_are_known_by_the_names_of_the_reference() -> None:
    for name in ("Classification", "Embedding", "Pooling", "Scoring"):
        assert issubclass(getattr(carpool, f"{name}RequestOutput"), PoolingRequestOutput)
        assert getattr(carpool, f"{name}Output")


def test_an_answer_prints_what_can_be_read() -> None:
    answer = EmbeddingRequestOutput("3", EmbeddingOutput([0.5] * 300), [101, 102], 1)
    assert repr(answer) == (
        "EmbeddingRequestOutput(request_id='3', outputs=EmbeddingOutput(hidden_size=300), "
        "prompt_token_ids=[101, 102], num_cached_tokens=1, finished=True)"
    )


def test_tensors_are_compared_as_a_whole() -> None:
    one, same, other = torch.ones(3), torch.ones(3), torch.zeros(3)
    assert PoolingOutput(one) == PoolingOutput(same)
    assert PoolingOutput(one) != PoolingOutput(other)
    assert PoolingOutput(one) != PoolingOutput(torch.ones(4))
    assert PoolingOutput({"embed": one}) == PoolingOutput({"embed": same})
    assert PoolingOutput({"embed": one}) != PoolingOutput({"token_embed": same})
    assert PoolingOutput(one) != one.tolist()
