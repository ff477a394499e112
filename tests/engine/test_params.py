"""PoolingParams' older names. Matryoshka's rules are in test_checkpoint.py, beside the files they come from."""

from __future__ import annotations

from typing import Any

import pytest

from carpool.engine.params import PoolingParams


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
