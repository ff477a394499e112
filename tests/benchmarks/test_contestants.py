"""The pipe and its two ends, with engines made of a few lines."""

from contextlib import closing
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from carpool.engine.hub import locate
from contestants import Contestant, Entry, machine_cpu_seconds

FAKE_CARPOOL = """
from types import SimpleNamespace
__version__ = "0.fake"
class LLM:
    def __init__(self, model, dtype, cpu_workers):
        print("noise on stdout")
        self.scale = cpu_workers
    def embed(self, texts, use_tqdm):
        print("more noise")
        if "crash" in texts:
            raise SystemExit(3)
        return [SimpleNamespace(outputs=SimpleNamespace(embedding=[len(t) * self.scale, 1.0])) for t in texts]
"""


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the children import in the place of the real ones."""
    (tmp_path / "carpool.py").write_text(FAKE_CARPOOL)
    (tmp_path / "sentence_transformers.py").write_text("import a_dependency_that_nobody_has")
    (tmp_path / "torch.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def test_entries_are_named_as_on_the_command_line() -> None:
    assert Entry.parse("carpool:bfloat16") == Entry("carpool", "bfloat16")
    entry = Entry.parse("sentence-transformers:float32:128")
    assert entry == Entry("sentence-transformers", "float32", 128)
    assert str(entry) == "sentence-transformers float32, batches of 128"
    with pytest.raises(
        ValueError, match="no contestant 'cartpool'; there are carpool, sentence-transformers"
    ):
        Entry.parse("cartpool:float32")


@pytest.mark.usefixtures("fakes")
def test_a_contestant_embeds_and_is_timed() -> None:
    with closing(Contestant(Entry("carpool", "float32"), "model", threads=2)) as contestant:
        assert contestant.absent is None
        assert contestant.versions == {"carpool": "0.fake"}
        vectors = contestant.embed(["a", "bcd"])
        turn = contestant.turn()
    np.testing.assert_array_equal(vectors, np.array([[2, 1], [6, 1]], np.float32))
    assert turn.seconds > 0
    assert turn.cpu_seconds >= 0
    assert turn.others_cpu_seconds >= 0


@pytest.mark.usefixtures("fakes")
def test_who_is_not_installed_is_absent() -> None:
    with closing(Contestant(Entry("sentence-transformers", "float32", 32), "model", 1)) as contestant:
        assert contestant.absent == "No module named 'a_dependency_that_nobody_has'"


@pytest.mark.usefixtures("fakes")
def test_who_dies_is_an_error() -> None:
    with (
        closing(Contestant(Entry("carpool", "float32"), "model", 1)) as contestant,
        pytest.raises(RuntimeError, match="carpool float32 ended with status 3"),
    ):
        contestant.embed(["crash"])


@pytest.mark.skipif(find_spec("sentence_transformers") is None, reason="the peer is not installed")
def test_the_peer_itself_takes_part() -> None:
    entry = Entry("sentence-transformers", "bfloat16", 2)
    with closing(Contestant(entry, str(locate("")), threads=1)) as contestant:
        assert contestant.versions.keys() == {"torch", "transformers", "sentence_transformers"}
        vectors = contestant.embed(["one", "another", "a third"])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, rtol=0.01)


def test_the_machine_only_ever_works_more() -> None:
    before = machine_cpu_seconds()
    assert 0 < before <= machine_cpu_seconds()
