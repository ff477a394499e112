"""ModelInfo: what is known of the loaded model, for those who answer questions about it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from carpool.engine.params import Matryoshka, Task

ScoreType = Literal["cross-encoder", "bi-encoder", "late-interaction"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """Facts resolved at load; nothing here changes while the engine lives."""

    root: str  # the folder or name it was loaded from
    architectures: tuple[str, ...]
    tasks: frozenset[Task]
    default_task: Task = "embed"
    max_model_len: int
    max_embed_len: int | None = -1  # longest text to embed: None is unbounded, -1 the same as max_model_len
    vocab_size: int
    embedding_size: int  # width after projection heads
    matryoshka: Matryoshka
    labels: tuple[str | None, ...] = ()  # one a class of a classifier
    prompts: Mapping[str, str] = field(default_factory=dict)  # input_type → instruction to put before a text
    pooling: str
    normalize: bool
    pairs: Literal["separated", "concatenated"] = "separated"  # how a scored pair is tokenised
    chat_template: bool = False  # chats can be rendered
    score_template: bool = False  # scored pairs are rendered by the user's template
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

    @property
    def score_type(self) -> ScoreType | None:
        """How the model scores a pair of texts, if it can."""
        if "classify" in self.tasks:
            return "cross-encoder" if len(self.labels) == 1 else None
        if self.default_task == "token_embed":
            return "late-interaction"
        return "bi-encoder" if "embed" in self.tasks else None
