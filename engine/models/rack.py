"""Rack: where adapters are hung and taken from while the model serves.

What is hung is tried first on a replica that nobody else runs, and then shared by the workers' replicas of one device.
A slot is given once: nothing that was computed on one adapter can be taken for another's that has its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING

import torch
from torch import nn

from carpool.engine.hub import locate
from carpool.engine.models.adapter import read_peft
from carpool.engine.models.adapters import check_adapters, fitted
from carpool.engine.models.lora import Delta, Fitted, adapted_layers
from carpool.engine.models.model import Model
from carpool.engine.params import Task

if TYPE_CHECKING:
    from carpool.engine.poolers.pooler import Pool
    from carpool.engine.runner import ModelRunner


class Rack:
    """One call at a time, in any thread: the workers go on meanwhile."""

    def __init__(
        self,
        model: Model,
        runners: Seq[ModelRunner],
        pools_of: Callable[[nn.Module], Mapping[Task, Pool]],
        *,
        vocab_size: int,
        max_model_len: int,
        download_dir: str | None,
    ) -> None:
        """`pools_of` makes the pools of a head that an adapter brings."""
        self._loaded = model.loaded
        self._trial = model.backbone.replica()
        self._runners = runners
        self._pools_of = pools_of
        self._vocab_size, self._max_model_len = vocab_size, max_model_len
        self._download_dir = download_dir

    def hang(self, slot: int, name: str, path: str) -> None:
        """Read the PEFT folder at `path` and put it on the model as `slot`. Raises ConfigError, naming the reason."""
        adapter = read_peft(name, locate(path, download_dir=self._download_dir, what="adapter"))
        deltas, head = fitted(adapter, self._loaded, late=True)
        places = adapted_layers(self._trial.module)
        try:
            first = self._runners[0].device
            by_device = {first: self._on(first, deltas)}
            for layer, own in by_device[first].items():
                places[layer].add(slot, own)
            check_adapters(
                self._trial, (slot,), vocab_size=self._vocab_size, max_model_len=self._max_model_len
            )
            pools = self._pools_of(head) if head is not None else {}
            for runner in self._runners:
                if runner.device not in by_device:
                    by_device[runner.device] = self._on(runner.device, deltas)
                runner.hang(slot, by_device[runner.device], pools)
        except BaseException:
            self.drop(slot)
            raise

    def drop(self, slot: int) -> None:
        """Let its weights go. Nothing may ride on it any more."""
        for place in adapted_layers(self._trial.module).values():
            place.drop(slot)
        for runner in self._runners:
            runner.drop(slot)

    def _on(self, device: torch.device, deltas: Mapping[str, Delta]) -> Mapping[str, Fitted]:
        places = adapted_layers(self._trial.module)
        return {layer: places[layer].fitted(delta, device) for layer, delta in deltas.items()}
