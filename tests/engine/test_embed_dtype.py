"""16-bit embeddings through the whole engine: so if they leave as they are, float32 where they are counted on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from carpool import LLM
from carpool.engine.config import PoolerConfig
from carpool.engine.params import EmbedDType, PoolingParams, TokenizationParams

DTYPES: list[tuple[EmbedDType, Any]] = [("float16", np.float16), ("bfloat16", ml_dtypes.bfloat16)]
TEXTS = ["the cat sat on a mat", "rain in spain"]


def made(folder: Path, **options: Any) -> LLM:
    return LLM(str(folder), dtype="float32", cpu_workers=1, **options)


def rows(llm: LLM, texts: list[str], params: PoolingParams) -> list[Any]:
    pool = llm._engine.pool(texts, params, TokenizationParams())
    return llm._loop.run(pool).rows


@pytest.mark.parametrize(("dtype", "kind"), DTYPES)
def test_vectors_come_in_the_numbers_asked_for(
    dtype: EmbedDType, kind: Any, checkpoint: Callable[[str], Path]
) -> None:
    llm = made(checkpoint("bert"))
    exact, half = (rows(llm, TEXTS, PoolingParams(embed_dtype=each)) for each in ("float32", dtype))
    assert all(np.array_equal(b, a.astype(kind)) for a, b in zip(exact, half, strict=True))
    (tensor,) = llm.encode(TEXTS[0], PoolingParams(embed_dtype=dtype), use_tqdm=False)
    assert tensor.outputs.data.dtype == getattr(torch, dtype)
    assert tensor.outputs.data.tolist() == half[0].tolist()
    llm.close()


@pytest.mark.parametrize("dtype", [dtype for dtype, _ in DTYPES])
def test_slices_are_averaged_in_float32(dtype: EmbedDType, checkpoint: Callable[[str], Path]) -> None:
    llm = made(
        checkpoint("bert"), max_model_len=8, pooler_config=PoolerConfig(enable_chunked_processing=True)
    )
    texts = ["the cat sat on a mat " * 4]
    exact, same = (rows(llm, texts, PoolingParams(embed_dtype=each)) for each in ("float32", dtype))
    assert same[0].dtype == np.float32
    assert np.array_equal(exact[0], same[0])
    llm.close()


def test_scores_are_those_of_float32_vectors(checkpoint: Callable[[str], Path]) -> None:
    llm = made(checkpoint("bert"))
    scores = [
        llm.score(*TEXTS, pooling_params=PoolingParams(embed_dtype=dtype), use_tqdm=False)[0].outputs.score
        for dtype in ("float32", "bfloat16")
    ]
    assert scores[0] == scores[1]
    llm.close()
