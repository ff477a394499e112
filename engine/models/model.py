"""Model: a checkpoint loaded, adapted, checked and made faster, in this order. What the runners run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

from carpool.engine.architecture import Architecture, Scorer
from carpool.engine.checkpoint import BGE_M3_HEADS, Checkpoint
from carpool.engine.config import EngineConfig
from carpool.engine.models.adapters import Adapters, check_adapters, load_adapters, make_room
from carpool.engine.models.backbone import Backbone
from carpool.engine.models.choice import choose
from carpool.engine.models.loader import Loaded, Loader
from carpool.engine.models.quantize import quantize
from carpool.engine.models.surgery import operate
from carpool.engine.models.weights import stored, unmap
from carpool.engine.side_files import Dense

# As classifiers, reward models and ColBERTs name theirs.
_HEAD = re.compile(
    r"(classifier|pre_classifier|score|v_head|value_head|reward_head|regression_head|linear)\."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """`parameters` are counted before weights are packed; `surgery` counts what was swapped, by kind."""

    loaded: Loaded
    adapters: Adapters
    parameters: int
    surgery: Mapping[str, int]
    notices: tuple[str, ...]

    @property
    def backbone(self) -> Backbone:
        return self.loaded.backbone

    @classmethod
    def load(
        cls,
        loader: Loader,
        checkpoint: Checkpoint,
        architecture: Architecture,
        config: EngineConfig,
        scorer: Scorer | None,
        token_ids: Seq[int],
    ) -> Model:
        """`token_ids`: whose rows of a language model's head make the `scorer`, or a judge's logits.

        Raises ConfigError with one sentence if it cannot be served as asked.
        """
        loaded = loader.load(checkpoint, architecture, scorer, token_ids)
        adapters = load_adapters(checkpoint, config, loaded)
        backbone, padded = choose(
            loaded.backbone,
            vocab_size=checkpoint.vocab_size,
            max_model_len=loader.max_model_len,
            limits=checkpoint.windows,
        )
        if config.allow_runtime_lora_updating:
            make_room(backbone, vocab_size=checkpoint.vocab_size)
        parameters = sum(weight.numel() for weight in backbone.module.parameters())
        swapped: dict[str, int] = {}
        coarse: list[str] = []
        if config.surgery:
            swapped = operate(backbone, vocab_size=checkpoint.vocab_size, pack=not config.quantization)
        if config.quantization:
            swapped["int8"], coarse = quantize(backbone, vocab_size=checkpoint.vocab_size)
        if loader.device.type == "cpu" and swapped:
            unmap(backbone.module, loaded.head)
        if adapters.slots:
            check_adapters(
                backbone,
                list(adapters.slots.values()),
                vocab_size=checkpoint.vocab_size,
                max_model_len=loader.max_model_len,
            )
        foreign = None if loader.trust_remote_code else _foreign_code(checkpoint, backbone)
        headless = _unread_head(checkpoint, architecture) if config.convert == "auto" else None
        return cls(
            loaded=replace(loaded, backbone=backbone),
            adapters=adapters,
            parameters=parameters,
            surgery=swapped,
            notices=tuple(sentence for sentence in (padded, *coarse, foreign, headless) if sentence),
        )


def _unread_head(checkpoint: Checkpoint, architecture: Architecture) -> str | None:
    """An embedding model reads no head. Where there is one, config.json may have lost the class that does."""
    if architecture.kind != "embed":
        return None
    read = tuple(layer.prefix for layer in checkpoint.dense if isinstance(layer, Dense) and layer.prefix)
    unread = sorted(name for name in stored(checkpoint.path, _HEAD) if not name.startswith(read))
    unread += [name for name in BGE_M3_HEADS if (checkpoint.path / name).is_file()]  # one without the other
    if not unread:
        return None
    return (
        f"The checkpoint brings a head ({', '.join(unread[:2])}{', …' if len(unread) > 2 else ''}) that an embedding "
        "model does not read, and is served as one, without it. If it is something else, name its class with "
        """--hf-overrides '{"architectures": ["…"]}'; if it is not, confirm that with --convert embed."""
    )


def _foreign_code(checkpoint: Checkpoint, backbone: Backbone) -> str | None:
    """Every weight has found its place, but what the checkpoint's own code would do with them nobody has read."""
    if checkpoint.own_code is None:
        return None
    return (
        f"The checkpoint was published with code of its own ({checkpoint.own_code}), which is not run: "
        f"transformers' {type(backbone.module).__name__} computes in its place."
    )
