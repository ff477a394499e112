"""carpool: pooling models (embed, rerank, classify) served over HTTP, or called from Python.

    from carpool import LLM

    llm = LLM("path/to/a/model")
    vector = llm.embed(["many texts, one ride"])[0].outputs.embedding

The house, from the door inwards; each room imports only what is below it:

    carpool.server    speaks HTTP, knows no tensors
    carpool.engine    text in, arrays out; knows no HTTP
    carpool.kernels   tensors in, tensors out

The three rooms are top-level folders of the repository. In a checkout this package holds links to them; an
installed carpool holds the files themselves.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__all__ = [
    "LLM",
    "ClassificationOutput",
    "ClassificationRequestOutput",
    "EmbeddingOutput",
    "EmbeddingRequestOutput",
    "LateChunkingParams",
    "LoRARequest",
    "PoolerConfig",
    "PoolingOutput",
    "PoolingParams",
    "PoolingRequestOutput",
    "ScoringOutput",
    "ScoringRequestOutput",
    "__version__",
]

__version__ = "0.1.0"  # the one place: pyproject.toml reads it from here

if TYPE_CHECKING:
    from carpool.engine.answers import (
        ClassificationOutput,
        ClassificationRequestOutput,
        EmbeddingOutput,
        EmbeddingRequestOutput,
        PoolingOutput,
        PoolingRequestOutput,
        ScoringOutput,
        ScoringRequestOutput,
    )
    from carpool.engine.config import PoolerConfig
    from carpool.engine.llm import LLM
    from carpool.engine.params import LateChunkingParams, LoRARequest, PoolingParams
else:
    # LLM brings torch with it, which takes seconds to import. `carpool --help`, the pure engine files and their
    # tests all pass through this package and need none of it, so each name is fetched when it is first used.
    # (Hidden from type checkers: a module __getattr__ would make any misspelt name look right to them.)
    _ANSWERS = (
        "ClassificationOutput",
        "ClassificationRequestOutput",
        "EmbeddingOutput",
        "EmbeddingRequestOutput",
        "PoolingOutput",
        "PoolingRequestOutput",
        "ScoringOutput",
        "ScoringRequestOutput",
    )
    _HOMES = {
        **dict.fromkeys(_ANSWERS, "carpool.engine.answers"),
        "LLM": "carpool.engine.llm",
        "LateChunkingParams": "carpool.engine.params",
        "LoRARequest": "carpool.engine.params",
        "PoolerConfig": "carpool.engine.config",
        "PoolingParams": "carpool.engine.params",
    }

    def __getattr__(name):
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(_HOMES[name]), name)
        return value

    def __dir__():
        return sorted({*globals(), *__all__})
