"""Weights of checkpoints in a dialect, under the names that the class they are loaded into has for them.

A row is here only where transformers' own conversion does not do it already.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor
from transformers import PreTrainedConfig

Weights = dict[str, Tensor]
Rename = Callable[[Weights, PreTrainedConfig], Weights]

RENAMES: Mapping[str, Rename] = {}
