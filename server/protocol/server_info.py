"""What runs here: GET /version, /load and /info."""

from __future__ import annotations

from msgspec import UNSET, Struct, UnsetType


class VersionResponse(Struct, gc=False):
    version: str


class LoadResponse(Struct, gc=False):
    server_load: int  # requests to the model that are under way


class ServerLimits(Struct, kw_only=True, gc=False):
    max_model_len: int
    max_embed_len: int | None  # null: texts of any length are embedded, in slices
    max_num_batched_tokens: int
    batch_tokens: int  # batches are filled up to so many; only a longer prompt goes beyond
    chunk_tokens: int | None  # longer prompts are run in chunks of so many; null: all are run whole
    max_num_seqs: int
    max_body_size: int


class TeiModel(Struct, gc=False):
    """What TEI says of a model: of one that embeds its pooling, of others their classes."""

    pooling: str | UnsetType = UNSET
    id2label: dict[str, str] | UnsetType = UNSET
    label2id: dict[str, int] | UnsetType = UNSET


class InfoResponse(Struct, kw_only=True, gc=False):
    """The facts of the loaded model, and what was done to it."""

    version: str
    model: str
    names: list[str]
    root: str
    architectures: list[str]
    tasks: list[str]
    default_task: str
    score_type: str | None
    pooling: str
    normalize: bool
    embedding_size: int
    matryoshka: bool
    dimensions: list[int]  # those that may be asked for; empty: any, if matryoshka
    labels: list[str | None]
    prompts: dict[str, str]
    lora_modules: dict[str, str]  # adapters that are models by name, and where each lies
    adapter_tasks: list[str]  # what `task` may say: the checkpoint's own adapters
    default_adapter: str | None  # the one that rides where a request names none
    parameters: int
    vocab_size: int
    dtype: str
    device: str
    workers: int
    worker_cpus: list[list[int]]  # the CPUs that each is bound to while all have work; empty: they float
    packing: str  # "packed", or "padded" for a model that cannot be
    attention: str
    prefix_caching: bool  # prompts that begin alike are computed from where they differ
    chunked_prefill: bool
    kv_cache_tokens: int  # so many may be kept; 0: there is no cache
    kv_cache_bytes: int  # memory that they may take
    result_cache_bytes: int  # memory that results may take; 0: none are kept
    quantization: str | None  # "int8", or null
    surgery: dict[str, int]
    notices: list[str]
    limits: ServerLimits
    # The same in TEI's words, for its clients.
    model_id: str
    model_sha: str | None
    model_dtype: str
    model_type: dict[str, TeiModel]  # one entry: embedding, classifier or reranker
    max_input_length: int
    max_batch_tokens: int
    max_batch_requests: int
    max_client_batch_size: int  # as many as one batch holds; more are taken, too
    auto_truncate: bool
