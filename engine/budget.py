"""Budget: how many tokens a batch may have. On a GPU the largest one is tried at start, and halved until it fits.

So no memory is set aside for anything: what the largest batch needed stays with torch, and serves every smaller one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

from carpool.engine import cost
from carpool.engine.batch import Batch
from carpool.engine.errors import ConfigError
from carpool.engine.params import PoolingParams, Task
from carpool.engine.sequence import Sequence

_CPU_TOKENS = cost.MOST_TOKENS  # batches are filled up to less where that is as fast: `cost.py`
# Not measured. What a small model needs to fill a large GPU, and a large model can be given: at a width of 4096 some
# GB of activations in 16 bits.
_GPU_TOKENS = 16_384


class Tried(Protocol):
    """A runner, as far as a trial goes."""

    def attempt(self, batch: Batch) -> None:
        """Run a batch as it is served, as many at once as may be under way, and raise what it raises."""


@dataclass(frozen=True, slots=True)
class Budget:
    """`tokens` at the most in a batch; `notice` if that is not what was meant."""

    tokens: int
    notice: str | None = None


def wanted(asked: int | None, max_model_len: int, device: torch.device, *, chunks: bool) -> int:
    """Tokens in a batch as the user asks, else what suits the device; any prompt fits, or is run in `chunks`."""
    if asked is not None and asked < max_model_len and not chunks:
        raise ConfigError(
            f"--max-num-batched-tokens {asked} is less than one prompt may have ({max_model_len}), and this model's "
            "prompts are not run in chunks: raise it, or lower --max-model-len."
        )
    return asked or max(_CPU_TOKENS if device.type == "cpu" else _GPU_TOKENS, max_model_len)


def fit_budget(fits: Callable[[int], bool], most: int, least: int) -> int | None:
    """The first of most, most/2, most/4, … and at last `least` that fits; None if not even that does."""
    tokens = most
    while not fits(tokens):
        if tokens == least:
            return None
        tokens = max(tokens // 2, least)
    return tokens


def tried(
    runners: Seq[tuple[torch.device, Tried]],
    *,
    most: int,
    max_model_len: int,
    max_num_seqs: int,
    vocab_size: int,
    tasks: Seq[Task],
) -> Budget:
    """The largest batch that fits each of the GPUs, after every runner has run it for every task.

    With that each kernel that serving uses is compiled and loaded before the first request. Raises ConfigError if not
    even one prompt of the longest fits, or if the model fails in another way.
    """
    budget = Budget(most)
    for device, runner in runners:

        def fits(tokens: int, device: torch.device = device, runner: Tried = runner) -> bool:
            # Few long prompts and many short ones: the first need most in attention, the second in results.
            lengths = (max_model_len, min(max_model_len, max(1, tokens // max_num_seqs)))
            return all(
                _fits(runner, device, rehearsed(tokens, length, max_num_seqs, vocab_size, tasks))
                for length in lengths
            )

        tokens = fit_budget(fits, budget.tokens, max_model_len)
        if tokens is None:
            raise ConfigError(
                f"A prompt of {max_model_len} tokens does not fit in the memory of {device} beside the model: "
                "lower --max-model-len, or take a 16-bit --dtype or a larger GPU."
            )
        if tokens < budget.tokens:
            notice = (
                f"A batch of {most} tokens does not fit in the memory of {device}: {tokens} are the most."
            )
            budget = Budget(tokens, notice)
    return budget


def _fits(runner: Tried, device: torch.device, batch: Batch) -> bool:
    try:
        runner.attempt(batch)
        return True
    except Exception as error:
        if not is_shortage(error):
            first = str(error).strip().partition("\n")[0]
            raise ConfigError(
                f"The model fails at the first batch on {device}: {type(error).__name__}: {first}"
            ) from error
    # Not before the error is gone, whose traceback holds all that had been allocated. Pieces of the sizes that did not
    # fit would be in the way of smaller ones.
    torch.cuda.empty_cache()
    return False


def rehearsed(tokens: int, length: int, max_num_seqs: int, vocab_size: int, tasks: Seq[Task]) -> Batch:
    """Prompts of `length` up to so many tokens, and each task for each of them.

    All differ, since equal ones would be run once.
    """
    whole, rest = divmod(tokens, length)
    lengths = ([length] * whole + [rest] * (rest > 0))[:max_num_seqs]
    prompts = [[i // vocab_size % vocab_size] + [i % vocab_size] * (own - 1) for i, own in enumerate(lengths)]
    return Batch.of(
        [Sequence(0, i, ids, PoolingParams(), task) for i, ids in enumerate(prompts) for task in tasks]
    )


@contextmanager
def room_for_weights(device: torch.device) -> Iterator[None]:
    """What is loaded within this block must fit the device; ConfigError if it does not."""
    try:
        yield
    except Exception as error:
        if not is_shortage(error):
            raise
        other = "or more memory" if device.type == "cpu" else "a larger GPU, or --device cpu"
        raise ConfigError(
            f"The model's weights do not fit in the memory of {device}: take a 16-bit --dtype, {other}."
        ) from error


_SHORT = ("out of memory", "ALLOC_FAILED", "can't allocate memory")  # the last is torch's word for a CPU's


def is_shortage(error: BaseException) -> bool:
    """Whether a device is out of memory: in a class of torch's, Python's or none, where only its words say so."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _SHORT)
    )
