"""Batch: the sequences that ride together through one forward pass."""

from dataclasses import dataclass

from carpool.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences by adapter and, within one, in rising order of length: what computes alike is neighbours.

    The adapter comes first because a seam between adapters costs two small products in every adapted layer, and a
    seam between lengths one call a layer.
    """

    sequences: tuple[Sequence, ...]

    @classmethod
    def of(cls, sequences: list[Sequence]) -> "Batch":
        return cls(tuple(sorted(sequences, key=lambda seq: (seq.adapter, seq.num_tokens))))

    def distinct(self) -> "tuple[Batch, list[int]]":
        """One sequence of each work, in this order; and for each of ours, the place of the one that does its work.

        So that a text of which several results are asked, a vector and weights say, is run once.
        """
        workers: dict[tuple[object, ...], int] = {}
        places = [workers.setdefault(seq.work, len(workers)) for seq in self.sequences]
        if len(workers) == len(places):
            return self, places
        first = {place: seq for seq, place in zip(reversed(self.sequences), reversed(places), strict=True)}
        return Batch(tuple(first[place] for place in range(len(workers)))), places

    @property
    def num_tokens(self) -> int:
        return sum(seq.num_tokens for seq in self.sequences)

    def halves(self) -> "tuple[Batch, Batch]":
        """Two batches of at least one sequence each; needs two sequences or more."""
        middle = len(self.sequences) // 2
        return Batch(self.sequences[:middle]), Batch(self.sequences[middle:])
