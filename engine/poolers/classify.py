"""Classification pools: a pooled row, or every row, through the head to logits and on to probabilities."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from carpool.engine.poolers.methods import Method
from carpool.engine.poolers.pooler import Rows, token_rows
from carpool.engine.sequence import Sequence

Activate = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class ClassifyHead:
    """rows [R, H] → logits [R, labels]: the head, then (logit - mean) / sigma.

    `activate` makes probabilities of logits, for those who want them; `by_default` is for those who do not say.
    """

    head: nn.Module
    activate: Activate
    by_default: bool = True
    logit_mean: float = 0.0
    logit_sigma: float = 1.0

    def logits(self, rows: Tensor) -> Tensor:
        logits: Tensor = self.head(rows)
        return (logits - self.logit_mean) / self.logit_sigma

    def finish(self, logits: Tensor, sequence: Sequence) -> Tensor:
        wish = sequence.params.use_activation
        return self.activate(logits) if (self.by_default if wish is None else wish) else logits


class ClassifyPool:
    """One result a text: [labels]. The head is behind the pooling `method` or, if `late`, before it."""

    def __init__(self, method: Method, head: ClassifyHead, late: bool = False) -> None:
        self._method = method
        self._head = head
        self._late = late

    def __call__(
        self, hidden: Tensor, cu_seqlens: Tensor, places: Seq[int], sequences: Seq[Sequence]
    ) -> Rows:
        if self._late:
            logits = self._method(self._head.logits(hidden.float()), cu_seqlens)[list(places)]
        else:
            logits = self._head.logits(self._method(hidden, cu_seqlens)[list(places)])
        plain = logits.cpu().numpy()
        probabilities = self._head.activate(logits).cpu().numpy()
        wishes = [seq.params.use_activation for seq in sequences]
        wanted = [self._head.by_default if wish is None else wish for wish in wishes]
        return [probabilities[i] if yes else plain[i] for i, yes in enumerate(wanted)]


class TokenClassifyPool:
    """One result a token: [tokens, labels].

    A process reward model keeps the rows of `step_tag_id` only, and of the labels those in `returned_token_ids`;
    the activation is over what is kept.
    """

    def __init__(
        self, head: ClassifyHead, step_tag_id: int | None = None, returned_token_ids: Seq[int] | None = None
    ) -> None:
        self._head = head
        self._step_tag_id = step_tag_id
        self._columns = list(returned_token_ids) if returned_token_ids else None

    def __call__(
        self, hidden: Tensor, cu_seqlens: Tensor, places: Seq[int], sequences: Seq[Sequence]
    ) -> Rows:
        rows, lengths = token_rows(cu_seqlens, places)
        if self._step_tag_id is not None:
            token_ids = [token for seq in sequences for token in seq.token_ids]
            kept = [token == self._step_tag_id for token in token_ids]
            rows = [row for row, keep in zip(rows, kept, strict=True) if keep]
            lengths = [seq.token_ids.count(self._step_tag_id) for seq in sequences]
        logits = self._head.logits(hidden[rows].float())
        if self._columns is not None:
            logits = logits[:, self._columns]
        texts = torch.split(logits, lengths)
        return [
            self._head.finish(text, seq).cpu().numpy() for text, seq in zip(texts, sequences, strict=True)
        ]


def activation_named(name: str) -> Activate:
    """Identity, sigmoid and softmax by name; softmax is over the labels."""
    return {
        "identity": lambda logits: logits,
        "sigmoid": torch.sigmoid,
        "softmax": lambda logits: torch.softmax(logits, dim=-1),
    }[name]
