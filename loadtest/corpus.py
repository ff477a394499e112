"""Deterministic English passages with a natural spread of lengths. No download: the words are CPython's own docs.

The only texts of the load test and of the benchmarks. It lives here, and imports nothing but the standard library,
because `loadtest/` may know nothing of ours while `benchmarks/` may look at `loadtest/`.
"""

import math
import re
from dataclasses import dataclass
from functools import cache
from pydoc_data.topics import topics
from random import Random


@dataclass(frozen=True, slots=True)
class Spread:
    """Lengths in words, drawn from a log-normal: most near the median, some many times as long.

    `sigma` is the standard deviation of the logarithm; 0 makes all alike.
    """

    median: float
    sigma: float
    least: int
    most: int

    def draw(self, random: Random) -> int:
        return max(
            self.least, min(self.most, round(random.lognormvariate(math.log(self.median), self.sigma)))
        )


SHORT = Spread(median=8, sigma=0.5, least=2, most=24)  # queries and titles
LONG = Spread(median=320, sigma=0.5, least=128, most=2_000)  # pages
MIXED = Spread(
    median=50, sigma=0.8, least=3, most=400
)  # passages; 100 BERT tokens on average when cut at 256


@cache
def words() -> list[str]:
    """About 65,000 words in a fixed order; which ones depends on the Python version."""
    text = "\n".join(topics[name] for name in sorted(topics))
    return re.sub(r"[*`_|+=~^-]{2,}", " ", text).split()  # without the rules and underlines of the markup


def passages(count: int, spread: Spread, seed: int = 0) -> list[str]:
    """`count` runs of consecutive words, no two alike: an engine that remembers gains nothing."""
    random = Random(seed)
    source = words()
    found: dict[str, None] = {}
    while len(found) < count:
        length = spread.draw(random)
        while True:
            length = min(length, len(source) // 2)
            start = random.randrange(len(source) - length)
            text = " ".join(source[start : start + length])
            if text not in found:
                break
            length += 1  # there are only so many of one word
        found[text] = None
    return list(found)
