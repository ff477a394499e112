"""Call: one request to the model, between its body and its answer. All routes that run the model go through here."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from time import perf_counter
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

from aiohttp import web

from carpool.engine.errors import InputTooLong, InvalidInput, UnsupportedTask
from carpool.engine.terms import Terms
from carpool.server.errors import InvalidRequest, UnknownModel
from carpool.server.headers import label
from carpool.server.keys import CLIENT, CONFIG, DEADLINE, ENGINE, METRICS, REQUEST_ID
from carpool.server.protocol import PromptTokensDetails, Usage

if TYPE_CHECKING:
    from carpool.engine.async_engine import Prompts
    from carpool.engine.outputs import PoolingResult, ScoreResult, Timings
    from carpool.engine.params import PoolingParams, Task, TokenizationParams
    from carpool.server.protocol import Conversation
    from carpool.server.protocol.model_request import TextRequest

R = TypeVar("R", bound=web.StreamResponse)

UNSPECIFIED = "default/not-specified"  # what Infinity's clients write for no model


class Asked(Protocol):
    """What every request to the model says; `remedy` is its own word for having cut what is too long."""

    remedy: ClassVar[str]
    model: str | None
    priority: int | None
    request_id: str | None
    cache_salt: str | None


class Call:
    """`name` is the served model's, or that of the adapter which was asked for; `model` is what is known of it."""

    def __init__(self, request: web.Request, asked: Asked) -> None:
        """Raises UnknownModel, and NotReady while the model loads."""
        self._request = request
        self._asked = asked
        self._app = app = request.app
        self.name = served_name(app, asked.model)
        self._engine = app[ENGINE]
        self.model = self._engine.model
        self._adapter = self.name if self.name in self.model.lora_modules else None
        self._tokens = 0
        self._timings: Timings | None = None
        self._answered = 0.0
        if (own := label(asked.request_id)) and label(request.headers.get("X-Request-Id")) is None:
            request[REQUEST_ID] = own  # a `request_id` in the body counts where no header came with it

    @property
    def id(self) -> str:
        return self._request[REQUEST_ID]

    def require(self, offered: bool, api: str) -> None:
        if not offered:
            raise UnsupportedTask(f"The model does not support {api} API")

    def take_task(self, name: str | None, field: str) -> str:
        """Ride on the adapter that the checkpoint has for this task; returns the prompt that goes before each text.

        A model without such adapters has no tasks to take, and knows nothing of names for them.
        """
        tasks = self.model.task_adapters
        if name is None or not tasks:
            return ""
        if name not in tasks:
            raise InvalidRequest(
                f"Unsupported {field} '{name}'. Supported values: {', '.join(sorted(tasks))}.", field
            )
        if self._adapter is not None:
            raise InvalidRequest(
                f"{field} chooses an adapter, and so does model: {self.name} has no tasks.", field
            )
        self._adapter = tasks[name].adapter
        return tasks[name].prompt

    async def prompts(self, asked: TextRequest) -> Prompts:
        """The request's texts or token ids; chats are rendered."""
        if asked.is_chat:
            return await self.render(asked.conversations(), asked.rendering(), asked.field)
        return asked.prompts()

    async def render(
        self, conversations: Sequence[Conversation], options: Mapping[str, Any], field: str
    ) -> list[str]:
        """`field` is where they stood in the body."""
        try:
            return await rendered(self._app, conversations, options)
        except InvalidInput as error:
            rename(error, {"messages": field})
            raise

    async def tokenize(self, texts: list[str], tokenization: TokenizationParams) -> list[list[int]]:
        """What `pool` would run on, uncut."""
        return await self._engine.tokenize(texts, tokenization)

    async def pair_prompts(self, pairs: list[tuple[str, str]]) -> Prompts:
        """Pairs of texts as prompts for `pool`."""
        return await self._engine.pair_prompts(pairs)

    async def pool(
        self,
        task: Task | tuple[Task, ...],
        prompts: Prompts,
        params: PoolingParams,
        tokenization: TokenizationParams,
        field: str = "input",
        prompt: str = "",
    ) -> PoolingResult:
        """`field` is where the prompts stood in the body; `prompt` is what was put before each text."""
        if prompt:
            tokenization = replace(tokenization, prompt=prompt)
        try:
            result = await self._engine.pool(prompts, params, tokenization, self._terms(), task=task)
        except InvalidInput as error:
            self._reword(error, {"input": field})
            raise
        self._note(result)
        return result

    async def score(
        self,
        queries: list[str],
        documents: list[str],
        params: PoolingParams,
        tokenization: TokenizationParams,
        template_kwargs: Mapping[str, Any] | None = None,
        fields: tuple[str, str] = ("queries", "documents"),
    ) -> ScoreResult:
        """`fields` are where the two sides stood in the body."""
        try:
            result = await self._engine.score(
                queries, documents, params, tokenization, self._terms(), template_kwargs=template_kwargs
            )
        except InvalidInput as error:
            self._reword(error, {"queries": fields[0], "documents": fields[1]})
            raise
        self._note(result)
        return result

    def _reword(self, error: InvalidInput, fields: Mapping[str, str]) -> None:
        rename(error, fields)
        if isinstance(error, InputTooLong):
            error.args = (str(error).replace(InputTooLong.REMEDY, self._asked.remedy),)

    def _terms(self) -> Terms:
        request, asked = self._request, self._asked
        return Terms(
            adapter=self._adapter,
            client=request[CLIENT],
            priority=asked.priority or 0,
            deadline=request[DEADLINE] if "X-Request-Timeout" in request.headers else None,
            cache_salt=asked.cache_salt,
        )

    def _note(self, result: PoolingResult | ScoreResult) -> None:
        self._tokens += result.prompt_tokens
        self._timings = result.timings
        self._answered = perf_counter()

    def usage(self, result: PoolingResult | ScoreResult) -> Usage:
        """What the answer says that it cost; with --enable-prompt-tokens-details also what the cache spared."""
        tokens = result.prompt_tokens
        told = self._app[CONFIG].enable_prompt_tokens_details
        details = PromptTokensDetails(result.cached_tokens) if told else None
        return Usage(tokens, tokens, prompt_tokens_details=details)

    def finish(self, response: R) -> R:
        """Account for the answer, and say in it where the time went; of a large one, up to its first bytes."""
        assert self._timings is not None, "the model ran"
        encode = perf_counter() - self._answered
        # After the answer: it leaves in this turn of the loop.
        counted = self._app[METRICS].answered
        asyncio.get_running_loop().call_soon(counted, self._tokens, self._timings, encode)
        response.headers["Server-Timing"] = _server_timing(self._timings, encode)
        return response


