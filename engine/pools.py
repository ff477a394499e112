"""Pools: a loaded checkpoint's answer to every task that it can do. Runs once, before anything serves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from carpool.engine.architecture import Architecture, activation_of
from carpool.engine.checkpoint import Checkpoint
from carpool.engine.config import EngineConfig
from carpool.engine.errors import ConfigError, InvalidParameter
from carpool.engine.hub import BUNDLED_NAME
from carpool.engine.model_info import Similarity
from carpool.engine.models.loader import Loaded
from carpool.engine.params import Task
from carpool.engine.poolers.bge_m3 import Marks, UnmarkedPool, load_linear
from carpool.engine.poolers.classify import (
    Activate,
    ClassifyHead,
    ClassifyPool,
    TokenClassifyPool,
    activation_named,
)
from carpool.engine.poolers.dense import activation, load_layer
from carpool.engine.poolers.embed import EmbedHead, EmbedPool, TokenEmbedPool
from carpool.engine.poolers.marked import MarkedPool
from carpool.engine.poolers.pooler import Pool
from carpool.engine.poolers.sparse import LexicalPool, NonZeroPool
from carpool.engine.poolers.splade import SpladePool
from carpool.engine.poolers.tanh_int8 import TanhInt8
from carpool.engine.side_files import Dense, PoolingMode

STEP_TAG = "<extra_0>"  # which the one published family of process reward models ends its steps with


def make_pools(
    checkpoint: Checkpoint,
    config: EngineConfig,
    architecture: Architecture,
    loaded: Loaded,
    modes: tuple[PoolingMode, ...],
    width: int,
    marks: Marks,
    device: torch.device,
) -> dict[Task, Pool]:
    """The first task is what the model does when it is not told. `width` is what the head gives."""
    match architecture.kind:
        case "embed":
            return _embed_pools(checkpoint, config, modes, device)
        case "bge_m3":
            own = _bge_m3_pools(checkpoint, loaded.backbone.hidden_size, marks, device)
            return {**_embed_pools(checkpoint, config, modes, device), **own}
        case "multi_vector":
            dense = [loaded.head] if loaded.head else [load_layer(spec, device) for spec in checkpoint.dense]
            return {
                "token_embed": TokenEmbedPool(
                    EmbedHead(dense, checkpoint.normalize, _cut(checkpoint, config))
                )
            }
        case "sparse":
            assert loaded.head is not None, "a masked language model is loaded with its head"
            _cut(checkpoint, config)
            if config.pooler_config.enable_chunked_processing:
                raise ConfigError(
                    "Chunked processing averages vectors, and this model's weights of a vocabulary are no average."
                )
            vectors = SpladePool(loaded.head, width, checkpoint.splade)
            return {"embed": vectors, "sparse_embed": NonZeroPool(vectors)}
        case "listwise":
            assert loaded.head is not None, "a listwise reranker is loaded with its projector"
            # Not normalised: the vectors of several prompts are averaged as they are.
            return {"token_embed": MarkedPool(EmbedHead([loaded.head], False, None), marks.listed)}
    return _classify_pools(checkpoint, config, architecture, loaded, modes[0], width, marks)


def default_task(config: EngineConfig, pools: Mapping[Task, Pool]) -> Task:
    asked = config.pooler_config.task
    if asked is None:
        return next(iter(pools))
    if asked not in pools:
        raise ConfigError(f"Unsupported task: {asked!r}; this model supports {', '.join(pools)}.")
    return asked


def pooling_modes(checkpoint: Checkpoint, loaded: Loaded) -> tuple[PoolingMode, ...]:
    """The user's or the files' pooling, else the class's: the last token if it looks backwards, else the first.

    A classifier that names its own in config.json has it in any case: its head was trained on nothing else.
    """
    if loaded.pooling and "classifier_pooling" in checkpoint.config:
        return (loaded.pooling,)
    return checkpoint.pooling or (loaded.pooling or ("last" if loaded.backbone.is_causal else "cls"),)


def pooling_name(checkpoint: Checkpoint, architecture: Architecture, modes: tuple[PoolingMode, ...]) -> str:
    """How rows become results, for people to read."""
    match architecture.kind:
        case "multi_vector":
            return "all"
        case "sparse":
            return f"{checkpoint.splade.strategy} of logits"
        case "listwise":
            return "marks"
    return "+".join(modes)


def similarity_of(checkpoint: Checkpoint, architecture: Architecture) -> Similarity:
    """How two results are compared. Of models of one vector a text it is the cosine, whatever their files say."""
    mean = checkpoint.late is not None and checkpoint.late.mean
    match architecture.kind:
        case "multi_vector":
            return "meanmaxsim" if mean else "maxsim"
        case "sparse":
            named = checkpoint.similarity or "dot"
            if named not in ("dot", "cosine"):
                raise ConfigError(
                    f"This model compares vectors by {named}; carpool compares them by dot or cosine."
                )
            return "dot" if named == "dot" else "cosine"
    return "cosine"


def has_linear_head(checkpoint: Checkpoint, loaded: Loaded) -> bool:
    """Whether a mean of vectors is the vector of the mean of their rows."""
    straight = loaded.head is None or isinstance(loaded.head, nn.Linear)
    return straight and all(
        isinstance(layer, Dense) and layer.activation.endswith(".Identity") for layer in checkpoint.dense
    )


def default_dimensions(
    checkpoint: Checkpoint, config: EngineConfig, architecture: Architecture
) -> int | None:
    """What embeddings are cut to where a request does not say; None where nothing cuts them."""
    cuts = architecture.kind in ("embed", "bge_m3", "multi_vector")
    return _cut(checkpoint, config) if cuts else None


def head_width(loaded: Loaded) -> int:
    """Found by asking the head; 0 without one."""
    if loaded.head is None:
        return 0
    hidden = loaded.backbone.hidden_size
    weight = next(loaded.head.parameters())
    with torch.inference_mode():
        return int(loaded.head(torch.zeros(1, hidden, device=weight.device)).shape[-1])


def _embed_pools(
    checkpoint: Checkpoint,
    config: EngineConfig,
    modes: tuple[PoolingMode, ...],
    device: torch.device,
) -> dict[Task, Pool]:
    dense = [load_layer(spec, device) for spec in checkpoint.dense]
    head = EmbedHead(dense, checkpoint.normalize, _cut(checkpoint, config))
    whole = EmbedHead([*dense, TanhInt8()], checkpoint.normalize, _cut(checkpoint, config))
    pools: dict[Task, Pool] = {"embed": EmbedPool(modes, whole if checkpoint.tanh_int8 else head)}
    if not checkpoint.dense or len(modes) == 1:
        pools["token_embed"] = TokenEmbedPool(
            head
        )  # a head made for several modes at once takes no single row
    return pools


def _cut(checkpoint: Checkpoint, config: EngineConfig) -> int | None:
    """The width that the user or the files cut every embedding to."""
    asked = config.pooler_config.dimensions
    dimensions = checkpoint.truncate_dim if asked is None else asked
    try:
        checkpoint.matryoshka.check(dimensions, config.model or BUNDLED_NAME)
    except InvalidParameter as error:
        raise ConfigError(f"The pooler config's dimensions cannot be served: {error}") from error
    return dimensions


def _bge_m3_pools(
    checkpoint: Checkpoint, hidden_size: int, marks: Marks, device: torch.device
) -> dict[Task, Pool]:
    """All but the text's own vector."""
    vectors = load_linear(checkpoint.path / "colbert_linear.pt", hidden_size, device)
    weights = load_linear(checkpoint.path / "sparse_linear.pt", hidden_size, device)
    token_embed = TokenEmbedPool(EmbedHead([vectors], True, None))
    token_classify = TokenClassifyPool(ClassifyHead(weights, torch.relu))
    return {
        "token_embed": UnmarkedPool(token_embed, marks.first, None),
        "sparse_embed": LexicalPool(weights, marks.unweighted),
        "token_classify": UnmarkedPool(token_classify, marks.first, marks.last, flat=True),
    }


