"""Roster: which adapters may be asked for while the model serves, and when their weights may go. On the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from carpool.engine.errors import ConfigError, InvalidParameter, UnknownAdapter

if TYPE_CHECKING:
    from carpool.engine.changes import LoadAdapter
    from carpool.engine.model_info import ModelInfo
    from carpool.engine.preparation import Rack

_LOOK_S = 0.01  # between looks whether an adapter's last rider is answered


class Roster:
    """Names are given anew, slots never: what was computed on one adapter cannot be taken for another's.

    `load` and `unload` are called one at a time.
    """

    def __init__(
        self,
        model: ModelInfo,
        rack: Rack | None,
        rides: Callable[[int], bool],
        told: Callable[[Mapping[str, int], Mapping[str, str]], None],
    ) -> None:
        """Without a `rack` adapters stay as they are. `rides` is whether anything under way is on a slot; `told` gets
        the slots and the paths by name, when they change.
        """
        self._rack = rack
        self._rides = rides
        self._told = told
        self._by_name = dict(model.adapters)
        self._paths = dict(model.lora_modules)  # of those that are no task's
        self.slots = {0, *self._by_name.values()}  # that a request may ride on: their weights are here
        self._last_slot = max(self.slots)
        self._leaving: set[asyncio.Task[None]] = set()
        self._at_the_rack = asyncio.Lock()

    async def load(self, change: LoadAdapter) -> None:
        """Raises InvalidParameter for what does not fit, and then nothing has changed."""
        rack, name = self._changeable(), change.name
        if not name:
            raise InvalidParameter("An adapter needs a name to be asked for by.", "lora_name")
        if change.once and self._paths.get(name) == change.path:
            return
        if name in self._by_name and name not in self._paths:
            raise InvalidParameter(
                f"A task of this model is called {name!r}: choose another name.", "lora_name"
            )
        if name in self._by_name and not change.replace:
            raise InvalidParameter(
                f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, set "
                "'load_inplace' to True.",
                "lora_name",
            )
        self._last_slot += 1
        slot = self._last_slot
        hang = partial(rack.hang, slot, name, change.path)
        try:
            async with self._at_the_rack:
                await asyncio.get_running_loop().run_in_executor(None, hang)
        except ConfigError as error:
            raise InvalidParameter(str(error), "lora_path") from error
        before = self._by_name.get(name)
        self.slots.add(slot)
        self._by_name[name], self._paths[name] = slot, change.path
        self._tell()
        if before is not None:
            self._let_go(before)

    def unload(self, name: str) -> None:
        """Raises UnknownAdapter for one that was not loaded."""
        self._changeable()
        if name not in self._paths:
            raise UnknownAdapter(f"The lora adapter '{name}' cannot be found.", "lora_name")
        slot = self._by_name.pop(name)
        del self._paths[name]
        self._tell()
        self._let_go(slot)

    def close(self) -> None:
        """Weights that wait for their last rider go with the process."""
        for task in self._leaving:
            task.cancel()

    def _changeable(self) -> Rack:
        if self._rack is None:
            raise InvalidParameter(
                "Adapters come and go only where the server was started with --allow-runtime-lora-updating."
            )
        return self._rack

    def _tell(self) -> None:
        self._told(dict(self._by_name), dict(self._paths))

    def _let_go(self, slot: int) -> None:
        task = asyncio.ensure_future(self._last_rider(slot))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    async def _last_rider(self, slot: int) -> None:
        """Drop an adapter that nobody can ask for any more, once all who have are answered."""
        while self._rides(slot):  # noqa: ASYNC110
            await asyncio.sleep(_LOOK_S)
        self.slots.discard(slot)
        drop = partial(self._changeable().drop, slot)
        async with self._at_the_rack:
            await asyncio.get_running_loop().run_in_executor(None, drop)
