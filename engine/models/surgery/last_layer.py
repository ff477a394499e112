"""The last layer for the rows that are read alone: behind its attention no token looks at another any more.

Where all that pools read are first and last tokens, what follows the last attention is computed for those. Modules stay
what they are: a hook in front of each takes the rows out, one behind it lays its output into a whole row again, whose
other rows are NaN. A pool that read one of those after all would give no result, rather than a wrong one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from carpool.engine.models.attention import row_or_none, witnessed
from carpool.engine.models.backbone import Backbone
from carpool.engine.models.surgery.agreement import holds
from carpool.engine.models.surgery.rehearsal import small_batch
from carpool.engine.packing import PackedBatch


def narrow(backbone: Backbone, *, vocab_size: int) -> int:
    """Have what follows the last attention heed `PackedBatch.wanted`, in place; returns how many modules do.

    None do if first and last tokens would not come out as before. To be done last: what hooks are on stays.
    """
    if backbone.packing == "padded":
        return 0
    batch = small_batch(vocab_size, next(backbone.module.parameters()).device)
    ends = [place for start, end in pairwise(batch.bounds) for place in (start, end - 1)]
    wanted = torch.tensor(ends, device=batch.input_ids.device)
    with torch.inference_mode(False), torch.no_grad():
        modules, whole = _behind_attention(backbone, batch)
        hooks = [hook for module in modules for hook in _narrowed(module)]
        narrowed = replace(batch, wanted=wanted)
        if holds(lambda: backbone.forward(narrowed)[wanted], whole[wanted]):
            return len(modules)
    for hook in hooks:
        hook.remove()
    return 0


def narrowed(*modules: nn.Module) -> bool:
    """Whether each of these heeds it."""
    return all(_take in module._forward_pre_hooks.values() for module in modules)


def _behind_attention(backbone: Backbone, batch: PackedBatch) -> tuple[list[nn.Module], Tensor]:
    """The largest modules of a layer's size that are called behind the last attention only and make rows of rows;
    and what the backbone makes of the batch, [T, H].
    """
    begun: dict[str, int] = {}  # by path: how many layers had attended at the first call
    row_wise: dict[str, bool] = {}

    def begin(path: str, _module: nn.Module, _args: object) -> None:
        begun.setdefault(path, len(attended))

    def end(path: str, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        rows = _are_rows((*args, *kwargs.values(), out), batch.num_tokens)
        row_wise[path] = row_wise.get(path, True) and rows

    hooks: list[RemovableHandle] = []
    for path, module in backbone.module.named_modules():
        hooks.append(module.register_forward_pre_hook(partial(begin, path)))
        hooks.append(module.register_forward_hook(partial(end, path), with_kwargs=True))
    try:
        with witnessed() as attended:
            whole = backbone.forward(batch)
    finally:
        for hook in hooks:
            hook.remove()
    found: dict[str, nn.Module] = {}
    for path, module in backbone.module.named_modules():  # what holds others comes before them
        behind = 0 < begun.get(path, 0) == len(attended)
        if behind and row_wise[path] and _multiplies(module) and not _within(path, found):
            found[path] = module
    return list(found.values()), whole


def _are_rows(values: Iterable[Any], tokens: int) -> bool:
    """Whether each is a tensor [1, T, ...] of as many tokens."""
    return all(isinstance(x, Tensor) and x.ndim > 2 and x.shape[:2] == (1, tokens) for x in values)


def _multiplies(module: nn.Module) -> bool:
    """Whether it has a matrix: a norm costs less than taking rows out for it."""
    return any(weight.ndim > 1 for weight in chain(module.parameters(), module.buffers()))


def _within(path: str, others: Iterable[str]) -> bool:
    return any(path.startswith(f"{other}.") for other in others)


def _narrowed(module: nn.Module) -> tuple[RemovableHandle, RemovableHandle]:
    return module.register_forward_pre_hook(_take, with_kwargs=True), module.register_forward_hook(_lay)


def _take(
    _module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]] | None:
    """Of [1, T, ...] each, the rows that are wanted."""
    row = row_or_none()
    if row is None or row.wanted is None:
        return None
    own = {name: x.index_select(1, row.wanted) for name, x in kwargs.items()}
    return tuple(x.index_select(1, row.wanted) for x in args), own


def _lay(_module: nn.Module, _args: object, out: Tensor) -> Tensor | None:
    """[1, R, ...] into [1, T, ...] of NaN."""
    row = row_or_none()
    if row is None or row.wanted is None:
        return None
    whole = out.new_full((1, len(row.positions), *out.shape[2:]), float("nan"))
    return whole.index_copy_(1, row.wanted, out)
