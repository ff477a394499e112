"""ModelInfo: what is known of the loaded model, for those who answer questions about it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from carpool.engine.params import Matryoshka, Task


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """Facts resolved at load; nothing here changes while the engine lives."""

    root: str  # the folder or name it was loaded from
    architectures: tuple[str, ...]
    tasks: frozenset[Task]
    max_model_len: int
    vocab_size: int
    embedding_size: int  # width after projection heads
    matryoshka: Matryoshka
    pooling: str
    normalize: bool
    dtype: str
    device: str
    workers: int
    parameters: int
    max_num_batched_tokens: int
    max_num_seqs: int
    attention: str  # which implementation runs
    surgery: Mapping[str, int] = field(
        default_factory=dict
    )  # kind of fused module → how many were swapped in
    notices: tuple[str, ...] = ()  # fallbacks taken, one sentence each
