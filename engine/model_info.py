"""ModelInfo: what is known of the loaded model, for those who answer questions about it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from carpool.engine.late_interaction import Role
from carpool.engine.params import Matryoshka, Task, TaskAdapter

PairShape = Literal["separated", "concatenated", "listwise"]
ScoreType = Literal["cross-encoder", "bi-encoder", "late-interaction", "listwise"]
Similarity = Literal["cosine", "dot", "maxsim", "meanmaxsim"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """Facts resolved at load; while the engine lives only adapters come and go, and then there is another of these."""

    root: str  # the folder or name it was loaded from
    architectures: tuple[str, ...]
    tasks: frozenset[Task]
    default_task: Task = "embed"
    max_model_len: int
    max_embed_len: int | None = -1  # longest text to embed: None is unbounded, -1 the same as max_model_len
    vocab_size: int
    embedding_size: int  # width after projection heads
    default_dimensions: int | None = None  # what embeddings are cut to where a request does not say
    linear_head: bool = True  # a mean of vectors is the vector of the mean: no head bends them
    matryoshka: Matryoshka
    labels: tuple[str | None, ...] = ()  # one a class of a classifier
    prompts: Mapping[str, str] = field(default_factory=dict)  # input_type → instruction to put before a text
    adapters: Mapping[str, int] = field(default_factory=dict)  # name → slot, from 1; none is given twice
    lora_modules: Mapping[str, str] = field(default_factory=dict)  # the user's: name → path
    task_adapters: Mapping[str, TaskAdapter] = field(default_factory=dict)  # the checkpoint's own, by task
    default_adapter: str | None = None  # rides where a request names none
    pooling: str
    normalize: bool
    leaves_out_prompts: bool = False  # of pooling
    similarity: Similarity = "cosine"  # how two results of one model are compared
    # Of a late interaction that writes queries and documents each in its way: ids whose vectors take no part in scores.
    roles: Mapping[Role, frozenset[int]] = field(default_factory=dict)
    # How a scored pair is tokenised; listwise: with all others of its query.
    pairs: PairShape = "separated"
    chat_template: bool = False  # chats can be rendered
    score_template: bool = False  # scored pairs are put into a prompt
    dtype: str
    device: str
    workers: int
    # Those that each is bound to while all have work; none: they float.
    worker_cpus: tuple[tuple[int, ...], ...] = ()
    parameters: int
    max_num_batched_tokens: int
    batch_tokens: int | None = None  # batches are filled up to so many, where that is less
    max_num_seqs: int
    packing: Literal["packed", "padded"] = "packed"  # padded: a model that cannot be packed, slower
    attention: str  # which implementation runs
    by_length: bool = True  # a batch of similar lengths is cheaper
    prefix_caching: bool = False  # what prompts begin with is not run again for those that begin alike
    chunked_prefill: bool = False  # long prompts are run in parts
    kv_cache_tokens: int = 0  # keys and values of so many are kept
    kv_cache_bytes: int = 0  # and take so much memory, on a CPU as they come to be used
    chunk_tokens: int | None = None  # longer prompts are run in chunks of so many
    quantization: str | None = None  # what linear layers compute in, where that is not the dtype
    surgery: Mapping[str, int] = field(
        default_factory=dict
    )  # kind of fused module → how many were swapped in
    notices: tuple[str, ...] = ()  # fallbacks taken, one sentence each

    @property
    def default_width(self) -> int:
        """Components of an embedding whose request names no width."""
        return self.default_dimensions or self.embedding_size

    @property
    def longest_embedded(self) -> int | None:
        """How many tokens a text to embed may have; None is any number."""
        return self.max_model_len if self.max_embed_len == -1 else self.max_embed_len

    @property
    def score_type(self) -> ScoreType | None:
        """How the model scores a pair of texts, if it can."""
        if self.pairs == "listwise":
            return "listwise"
        if "classify" in self.tasks:
            return "cross-encoder" if len(self.labels) == 1 else None
        if self.default_task == "token_embed":
            return "late-interaction"
        return "bi-encoder" if "embed" in self.tasks else None
