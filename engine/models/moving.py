"""Moving: a deep copy whose tensors are on another device, whatever holds them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class moving_to(TorchFunctionMode):
    """Within this block `copy.deepcopy` makes its copies of tensors on `device`, none on the way there.

    `Module.to` would find only what is registered with a module, and copy.deepcopy first would need twice the room.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is Tensor.__deepcopy__:
            tensor, memo = args
            if id(tensor) not in memo:
                memo[id(tensor)] = tensor.detach().to(self._device, copy=True)
            return memo[id(tensor)]
        if func is Tensor.clone:  # by which a parameter copies itself
            return args[0].to(self._device, copy=True)
        return func(*args, **(kwargs or {}))
