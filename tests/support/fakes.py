"""FakeEngine: the face of AsyncEngine, with a model that needs no weights. Its fields say how it behaves."""

from __future__ import annotations

import asyncio

import numpy as np

from carpool.engine.errors import Draining, EngineError, InputTooLong, NotReady, TokenOutOfVocabulary
from carpool.engine.model_info import ModelInfo
from carpool.engine.outputs import PoolingResult, Timings
from carpool.engine.params import Matryoshka, PoolingParams, Task, TokenizationParams
from carpool.engine.stats import Observer, Unobserved

VOCAB_SIZE = 1000
WIDTH = 8
CLS, SEP = 101, 102

FAKE_MODEL = ModelInfo(
    root="/models/fake",
    architectures=("FakeModel",),
    tasks=frozenset({"embed"}),
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


class FakeEngine:
    """Tokens are a text's characters; a vector's numbers follow from the prompt's ids."""

    def __init__(self, model: ModelInfo = FAKE_MODEL, state: str = "ready") -> None:
        self.state = state
        self.waiting_tokens = 0
        self.waiting_sequences = 0
        self.observer: Observer = Unobserved()
        self.error: BaseException | None = None  # raised by pool()
        self.gate = asyncio.Event()  # pool() answers once it is open
        self.gate.set()
        self.loaded = asyncio.Event()  # start() returns once it is set
        self.loaded.set()
        self.dead = asyncio.Event()
        self.calls: list[dict[str, object]] = []
        self.cancelled = 0
        self._model = model

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

    async def detokenize(self, token_ids: list[int]) -> str:
        return "".join(chr(token) for token in token_ids if token < VOCAB_SIZE)

    async def pool(
        self,
        prompts: list[str] | list[list[int]],
        params: PoolingParams,
        tokenization: TokenizationParams,
        *,
        task: Task = "embed",
        client: str = "",
        priority: int = 0,
        timeout: float | None = None,
    ) -> PoolingResult:
        if self.state == "draining":
            raise Draining("The engine is shutting down.")
        self.calls.append(
            {
                "prompts": prompts,
                "params": params,
                "tokenization": tokenization,
                "client": client,
                "priority": priority,
                "timeout": timeout,
            }
        )
        if self.error:
            raise self.error
        token_ids = [self._check(prompt, tokenization) for prompt in prompts]
        await self._wait(token_ids)
        rows = [self._vector(ids, params.dimensions or WIDTH) for ids in token_ids]
        return PoolingResult(rows, token_ids, Timings(0.001, 0.002, 0.003))

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

    def _check(self, prompt: str | list[int], tokenization: TokenizationParams) -> list[int]:
        ids = self._ids(prompt, tokenization.add_special_tokens) if isinstance(prompt, str) else prompt
        for token in ids:
            if not 0 <= token < VOCAB_SIZE:
                raise TokenOutOfVocabulary(f"Token id {token} is out of vocabulary.", "input")
        limit = self._model.max_model_len
        if tokenization.truncate_prompt_tokens is not None:
            limit = tokenization.truncate_prompt_tokens % (limit + 1)
            ids = ids[:limit]
        if len(ids) > limit:
            raise InputTooLong(f"{len(ids)} tokens, but the model takes {limit}.", "input")
        return ids

    def _ids(self, text: str, special: bool) -> list[int]:
        ids = [ord(character) % VOCAB_SIZE for character in text]
        return [CLS, *ids, SEP] if special else ids

    def _vector(self, ids: list[int], width: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        generator = np.random.default_rng(ids)
        return generator.standard_normal(WIDTH, dtype=np.float32)[:width]


def engine_errors() -> list[type[EngineError]]:
    """Every leaf of the engine's family."""
    pending, leaves = [EngineError], []
    while pending:
        cls = pending.pop()
        children = cls.__subclasses__()
        pending += children
        leaves += [] if children else [cls]
    return leaves
