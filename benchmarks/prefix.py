"""What the cache of keys and values is good for: prompts that begin alike, and short ones beside a long one.

    ./dev bench prefix
    ./dev bench prefix --layers 4 --rounds 1          # a look whether it works

Both parts run a causal model of Qwen3's shape with random weights, in bfloat16 where the CPU has it. First, one query
with a hundred documents, which a reranker asks as a hundred prompts with one beginning: with and without looking for
it, in turns, for beginnings of several lengths; every round's are new, so nothing is found but what the round itself
computes. Then the latency of short prompts: alone, and while a long prompt is run, in chunks and whole.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from statistics import median

# ./dev sets PYTHONSAFEPATH, which leaves a script's own folder out.
sys.path.extend(str(Path(__file__).resolve().parent.parent / room) for room in ("benchmarks", "loadtest"))

import torch
from transformers import Qwen3Config, Qwen3Model

from carpool.engine.async_engine import AsyncEngine
from carpool.engine.config import EngineConfig
from carpool.engine.hub import locate
from carpool.engine.llm import LLM
from carpool.engine.params import PoolingParams, TokenizationParams
from report import Spread, circumstances, facts, table

DOCUMENTS, OWN_TOKENS = 100, 50
BEGINNINGS = (0, 100, 200, 300, 600, 1200)
LONG, SHORT = 8192, 32
ALONE, BETWEEN_S = 20, 0.05
WORDS = range(1000, 30_000)  # ids of the tokenizer that is lent to the model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    print(facts(circumstances()), end="\n\n")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write(folder, args.layers, args.hidden)
        header = ("beginning, tokens", "shared, s", "not shared, s", "times as fast")
        print(table(header, _shared(folder, args.dtype, args.rounds)), end="\n\n")
        header = (f"{SHORT} tokens beside {LONG}", "p50, ms", "p95, ms", "long prompt, s")
        print(table(header, asyncio.run(_beside(folder, args.dtype))))


def _write(folder: Path, layers: int, hidden: int) -> None:
    """A checkpoint of Qwen3-Embedding's kind: last token, normalised."""
    heads = hidden // 64
    config = Qwen3Config(
        vocab_size=30_522,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=128,
        max_position_embeddings=LONG,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(1)
    Qwen3Model(config).to(torch.bfloat16).save_pretrained(folder)
    lent = Path(locate(""))
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        if (lent / name).exists():
            shutil.copy(lent / name, folder)


# ── one beginning, many prompts ──────────────────────────────────────────────────────────────────────────────────


def _shared(folder: Path, dtype: str, rounds: int) -> Iterator[tuple[str, ...]]:
    with (
        closing(LLM(str(folder), dtype=dtype)) as sharing,
        closing(LLM(str(folder), dtype=dtype, enable_prefix_caching=False)) as plain,
    ):
        _seconds(sharing, 100)
        _seconds(plain, 100)
        for length in BEGINNINGS:
            pairs = [(_seconds(sharing, length), _seconds(plain, length)) for _ in range(rounds)]
            shared, alone = (Spread.of(times) for times in zip(*pairs, strict=True))
            ratio = median(other / own for own, other in pairs)
            yield str(length), shared.text(2), alone.text(2), f"{ratio:.2f}"


def _seconds(llm: LLM, length: int) -> float:
    """For a hundred prompts with one new beginning of that length."""
    beginning = random.choices(WORDS, k=length)
    prompts = [beginning + random.choices(WORDS, k=OWN_TOKENS) for _ in range(DOCUMENTS)]
    start = time.perf_counter()
    llm.embed(prompts, use_tqdm=False)
    return time.perf_counter() - start


# ── short prompts beside a long one ──────────────────────────────────────────────────────────────────────────────


async def _beside(folder: Path, dtype: str) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for name, chunks in (("in chunks", True), ("whole", False)):
        engine = AsyncEngine(EngineConfig(model=str(folder), dtype=dtype, enable_chunked_prefill=chunks))  # type: ignore[arg-type]
        await engine.start()
        alone = []
        for _ in range(ALONE):
            alone.append(await _latency(engine))
            await asyncio.sleep(BETWEEN_S)
        if not rows:
            rows.append(("alone", _ms(alone, 0.5), _ms(alone, 0.95), ""))
        start = time.perf_counter()
        long = asyncio.ensure_future(_ask(engine, LONG - 1))
        beside: list[asyncio.Task[float]] = []
        while not long.done():
            beside.append(asyncio.ensure_future(_latency(engine)))
            await asyncio.sleep(BETWEEN_S)
        took = time.perf_counter() - start
        latencies = await asyncio.gather(*beside)
        rows.append((f"beside one {name}", _ms(latencies, 0.5), _ms(latencies, 0.95), f"{took:.1f}"))
        await engine.stop(30)
    return rows


async def _ask(engine: AsyncEngine, length: int) -> None:
    await engine.pool([random.choices(WORDS, k=length)], PoolingParams(), TokenizationParams())


async def _latency(engine: AsyncEngine) -> float:
    start = time.perf_counter()
    await _ask(engine, SHORT)
    return time.perf_counter() - start


def _ms(seconds: Sequence[float], share: float) -> str:
    return f"{1e3 * sorted(seconds)[min(len(seconds) - 1, int(share * len(seconds)))]:.0f}"


if __name__ == "__main__":
    main()
