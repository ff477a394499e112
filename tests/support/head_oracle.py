"""What a checkpoint with a head answers when stock transformers runs it, one text at a time, and how ours is asked.

`HeadOracle` imports nothing of carpool; `answer` asks an engine's parts for one batch without an event loop.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from carpool.engine.batch import Batch
from carpool.engine.build import Parts
from carpool.engine.params import PoolingParams, Task
from carpool.engine.sequence import Sequence

TOLERANCE = 2e-5  # float32, of numbers around 1


class HeadOracle:
    """`auto` is the transformers class to load the folder `path` with."""

    def __init__(self, path: Path, auto: Any = AutoModelForSequenceClassification) -> None:
        self.full: Any = auto.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(path)

    @torch.no_grad()
    def logits(self, ids: Seq[int], types: Seq[int] | None = None) -> Tensor:
        """[labels] of a sequence classifier, [tokens, labels] of a token classifier, of these ids alone."""
        row = torch.tensor([list(ids)])
        inputs = {"input_ids": row, "attention_mask": torch.ones_like(row)}
        if types is not None and any(types):
            inputs["token_type_ids"] = torch.tensor([list(types)])
        logits: Tensor = self.full(**inputs).logits
        return logits[0]

    @torch.no_grad()
    def hidden(self, ids: Seq[int]) -> Tensor:
        """[tokens, H] behind the last layer and its norm."""
        row = torch.tensor([list(ids)])
        hidden: Tensor = self.full.base_model(
            input_ids=row, attention_mask=torch.ones_like(row)
        ).last_hidden_state
        return hidden[0]

    def pair(self, query: str, document: str, **options: Any) -> tuple[list[int], list[int] | None]:
        """Ids and token types of a pair, by transformers' own tokenizer."""
        found = self.tokenizer(query, document, **options)
        return found["input_ids"], found.get("token_type_ids")


def answer(
    parts: Parts, token_ids: Seq[list[int]], task: Task = "classify", params: PoolingParams | None = None
) -> list[Tensor]:
    """One batch of all of them; results in the order given."""
    own = params or PoolingParams()
    return run(parts, [Sequence(0, i, list(ids), own, task) for i, ids in enumerate(token_ids)])


def run(parts: Parts, sequences: Seq[Sequence]) -> list[Tensor]:
    """One batch; results by the sequences' index, from 0."""
    batch = Batch.of(list(sequences))
    results: dict[int, Tensor] = {}
    for seq, row in zip(batch.sequences, parts.runners[0].run(batch), strict=True):
        if isinstance(row, Exception):
            raise row
        results[seq.index] = torch.from_numpy(row)
    return [results[i] for i in range(len(sequences))]


def close(ours: Tensor, theirs: Tensor) -> bool:
    """Equal in shape and, within what orders of summation differ by, in value."""
    scale = max(1.0, float(theirs.abs().max())) if theirs.numel() else 1.0
    return ours.shape == theirs.shape and bool(((ours - theirs).abs() <= TOLERANCE * scale).all())
