"""Rehearsal: one small batch run through a model before anything is changed, and what every module was given in it.

Swaps are found and checked by it: layers that read one input are seen to do so, and a module in which something was
swapped is run again on the very inputs that it had. Modules are known by their paths, so that those that were
replaced are not kept alive here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from carpool.engine.models.surgery.agreement import agree
from carpool.engine.packing import PackedBatch, pack_ids

Likeness = Callable[[Tensor, Tensor], bool]  # of what a module says now to what it said before


def submodule(model: nn.Module, path: str) -> nn.Module | None:
    """The module at this path; None if it went with what was replaced."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def weights_of(*modules: nn.Module) -> set[int]:
    """All that they compute with, by identity: what has the same set holds nothing else."""
    return {id(weight) for module in modules for weight in (*module.parameters(), *module.buffers())}


def small_batch(vocab_size: int, device: torch.device) -> PackedBatch:
    """Two random sequences of unequal lengths."""
    generator = torch.Generator().manual_seed(3)
    low = min(5, vocab_size - 1)
    return pack_ids(
        [torch.randint(low, vocab_size, (n,), generator=generator).tolist() for n in (3, 5)], device
    )


def sample(linear: nn.Linear) -> Tensor:
    """Random input [1, 5, in] for a layer, in its dtype."""
    x = torch.randn(1, 5, linear.in_features, generator=torch.Generator().manual_seed(1))
    return x.to(linear.weight)


@dataclass(frozen=True, slots=True)
class Given:
    """What a module was called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(slots=True)
class Rehearsal:
    """`given` by path, the last call's; `heard` are the linear layers' paths in the order of their calls.

    `heard` has the inputs, too, so that none is freed and another one taken for it.
    """

    scene: Callable[[], AbstractContextManager[Any]]  # what a module needs around it to run on its own
    given: dict[str, Given] = field(default_factory=dict)
    heard: list[tuple[str, Any]] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        forward: Callable[[], object],
        scene: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> Rehearsal:
        """Watch `forward`, which runs the model once."""
        seen = cls(scene)
        hooks = [
            module.register_forward_pre_hook(partial(seen._note, path), with_kwargs=True)
            for path, module in model.named_modules()
        ]
        try:
            forward()
        finally:
            for hook in hooks:
                hook.remove()
        return seen

    def _note(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.given[path] = Given(args, kwargs)
        if type(module) is nn.Linear:
            self.heard.append((path, args[0] if args else kwargs["input"]))

    def play(self, path: str, module: nn.Module) -> Tensor:
        """What the module makes of what was given at this path: the first tensor of its answer."""
        given = self.given[path]
        # Copies, for a module may write into what it gets.
        args, kwargs = tree_map_only(Tensor, torch.clone, (given.args, given.kwargs))
        with self.scene():
            out = module(*args, **kwargs)
        while not isinstance(out, Tensor):
            out = out[0]
        return out

    def holds(
        self,
        path: str,
        module: nn.Module,
        change: Callable[[], None],
        undo: Callable[[], None],
        likeness: Likeness = agree,
    ) -> bool:
        """Change something inside of the module at this path; undone again unless it still says the like."""
        if path not in self.given:
            return False
        try:
            before = self.play(path, module)
            change()
            if likeness(self.play(path, module), before):
                return True
        except Exception:  # a module that is not what it looked like
            pass
        undo()
        return False

    def swap(
        self, path: str, parent: nn.Module, children: Mapping[str, nn.Module], likeness: Likeness = agree
    ) -> bool:
        """Give the module at this path other children under these names, if it `holds`."""
        old = {name: getattr(parent, name) for name in children}

        def put(modules: Mapping[str, nn.Module]) -> None:
            for name, module in modules.items():
                setattr(parent, name, module)

        return self.holds(path, parent, partial(put, children), partial(put, old), likeness)

    def choirs(self) -> Iterator[tuple[str, ...]]:
        """Paths of linear layers that were always called one right after the other, with one and the same input."""
        runs: dict[tuple[str, ...], int] = defaultdict(int)
        calls: dict[str, int] = defaultdict(int)
        run: list[str] = []
        shared: Any = None
        for path, x in self.heard:
            calls[path] += 1
            if x is not shared or path in run:
                runs[tuple(run)] += 1
                run, shared = [], x
            run.append(path)
        runs[tuple(run)] += 1
        for group, times in runs.items():
            if len(group) > 1 and all(calls[path] == times for path in group):
                yield group
