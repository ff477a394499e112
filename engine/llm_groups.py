"""Groups: which of a script's prompts go to the engine in one call, and how its result becomes their answers."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from typing import Any

from msgspec import structs

from carpool.engine.answers import PoolingOutput, PoolingRequestOutput, answers_of
from carpool.engine.async_engine import AsyncEngine
from carpool.engine.errors import InvalidInput, InvalidParameter
from carpool.engine.late_chunking import LateChunkingMetadata, chunk_means
from carpool.engine.llm_params import check_late_chunking, cut_as_told, engines_own
from carpool.engine.model_info import ModelInfo
from carpool.engine.outputs import PoolingResult
from carpool.engine.params import PoolingParams, Task, TokenizationParams
from carpool.engine.terms import Terms

Answer = PoolingRequestOutput[PoolingOutput]


@dataclass(slots=True)
class Group:
    """`prompts` are all texts or all token ids; the caller has `prompts[i]` at `places[i]`, or has it `alone`."""

    params: PoolingParams
    tokenization: TokenizationParams
    terms: Terms
    alone: bool
    prompts: list[Any] = field(default_factory=list)
    places: list[int] = field(default_factory=list)

    def check(self, tasks: tuple[Task, ...], model: ModelInfo) -> None:
        """Refuse parameters that mean nothing for these tasks, or with this model."""
        if self.params.extra_kwargs:
            raise InvalidParameter("extra_kwargs is for LLM.score.", "extra_kwargs")
        if self.params.late_chunking_params:
            for prompt in self.prompts:
                check_late_chunking(prompt, self.tokenization, tasks, model)

    async def run(
        self, engine: AsyncEngine, tasks: tuple[Task, ...], on_progress: Callable[[int], object]
    ) -> PoolingResult:
        terms = structs.replace(self.terms, on_progress=on_progress)
        try:
            return await engine.pool(
                self.prompts, engines_own(self.params), self.tokenization, terms, task=tasks
            )
        except InvalidInput as error:
            names = ["input"] if self.alone else [f"input[{i}]" for i in self.places]
            raise error.blaming(names) from None

    def answers(
        self, engine: AsyncEngine, tasks: tuple[Task, ...], result: PoolingResult, ids: Seq[str]
    ) -> dict[int, Answer]:
        """By place among all prompts, to which `ids` belong."""
        answers = answers_of(result, [ids[i] for i in self.places], tasks)
        if self.params.late_chunking_params:
            both = zip(self.prompts, answers, strict=True)
            answers = [self._chunked(engine, text, answer) for text, answer in both]
        return dict(zip(self.places, answers, strict=True))

    def _chunked(self, engine: AsyncEngine, text: str, answer: Answer) -> Answer:
        """Of an answer with a row a token, as the head left them: one with a row a chunk, finished."""
        assert self.params.late_chunking_params is not None
        size, rows = self.params.late_chunking_params.chunk_size, answer.outputs.data
        ids, offsets = engine.offsets(text, self.tokenization.add_special_tokens)
        if not ids == answer.prompt_token_ids or len(rows) != len(ids):
            raise InvalidParameter(
                "Late chunking needs a vector and a place in the text for every token: this model has some without.",
                "late_chunking_params",
            )
        active = self.params.use_activation
        means = chunk_means(rows, size, unit=engine.model.normalize if active is None else active)
        return replace(
            answer, outputs=PoolingOutput(means), late_chunking=LateChunkingMetadata.of(offsets, size)
        )


def grouped(
    prompts: Seq[str | list[int]],
    params: Seq[PoolingParams],
    terms: Seq[Terms],
    tokenization: TokenizationParams,
) -> list[Group]:
    """As few as can be, of prompts with `params[i]` and `terms[i]` each."""
    groups: dict[tuple[bool, PoolingParams, Terms], Group] = {}
    for i, (prompt, own, asked) in enumerate(zip(prompts, params, terms, strict=True)):
        kind = (isinstance(prompt, str), own, asked)
        if (group := groups.get(kind)) is None:
            group = groups[kind] = Group(own, cut_as_told(tokenization, own), asked, alone=len(prompts) == 1)
        group.prompts.append(prompt)
        group.places.append(i)
    return list(groups.values())
