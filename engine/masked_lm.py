"""MaskedLM: what a bare masked language model is for, of which its files say nothing. Pure.

Published SPLADEs are of the same class as the models they were made of. With sentence-transformers' files beside them
they are told by those; without, by their name, as rerankers are. For all others both ways are named.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from carpool.engine.architecture import Kind
from carpool.engine.checkpoint import Checkpoint
from carpool.engine.config import EngineConfig
from carpool.engine.pairing import names_of

_CLASS = re.compile(r"ForMaskedLM$")
_SPLADE = re.compile(r"splade", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class MaskedLM:
    """`kind` is what the files should have said, None to leave it to the class; `notice` is for the user."""

    kind: Kind | None = None
    notice: str | None = None

    @classmethod
    def of(cls, config: EngineConfig, checkpoint: Checkpoint) -> MaskedLM:
        """Neither, for models that are none, and for those whose files or whose user say what to make of them."""
        name = next(filter(_CLASS.search, checkpoint.architectures), None)
        told = checkpoint.files or checkpoint.pooling or config.convert != "auto"
        if name is None or told:
            return cls()
        if any(map(_SPLADE.search, names_of(config, checkpoint))):
            return cls(
                "sparse",
                "Taken for a SPLADE by its name and class: a text's vector is its weights of the vocabulary. --convert "
                "embed makes an embedding model of it.",
            )
        sparse = _CLASS.sub("SpladeSparseEmbeddingModel", name)
        return cls(
            None,
            f"{name} says nothing of what it is for and is served as an embedding model, by its hidden states: confirm "
            "that with --convert embed, or, if it is a SPLADE, say so with --hf-overrides "
            f"""'{{"architectures": ["{sparse}"]}}'.""",
        )
