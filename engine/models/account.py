"""Account: what became of a checkpoint's weights when a class was made with them, and whether that will do.

Weights that are missing, of another shape, or left over inside a layer give plausible wrong numbers: all are fatal.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from carpool.engine.errors import ConfigError

_POOLER = re.compile(r"(^|\.)pooler\.")
# What older checkpoints store and classes compute: places, angles, masks (GPT's are called bias).
_COMPUTED = re.compile(
    r"(^|\.)(position_ids|token_type_ids|(original_)?inv_freq|(cos|sin)_cached|causal_mask|masked_bias"
    r"|attn(\.attention)?\.bias|version)$"
)


@dataclass(frozen=True, slots=True)
class Account:
    """Names of weights, sorted: `missing` ones, without which the class would compute something else; `misfits`, with
    the shape that is stored and the one that was expected; `unplaced` ones, for which the layers have no place.
    """

    class_name: str
    missing: tuple[str, ...]
    misfits: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    unplaced: tuple[str, ...]

    @classmethod
    def of(cls, model: PreTrainedModel, info: Mapping[str, Any], *, reads_pooler: bool) -> Account:
        """`info` is transformers' own; `reads_pooler`: what the model's own pooler (BERT's) makes is used."""
        missing = (name for name in info["missing_keys"] if reads_pooler or not _POOLER.search(name))
        misfits = ((name, tuple(held), tuple(wanted)) for name, held, wanted in info["mismatched_keys"])
        unplaced = (name for name in info["unexpected_keys"] if _within_a_layer(model, name))
        return cls(
            type(model).__name__,
            tuple(sorted(name for name in missing if not name.endswith("position_ids"))),
            tuple(sorted(misfits)),
            tuple(sorted(unplaced)),
        )

    def check(self, why: str = "") -> None:
        """Raise ConfigError for weights that do not fit. `why` ends the sentence where the reason is known."""
        if self.misfits:
            name, held, wanted = self.misfits[0]
            raise ConfigError(
                f"{len(self.misfits)} of the checkpoint's weights do not fit {self.class_name} as config.json and "
                f"overrides describe it: {name} is of shape {held} and would have to be of {wanted}."
            )
        if self.missing:
            raise ConfigError(
                f"The checkpoint lacks {len(self.missing)} of the weights that {self.class_name} needs "
                f"({_some(self.missing)}){why or ': it is damaged, or made for another class.'}"
            )
        if self.unplaced:
            raise ConfigError(
                f"The checkpoint holds {len(self.unplaced)} weight{'s' * (len(self.unplaced) > 1)} that the layers of "
                f"{self.class_name}, as config.json and overrides describe it, have no place for "
                f"({_some(self.unplaced)}){why or ': without them it would compute something else.'}"
            )


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _within_a_layer(model: PreTrainedModel, name: str) -> bool:
    """Whether the weight `name`, for which `model` has no place, belongs to a layer of its backbone that runs.

    Beside the layers there may be anything (heads, another tower), and behind the last one, too: config.json says how
    many are meant.
    """
    inner = _innermost(model.base_model, name.removeprefix(f"{model.base_model_prefix}."))
    return not (_COMPUTED.search(name) or isinstance(inner, (PreTrainedModel, nn.ModuleList)))


def _innermost(module: nn.Module, path: str) -> nn.Module:
    """The module that lies furthest along the path."""
    for step in path.split("."):
        child = module._modules.get(step)
        if child is None:
            break
        module = child
    return module
