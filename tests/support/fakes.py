"""FakeEngine: the face of AsyncEngine, with a model that needs no weights. Its fields say how it behaves."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
from msgspec import structs
from numpy.typing import NDArray

from carpool.engine.changes import Change
from carpool.engine.errors import (
    EmptyInput,
    EngineError,
    InputTooLong,
    InvalidInput,
    NotReady,
    TokenOutOfVocabulary,
)
from carpool.engine.model_info import ModelInfo
from carpool.engine.outputs import Piece, PoolingResult, ScoreResult, Timings
from carpool.engine.params import Matryoshka, PoolingParams, Task, TaskAdapter, TokenizationParams
from carpool.engine.stats import CacheStats, Observer, ResultStats, Unobserved
from carpool.engine.terms import Terms

VOCAB_SIZE = 1000
WIDTH = 8
CLS, SEP = 101, 102
_NO_TERMS = Terms()

FAKE_MODEL = ModelInfo(
    root="/models/fake",
    architectures=("FakeModel",),
    tasks=frozenset({"embed", "token_embed"}),
    max_model_len=256,
    vocab_size=VOCAB_SIZE,
    embedding_size=WIDTH,
    matryoshka=Matryoshka(WIDTH),
    pooling="MEAN",
    normalize=True,
    dtype="float32",
    device="cpu",
    workers=1,
    parameters=0,
    max_num_batched_tokens=2048,
    max_num_seqs=256,
    attention="fake",
)


LABELS = ("negative", None, "positive")
FAKE_CLASSIFIER = replace(
    FAKE_MODEL,
    architectures=("FakeForSequenceClassification",),
    tasks=frozenset({"classify", "token_classify"}),
    default_task="classify",
    labels=LABELS,
)
FAKE_CROSS_ENCODER = replace(FAKE_CLASSIFIER, labels=("LABEL_0",))
FAKE_TASKED = replace(
    FAKE_MODEL,
    adapters={"retrieval.query": 1, "retrieval.passage": 2, "separation": 3, "mine": 4},
    lora_modules={"mine": "/adapters/mine"},
    task_adapters={
        "retrieval.query": TaskAdapter("retrieval.query", "Q: "),
        "retrieval.passage": TaskAdapter("retrieval.passage", "P: "),
        "separation": TaskAdapter("separation"),
    },
    default_adapter="separation",
    prompts={"retrieval.query": "Q: ", "retrieval.passage": "P: ", "separation": "", "other": "O: "},
)
FAKE_M3 = replace(
    FAKE_MODEL,
    tasks=frozenset({"embed", "token_embed", "sparse_embed", "token_classify"}),
    labels=("weight",),
)
FAKE_TAGGER = replace(FAKE_CLASSIFIER, tasks=frozenset({"token_classify"}), default_task="token_classify")
FAKES = {
    "embedder": FAKE_MODEL,
    "m3": FAKE_M3,
    "classifier": FAKE_CLASSIFIER,
    "cross-encoder": FAKE_CROSS_ENCODER,
    "tagger": FAKE_TAGGER,
}


class FakeEngine:
    """Tokens are a text's characters; a vector's numbers follow from the prompt's ids."""

    def __init__(self, model: ModelInfo = FAKE_MODEL, state: str = "ready") -> None:
        self.state = state
        self.waiting_tokens = 0
        self.waiting_sequences = 0
        self.observer: Observer = Unobserved()
        self.cache_stats: CacheStats | None = None
        self.result_stats: ResultStats | None = None
        self.cached = 0  # tokens of each prompt that the cache has
        self.error: BaseException | None = None  # raised by pool()
        self.token_id_input = True
        self.gate = asyncio.Event()  # pool() answers once it is open
        self.gate.set()
        self.loaded = asyncio.Event()  # start() returns once it is set
        self.loaded.set()
        self.dead = asyncio.Event()
        self.calls: list[dict[str, object]] = []
        self.changes: list[Change] = []
        self.cancelled = 0
        self._model = model

    async def change(self, change: Change) -> None:
        if self.error:
            raise self.error
        self.changes.append(change)

    @property
    def model(self) -> ModelInfo:
        if self.state == "starting":
            raise NotReady("The model is still loading.", retry_after=5)
        return self._model

    async def start(self) -> None:
        await self.loaded.wait()
        if self.error:
            raise self.error
        self.state = "ready"

    async def died(self) -> None:
        await self.dead.wait()
        self.state = "dead"

    def drain(self) -> None:
        self.state = "draining"

    async def stop(self, timeout: float) -> bool:
        self.drain()
        try:
            async with asyncio.timeout(timeout):
                while self.waiting_sequences:
                    await asyncio.sleep(0.005)
        except TimeoutError:
            return False
        self.state = "stopped"
        return True

    async def tokenize(self, texts: list[str], params: TokenizationParams) -> list[list[int]]:
        return [self._ids(text, params.add_special_tokens) for text in texts]

    def tokens(self, token_ids: list[int]) -> list[str]:
        return [chr(token) for token in token_ids]

    async def pieces(self, texts: list[str], add_special_tokens: bool) -> list[list[Piece]]:
        cls, sep = [Piece(CLS, "[CLS]", None, None)], [Piece(SEP, "[SEP]", None, None)]
        found = [[Piece(ord(c) % VOCAB_SIZE, c, i, i + 1) for i, c in enumerate(text)] for text in texts]
        return [[*cls, *pieces, *sep] for pieces in found] if add_special_tokens else found

    async def detokenize(self, token_ids: list[int], skip_special_tokens: bool = False) -> str:
        skipped = {CLS, SEP} if skip_special_tokens else set()
        return "".join(chr(token) for token in token_ids if token < VOCAB_SIZE and token not in skipped)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        if not self.model.chat_template:
            raise InvalidInput("This model has no chat template.", "messages")
        text = "".join(f"<{message['role']}>{message.get('content')}" for message in messages)
        ends = ">" * add_generation_prompt + "…" * continue_final_message
        return f"{text}{ends}{tools or ''}{kwargs or ''}"

    async def pair_prompts(self, pairs: list[tuple[str, str]]) -> list[str] | list[tuple[str, str]]:
        if self.model.score_template:
            return [f"<query>{query}<document>{document}" for query, document in pairs]
        return [a + b for a, b in pairs] if self.model.pairs == "concatenated" else pairs

    async def pool(
        self,
        prompts: list[str] | list[list[int]] | list[tuple[str, str]],
        params: PoolingParams,
        tokenization: TokenizationParams,
        terms: Terms = _NO_TERMS,
        *,
        task: Task | tuple[Task, ...] = "embed",
    ) -> PoolingResult:
        tasks = task if isinstance(task, tuple) else (task,)
        assert self.model.tasks.issuperset(tasks)
        self.calls.append(
            {
                "prompts": prompts,
                "params": params,
                "tokenization": tokenization,
                "task": task,
                **_told(terms),
            }
        )
        if self.error:
            raise self.error
        if not self.token_id_input and isinstance(prompts[0], list):
            raise InvalidInput("Token ids are not taken.", "input")
        each: Any = prompts  # a union of lists, of which a type checker makes a sequence of objects
        alone = len(prompts) == 1
        token_ids = [self._check(prompt, tokenization, None if alone else i) for i, prompt in enumerate(each)]
        await self._wait(token_ids)
        rows = [self._row(ids, each_task, params) for ids in token_ids for each_task in tasks]
        return PoolingResult(rows, token_ids, Timings(0.001, 0.002, 0.003), [self.cached] * len(token_ids))

    async def score(
        self,
        queries: list[str],
        documents: list[str],
        params: PoolingParams,
        tokenization: TokenizationParams,
        terms: Terms = _NO_TERMS,
        *,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> ScoreResult:
        """A pair's score is the length of its document, or less one half where its texts differ."""
        if not queries or not documents:
            raise EmptyInput("At least one text must be given", "documents" if queries else "queries")
        if len(queries) not in (1, len(documents)):
            raise InvalidInput("Input lengths must be either 1:1, 1:N or N:N")
        self.calls.append(
            {
                "queries": queries,
                "documents": documents,
                "params": params,
                "tokenization": tokenization,
                "template_kwargs": template_kwargs,
                **_told(terms),
            }
        )
        if self.error:
            raise self.error
        ids = [
            self._check(text, tokenization, i, "documents") for i, text in enumerate([*queries, *documents])
        ]
        await self._wait(ids)
        scores = [len(text) - 0.5 * (text not in queries) for text in documents]
        tokens, cached = sum(map(len, ids)), self.cached * len(ids)
        return ScoreResult(scores, tokens, Timings(0.001, 0.002, 0.003), cached_tokens=cached)

    async def _wait(self, token_ids: list[list[int]]) -> None:
        self.waiting_sequences += len(token_ids)
        self.waiting_tokens += sum(map(len, token_ids))
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += len(token_ids)
            self.observer.sequences_cancelled(len(token_ids))
            raise
        finally:
            self.waiting_sequences -= len(token_ids)
            self.waiting_tokens -= sum(map(len, token_ids))
        self.observer.batch_done(sum(map(len, token_ids)), len(token_ids), 0.003)

    def _check(
        self,
        prompt: str | list[int] | tuple[str, str],
        tokenization: TokenizationParams,
        index: int | None = None,
        field: str = "input",
    ) -> list[int]:
        place = field if index is None else f"{field}[{index}]"
        if isinstance(prompt, tuple):
            prompt = "".join(prompt)
        if isinstance(prompt, str) and not prompt.isascii():
            try:
                prompt.encode()
            except UnicodeEncodeError:
                raise InvalidInput("input holds a lone surrogate.", place) from None
        ids = self._ids(prompt, tokenization.add_special_tokens) if isinstance(prompt, str) else prompt
        for token in ids:
            if not 0 <= token < VOCAB_SIZE:
                raise TokenOutOfVocabulary(f"Token id {token} is out of vocabulary.", place)
        limit = self._model.max_model_len
        if tokenization.truncate_prompt_tokens is not None:
            limit = tokenization.truncate_prompt_tokens % (limit + 1)
            ids = ids[:limit]
        if len(ids) > limit:
            raise InputTooLong(f"{len(ids)} tokens, but the model takes {limit}.", place)
        if not ids:
            raise EmptyInput("The prompt has no tokens.", place)
        return ids

    def _ids(self, text: str, special: bool) -> list[int]:
        ids = [ord(character) % VOCAB_SIZE for character in text]
        return [CLS, *ids, SEP] if special else ids

    def _row(self, ids: list[int], task: Task, params: PoolingParams) -> NDArray[Any]:
        if task == "sparse_embed":  # a token weighs what it is, in thousandths
            return np.array([[token, token / 1000] for token in sorted(set(ids))], np.float32)
        if "embed" in task:
            width = params.dimensions or WIDTH
            kind: Any = ml_dtypes.bfloat16 if params.embed_dtype == "bfloat16" else params.embed_dtype
            vector = self._vector(ids, WIDTH)[:width].astype(kind)
            rows = [vector] * (1 if task == "embed" else len(ids))
        else:
            rows = [self._probabilities(ids, params)] * (1 if task == "classify" else len(ids))
        return rows[0] if task in ("embed", "classify") else np.stack(rows)

    def _vector(self, ids: list[int], width: int) -> NDArray[np.float32]:
        return np.random.default_rng(ids).standard_normal(width, dtype=np.float32)

    def _probabilities(self, ids: list[int], params: PoolingParams) -> NDArray[np.float32]:
        logits = self._vector(ids, len(self._model.labels))
        if params.use_activation is False:
            return logits
        powers = np.exp(logits)
        return np.asarray(powers / powers.sum(), np.float32)


def _told(terms: Terms) -> dict[str, object]:
    """By their names, and in place of the deadline how many seconds are left."""
    told = structs.asdict(terms)
    deadline = told.pop("deadline")
    return {**told, "timeout": None if deadline is None else deadline - time.monotonic()}


def engine_errors() -> list[type[EngineError]]:
    """Every leaf of the engine's family."""
    pending, leaves = [EngineError], []
    while pending:
        cls = pending.pop()
        children = cls.__subclasses__()
        pending += children
        leaves += [] if children else [cls]
    return leaves
