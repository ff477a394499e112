"""Choice: how a loaded model is run. Packed if the probe finds nothing wrong with it, else padded, else not at all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from carpool.engine.errors import ConfigError
from carpool.engine.models.backbone import Backbone
from carpool.engine.models.padded import PaddedBackbone
from carpool.engine.models.patches import unpatch
from carpool.engine.models.probe import Probe
from carpool.engine.models.stretching import StretchingBackbone, stretches_beyond


def choose(
    loaded: Backbone, *, vocab_size: int, max_model_len: int, limits: Iterable[int] = ()
) -> tuple[Backbone, str | None]:
    """The first way of running the model that the probe finds nothing wrong with, and a notice if it is a slow one.

    Lengths of the probe straddle the `limits`. Raises ConfigError with one sentence if there is no such way.
    """
    name = type(loaded.module).__name__
    limit = stretches_beyond(loaded.module.config)
    stretches = limit is not None and max_model_len > limit
    if limit is not None and stretches:
        limits = [*limits, limit]
    probe = Probe(vocab_size=vocab_size, max_model_len=max_model_len, limits=limits)
    packed_fault = last_fault = None
    for way in _ways(loaded):
        backbone = StretchingBackbone(way, limit) if limit is not None and stretches else way
        fault = probe.fault(backbone)
        if fault is None:
            return backbone, _notice(name, way, packed_fault)
        packed_fault, last_fault = packed_fault or fault, fault
    if packed_fault == last_fault:
        raise ConfigError(f"{name} cannot be served: {last_fault}.")
    raise ConfigError(f"{name} cannot be served, neither packed ({packed_fault}) nor padded ({last_fault}).")


def _ways(loaded: Backbone) -> Iterator[Backbone]:
    """From the fastest to the slowest. To ask for the next changes the module, so that the one before is done for."""
    yield loaded
    unpatch(loaded.module)
    supported = ("sdpa", "eager") if getattr(loaded.module, "_supports_sdpa", False) else ("eager",)
    for pads in (True, False):
        for attention in supported:  # sdpa raises where it cannot do what a layer asks for
            yield PaddedBackbone(loaded.module, attention=attention, pads=pads)


def _notice(name: str, way: Backbone, packed_fault: str | None) -> str | None:
    if not isinstance(way, PaddedBackbone):
        return None
    company = "right-padded" if way.pads else "only with others of exactly their length"
    return f"{name} cannot be packed ({packed_fault}): texts are served {company}, by transformers' own code, slower."
