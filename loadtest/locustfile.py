"""Load for POST /v1/embeddings, over HTTP and nothing else. It knows no more of the server than a client does.

    ./dev load                                        # all kinds of users against http://127.0.0.1:8000
    ./dev load --users 8 --run-time 30s ShortTexts    # one kind
    ./dev load --tags single                          # one text a request; `batched`: several

Users are named after their texts (ShortTexts, LongTexts, MixedTexts) and ask again the moment they are answered.
From the environment:

    LOAD_MODEL          name of the model; by default none, which means the one that is served
    LOAD_API_KEY        sent as a Bearer token
    LOAD_ENCODING       base64 (the default) or float
    LOAD_BATCH          texts in a batched request (16)
    LOAD_LENGTH_FACTOR  makes all texts so many times as long (1)
    LOAD_LENGTH_SIGMA   spread of the lengths instead of each kind's own: standard deviation of their logarithm
"""

import json
import os
from dataclasses import replace
from functools import cache
from itertools import count
from typing import Any

from locust import FastHttpUser, constant, tag, task

from corpus import LONG, MIXED, SHORT, Spread, passages

MODEL = os.environ.get("LOAD_MODEL")
API_KEY = os.environ.get("LOAD_API_KEY")
ENCODING = os.environ.get("LOAD_ENCODING", "base64")
BATCH = int(os.environ.get("LOAD_BATCH", "16"))
LENGTH_FACTOR = float(os.environ.get("LOAD_LENGTH_FACTOR", "1"))
LENGTH_SIGMA = os.environ.get("LOAD_LENGTH_SIGMA")

BODIES = 128  # different requests of a kind; then they come round again
HEADERS = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {API_KEY}"} if API_KEY else {})


def body(texts: list[str]) -> str:
    """One request; a text that is longer than the model takes is cut by the server."""
    fields: dict[str, Any] = {
        "input": texts[0] if len(texts) == 1 else texts,
        "encoding_format": ENCODING,
        "truncate_prompt_tokens": -1,
    }
    return json.dumps(fields | ({"model": MODEL} if MODEL else {}))


@cache
def bodies(spread: Spread, batch: int) -> list[str]:
    """Requests of `batch` texts, made once and shared by all users."""
    texts = passages(BODIES * batch, wished(spread))
    return [body(texts[start : start + batch]) for start in range(0, len(texts), batch)]


def wished(spread: Spread) -> Spread:
    """The spread as the environment wants it."""
    sigma = spread.sigma if LENGTH_SIGMA is None else float(LENGTH_SIGMA)
    return replace(
        spread,
        median=spread.median * LENGTH_FACTOR,
        sigma=sigma,
        least=max(1, round(spread.least * LENGTH_FACTOR)),
        most=round(spread.most * LENGTH_FACTOR),
    )


class Embedder(FastHttpUser):
    """A client that wants vectors. Its kinds differ in how long their texts are."""

    abstract = True
    wait_time = constant(0)
    spread: Spread
    texts: str  # how they are called in the table
    _turns = count()  # shared, so that users ask for different things

    @tag("single")
    @task(4)
    def one_text(self) -> None:
        self.embed(1)

    @tag("batched")
    @task(1)
    def many_texts(self) -> None:
        self.embed(BATCH)

    def embed(self, batch: int) -> None:
        """Ask once; failed unless the answer is a 200 with a vector a text."""
        choice = bodies(self.spread, batch)
        data = choice[next(self._turns) % len(choice)]
        name = f"{self.texts} × {batch}"
        with self.client.post(
            "/v1/embeddings", data=data, headers=HEADERS, name=name, catch_response=True
        ) as response:
            found = (response.content or b"").count(b'"embedding":')
            if not response.status_code:
                response.failure(f"no answer: {response.error!r}")
            elif response.status_code != 200:
                response.failure(f"status {response.status_code}")
            elif found != batch:
                response.failure(f"{found} vectors for {batch} texts")


class ShortTexts(Embedder):
    """Queries and titles."""

    spread, texts = SHORT, "short"


class LongTexts(Embedder):
    """Pages."""

    spread, texts = LONG, "long"


class MixedTexts(Embedder):
    """Passages of all lengths."""

    spread, texts = MIXED, "mixed"