def _classify_pools(
    checkpoint: Checkpoint,
    config: EngineConfig,
    architecture: Architecture,
    loaded: Loaded,
    mode: PoolingMode,
    num_labels: int,
    marks: Marks,
) -> dict[Task, Pool]:
    pooler, kind = config.pooler_config, architecture.kind
    head = ClassifyHead(
        loaded.head or nn.Identity(),
        _activate(checkpoint, num_labels or loaded.backbone.hidden_size),
        by_default=architecture.activates if pooler.activates is None else pooler.activates,
        logit_mean=pooler.mean,
        logit_sigma=pooler.logit_sigma or 1.0,
    )
    tokens = TokenClassifyPool(head)
    if pooler.steps if pooler.steps is not None else kind == "process_reward":
        columns = None if kind == "judge" else pooler.returned_token_ids
        if columns and not all(0 <= column < num_labels for column in columns):
            raise ConfigError(
                f"returned_token_ids {list(columns)} go beyond this model's {num_labels} labels."
            )
        steps = replace(head, activate=_activate(checkpoint, len(columns))) if columns else head
        tokens = TokenClassifyPool(steps, _step_tag(checkpoint, config, architecture, marks), columns)
    if "classify" not in architecture.tasks:
        return {"token_classify": tokens}
    return {"classify": ClassifyPool(mode, head, loaded.late), "token_classify": tokens}


def _activate(checkpoint: Checkpoint, labels: int) -> Activate:
    """What makes probabilities of so many logits a row: of one alone a softmax would always be 1."""
    named = activation_of(checkpoint.config, labels)
    return activation(named) if "." in named else activation_named(named)


def _step_tag(
    checkpoint: Checkpoint, config: EngineConfig, architecture: Architecture, marks: Marks
) -> int | None:
    """The token whose rows are the results, None for all; one that no text can have would make all of them empty."""
    tag = config.pooler_config.step_tag_id
    if tag is None and architecture.kind == "process_reward":
        tag = marks.step
        if tag is None:
            raise ConfigError(
                f"This process reward model's tokenizer has no {STEP_TAG} to end a step with: name the token that does "
                """with --pooler-config '{"step_tag_id": 12902}', or have every token judged with """
                """'{"tok_pooling_type": "ALL"}'."""
            )
    if tag is not None and not 0 <= tag < checkpoint.vocab_size:
        raise ConfigError(f"step_tag_id {tag} is none of this model's ids, 0 to {checkpoint.vocab_size - 1}.")
    return tag