def rename(error: InvalidInput, fields: Mapping[str, str]) -> None:
    """The engine has its own names for what it was given; the client is to read those of its request."""
    name, bracket, rest = (error.param or "").partition("[")
    if name in fields:
        error.param = fields[name] + bracket + rest


def served_name(app: web.Application, asked: str | None) -> str:
    """The name answers carry: an adapter's own, or the model's first, whichever of its names the request used."""
    config = app[CONFIG]
    names = config.model_names
    if not asked or asked in names or asked == UNSPECIFIED:
        return names[0]
    if asked in app[ENGINE].model.lora_modules:
        return asked
    raise UnknownModel(f"The model `{asked}` does not exist.", "model")


def prefixed(prompt: str, prompts: Prompts, field: str) -> Prompts:
    """The prompts with `prompt` before each text. `field` asked for that."""
    if not prompt:
        return prompts
    texts = [item for item in prompts if isinstance(item, str)]
    if not texts:
        raise InvalidRequest(f"{field} goes with texts, not with token ids.", field)
    return [prompt + text for text in texts]


async def rendered(
    app: web.Application, conversations: Sequence[Conversation], options: Mapping[str, Any]
) -> list[str]:
    """Each conversation as text, by the model's chat template; beside the event loop, for templates can be slow."""
    engine = app[ENGINE]

    def render_all() -> list[str]:
        return [engine.render(conversation, **options) for conversation in conversations]

    return await asyncio.get_running_loop().run_in_executor(None, render_all)


def _server_timing(timings: Timings, encode: float) -> str:
    """Where the time went, in milliseconds; browsers' and curl's users can read it off the answer."""
    return (
        f"tokenize;dur={1000 * timings.tokenize:.3f}, queue;dur={1000 * timings.queue:.3f}, "
        f"forward;dur={1000 * timings.forward:.3f}, encode;dur={1000 * encode:.3f}"
    )
