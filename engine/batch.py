"""Batch: the sequences that ride together through one forward pass."""

from dataclasses import dataclass

from carpool.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences in rising order of length, so that equal lengths are neighbours."""

    sequences: tuple[Sequence, ...]

    @classmethod
    def of(cls, sequences: list[Sequence]) -> "Batch":
        return cls(tuple(sorted(sequences, key=lambda seq: seq.num_tokens)))

    @property
    def num_tokens(self) -> int:
        return sum(seq.num_tokens for seq in self.sequences)

    def halves(self) -> "tuple[Batch, Batch]":
        """Two batches of at least one sequence each; needs two sequences or more."""
        middle = len(self.sequences) // 2
        return Batch(self.sequences[:middle]), Batch(self.sequences[middle:])
