"""Batch: the sequences that ride together through one forward pass."""

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from carpool.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences by adapter and, within one, in rising order of length: what computes alike is neighbours.

    The adapter comes first because a seam between adapters costs two small products in every adapted layer, and a
    seam between lengths one call a layer. Those that look back at what was run before come last of all.
    `counts` are the tokens that are run of each, from its `computed` on.
    """

    sequences: tuple[Sequence, ...]
    counts: tuple[int, ...] = ()

    @classmethod
    def of(cls, sequences: list[Sequence], counts: Mapping[Sequence, int] | None = None) -> "Batch":
        """`counts` where they are not all that remains."""
        size = {seq: seq.remaining for seq in sequences} if counts is None else counts
        ordered = sequences
        if len(sequences) > 1:
            ordered = sorted(sequences, key=lambda seq: (seq.computed > 0, seq.adapter, size[seq]))
        return cls(tuple(ordered), tuple(map(size.__getitem__, ordered)))

    def __post_init__(self) -> None:
        if not self.counts:
            object.__setattr__(self, "counts", tuple(seq.remaining for seq in self.sequences))

    def distinct(self) -> "tuple[Batch, list[int]]":
        """One sequence of each work, in this order; and for each of ours, the place of the one that does its work.

        So that a text of which several results are asked, a vector and weights say, is run once.
        """
        if len(self.sequences) == 1:
            return self, [0]
        workers: dict[tuple[object, ...], int] = {}
        places = [workers.setdefault(seq.work, len(workers)) for seq in self.sequences]
        if len(workers) == len(places):
            return self, places
        first = {place: i for i, place in reversed(list(enumerate(places)))}
        return self._only([first[place] for place in range(len(workers))]), places

    @property
    def num_tokens(self) -> int:
        return sum(self.counts)

    @property
    def is_paged(self) -> bool:
        """Whether some of it is kept in the cache: then its parts cannot be run apart, for they may need each other."""
        return any(seq.table is not None for seq in self.sequences)

    def halves(self) -> "tuple[Batch, Batch]":
        """Two batches of at least one sequence each; needs two sequences or more."""
        places = range(len(self.sequences))
        middle = len(places) // 2
        return self._only(places[:middle]), self._only(places[middle:])

    def _only(self, places: Seq[int]) -> "Batch":
        return Batch(tuple(self.sequences[i] for i in places), tuple(self.counts[i] for i in places))
