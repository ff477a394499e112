"""Prefixes: what a batch's prompts share is found as by comparing all with all, and is computed once."""

from __future__ import annotations

from itertools import permutations, takewhile

from hypothesis import given
from hypothesis import strategies as st

from carpool.engine.cache.blocks import Prompt
from carpool.engine.cache.hashing import block_hashes
from carpool.engine.cache.prefixes import Prefixes, Ride

Asked = tuple[list[int], str, bool]  # token ids, salt, whether it may use what others compute

SIZES = st.integers(1, 3)
# Few of them, so that many begin alike and some go on alike: zeros, then ones.
TOKENS = st.tuples(st.integers(1, 8), st.integers(0, 8)).map(
    lambda at: [int(i >= at[1]) for i in range(at[0])]
)
ASKED = st.tuples(TOKENS, st.sampled_from(["", "", "salt"]), st.sampled_from([True, True, True, False]))


def prompt(asked: Asked, block_size: int) -> Prompt:
    tokens, salt, reuse = asked
    return Prompt(len(tokens), block_hashes(tokens, block_size, (salt,)), reuse)


def plan(prompts: list[Prompt], block_size: int) -> list[Ride]:
    """How each rides when they come aboard whole and in this order."""
    prefixes = Prefixes(block_size)
    rides = []
    for one in prompts:
        rides.append(prefixes.find(one))
        prefixes.add(one)
    return rides


def planned(asked: list[Asked], block_size: int) -> list[Ride]:
    return plan([prompt(one, block_size) for one in asked], block_size)


def computed(asked: list[Asked], block_size: int) -> int:
    """Tokens that such a batch computes in all."""
    rides = planned(asked, block_size)
    return sum(len(one[0]) - ride.past for one, ride in zip(asked, rides, strict=True))


def common(a: Asked, b: Asked, block_size: int) -> int:
    """Tokens in full blocks that both begin with; of b's, at most all but the last."""
    if a[1] != b[1] or not b[2]:
        return 0
    same = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(a[0], b[0][:-1], strict=False))))
    return same // block_size * block_size


@given(st.lists(ASKED, max_size=8), SIZES)
def test_a_prompt_rides_as_far_as_any_before_it_goes(asked: list[Asked], block_size: int) -> None:
    for i, ride in enumerate(planned(asked, block_size)):
        shared = [common(asked[j], asked[i], block_size) for j in range(i)]
        assert ride.past == max(shared, default=0)
        if ride.behind is None:
            assert not ride.past
        else:
            assert shared[ride.behind] == ride.past


@given(st.lists(ASKED, max_size=8), SIZES)
def test_the_shorter_before_the_longer_computes_each_block_once(asked: list[Asked], block_size: int) -> None:
    """But for a block that prompts end with: to each of them it holds the last token."""
    asked = sorted(((tokens, salt, True) for tokens, salt, _ in asked), key=lambda one: len(one[0]))
    ends = [(salt, *tokens) for tokens, salt, _ in asked if len(tokens) % block_size == 0]
    blocks = {
        (salt, *tokens[:end])
        for tokens, salt, _ in asked
        for end in range(block_size, len(tokens) + 1, block_size)
    }
    rests = sum(len(tokens) % block_size for tokens, _, _ in asked)
    assert computed(asked, block_size) == rests + block_size * (len(ends) + len(blocks - set(ends)))


@given(st.lists(ASKED.map(lambda one: (*one[:2], True)), max_size=5), SIZES)
def test_no_order_computes_less_than_the_rising_one(asked: list[Asked], block_size: int) -> None:
    rising = computed(sorted(asked, key=lambda one: len(one[0])), block_size)
    assert all(rising <= computed(list(order), block_size) for order in permutations(asked))


@given(st.lists(st.tuples(ASKED, st.integers(0, 8)), min_size=1, max_size=6), SIZES)
def test_of_a_chunk_only_what_it_computes_is_shared(chunks: list[tuple[Asked, int]], block_size: int) -> None:
    prefixes = Prefixes(block_size)
    aboard: list[Asked] = []
    for one, upto in chunks:
        ride = prefixes.find(prompt(one, block_size))
        assert ride.past == max((common(other, one, block_size) for other in aboard), default=0)
        upto = min(upto, len(one[0]))
        assert prefixes.add(prompt(one, block_size), upto) == len(aboard)
        aboard.append((one[0][:upto], *one[1:]))


def test_documents_behind_one_instruction_and_one_query() -> None:
    """A reranker's batch: rows that nest two deep, and no row more than there are prompts."""
    instruction, query, another = [1] * 32, [2] * 16, [3] * 16
    asked: list[Asked] = [
        ([*instruction, *query, 10], "", True),
        ([*instruction, *query, 11, 11], "", True),
        ([*instruction, *another, 12], "", True),
        ([*instruction, *another, 13, 13], "", True),
        ([*instruction, *query, 14], "another tenant's", True),
    ]
    assert planned(asked, 16) == [Ride(0), Ride(48, 0), Ride(32, 0), Ride(48, 2), Ride(0)]


def test_a_prompt_that_shares_nothing_is_left_out() -> None:
    assert plan([Prompt(4), Prompt(4)], 2) == [Ride(0), Ride(0)]
    assert plan([], 2) == []


def test_a_block_that_a_chunk_leaves_half_computed_is_not_shared() -> None:
    prefixes = Prefixes(2)
    prefixes.add(prompt(([1, 2, 3, 4, 5], "", True), 2), upto=3)
    assert prefixes.find(prompt(([1, 2, 3, 4, 6], "", True), 2)) == Ride(2, 0)


def test_asking_takes_nobody_aboard() -> None:
    prefixes = Prefixes(1)
    one = prompt(([1, 2], "", True), 1)
    assert [prefixes.find(one), prefixes.find(one)] == [Ride(0), Ride(0)]
    prefixes.add(one)
    assert prefixes.find(one) == Ride(1, 0)
