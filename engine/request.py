"""Request: what all prompts of one call have in common. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from carpool.engine.params import PoolingParams, Task
from carpool.engine.prepared import Prepared
from carpool.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Request:
    """`adapter` is the number of the one to ride on, 0 for none; lower `priority` runs first; `client` is whose share
    of the engine it is charged to; nothing that was computed under another `salt` is used for it.
    """

    params: PoolingParams
    tasks: tuple[Task, ...]
    adapter: int = 0
    salt: str | None = None
    client: str = ""
    priority: int = 0

    def sequences(
        self, number: int, prepared: Prepared, arrival: float, deadline: float | None
    ) -> Iterator[Sequence]:
        """One for each row: task by task of the first prompt, then of the next. `number` is the call's."""
        nowhere: list[None] = [None] * len(prepared.token_ids)
        each = zip(
            prepared.token_ids,
            prepared.type_starts or nowhere,
            prepared.unseen or nowhere,
            prepared.prompts or nowhere,
            strict=True,
        )
        for i, (ids, start, end, prompt) in enumerate(each):
            for index, task in enumerate(self.tasks, i * len(self.tasks)):
                yield Sequence(
                    number,
                    index,
                    ids,
                    self.params,
                    task,
                    arrival,
                    deadline,
                    self.priority,
                    self.client,
                    type_start=start,
                    adapter=self.adapter,
                    unseen=end,
                    skip=prepared.skip,
                    key=prepared.keys[index] if prepared.keys else b"",
                    prompt=prompt,
                )
