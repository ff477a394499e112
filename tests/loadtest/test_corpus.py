import ast
from pathlib import Path
from statistics import mean, median

import pytest

import corpus
from corpus import LONG, MIXED, SHORT, Spread, passages


def test_a_seed_stands_for_the_same_passages() -> None:
    assert passages(20, MIXED, seed=1) == passages(20, MIXED, seed=1)
    assert passages(20, MIXED, seed=1) != passages(20, MIXED, seed=2)


@pytest.mark.parametrize("spread", [SHORT, MIXED, LONG], ids=["short", "mixed", "long"])
def test_lengths_are_spread_as_asked(spread: Spread) -> None:
    lengths = [len(text.split()) for text in passages(1_000, spread)]
    assert spread.least <= min(lengths)
    assert max(lengths) <= spread.most
    assert median(lengths) == pytest.approx(spread.median, rel=0.1)
    assert mean(lengths) > median(lengths), "a few are many times as long as most"


def test_no_two_are_alike_even_where_there_are_few_to_choose_from() -> None:
    one_word = Spread(median=1, sigma=0.0, least=1, most=1)
    texts = passages(20_000, one_word)
    assert len(set(texts)) == 20_000


def test_the_load_test_knows_nothing_of_ours() -> None:
    room = Path(corpus.__file__).parent
    for path in room.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.partition(".")[0] == "carpool"], path
