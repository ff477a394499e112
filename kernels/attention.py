"""Which attention serves a layer: a pure choice, by what the layer asks for and what there is where its tensors lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

By = Literal["native", "torch", "varlen_attn", "cupy", "sdpa", "gather"]

_NATIVE = torch.float32, torch.bfloat16
_FLASH = torch.float16, torch.bfloat16
_FLASH_FROM = (8, 0)  # compute capability: Ampere
_WIDEST = 256  # head size, of all three
_VECTOR = 16  # bytes that our CUDA kernel reads at a time


class Place(NamedTuple):
    """A device and what there is on it. Of what is not to be had: why, as the end of a sentence; else None."""

    device: str  # torch's word for its kind
    capability: tuple[int, int] | None  # of a CUDA device
    native: str | None  # the level of our C++ on this CPU; None where there is none
    kernels: str | None  # our CUDA kernels
    varlen: str | None  # torch's varlen_attn
    pages: str | None  # the same, over a paged cache


class Asked(NamedTuple):
    """What a layer asks for, as far as not all of them do it: they all do directions, windows and, without a bias,
    grouped heads.

    softcap, bias, sinks: whether it does; `grouped`: whether heads share their keys; `unseen`: whether some tokens are
    not to be looked at.
    """

    dtype: torch.dtype
    head_size: int
    value_size: int
    softcap: bool = False
    grouped: bool = False
    bias: bool = False
    sinks: bool = False
    unseen: bool = False
    paged: bool = False

    @property
    def extras(self) -> tuple[str, ...]:
        """What is more than plain attention in a window, in words."""
        words = {
            "soft cap": self.softcap,
            "bias": self.bias,
            "sinks": self.sinks,
            "unseen tokens": self.unseen,
        }
        return tuple(word for word, asked in words.items() if asked)


@dataclass(frozen=True, slots=True)
class Choice:
    """`why` this one and not the usual one, in a few words, or which of several; `notice`: a last resort is said."""

    by: By
    why: str = ""
    notice: str | None = None

    def __str__(self) -> str:
        return f"{self.by}: {self.why}" if self.why else self.by

    @property
    def mixes_lengths(self) -> bool:
        """Whether a call costs the same whichever lengths are in it."""
        return self.by in ("native", "varlen_attn", "cupy")


# DeBERTa's scores, of contents with positions, are torch's on every device.
DISENTANGLED = Choice("torch", "disentangled")


def choose(place: Place, asked: Asked) -> Choice:
    """The fastest implementation that computes what is asked for.

    torch's own where it can, since it uses tensor cores; our kernel for whatever more is asked; else torch's products
    and softmax, a few sequences of equal length at a time, which on a CUDA device is slow enough to be said.
    """
    lacks = _flash_lacks(place, asked)
    fault = None if lacks else place.varlen or (place.pages if asked.paged else None)
    if not lacks and fault is None:
        return Choice("varlen_attn")
    why = ", ".join(lacks) or f"varlen_attn {fault}"
    kernel_lacks = place.kernels or _kernel_lacks(asked)
    if kernel_lacks is None:
        broken = (
            None
            if lacks or not place.varlen
            else f"torch's varlen_attn {fault}: our kernel serves in its place."
        )
        return Choice("cupy", why if place.capability else "", broken)
    if place.device == "cpu":
        missing = _native_lacks(place, asked)
        return Choice("torch", missing) if missing else Choice("native", place.native or "")
    if asked.paged:
        return Choice(
            "gather", why, f"Paged attention ({why}) copies keys and values together first: {kernel_lacks}."
        )
    notice = f"Attention ({why}) runs in torch, text by text, which is slow: {kernel_lacks}."
    return Choice("sdpa", why, notice)


def _flash_lacks(place: Place, asked: Asked) -> list[str]:
    """What is asked for and torch's varlen_attn has not, in words; empty if it has all of it."""
    if place.capability is None:
        return ["no CUDA device"]
    lacks = list(asked.extras)
    if asked.dtype not in _FLASH:
        lacks.append(str(asked.dtype).removeprefix("torch."))
    if asked.head_size % 8 or asked.head_size > _WIDEST or asked.value_size != asked.head_size:
        lacks.append(_heads(asked))
    if place.capability < _FLASH_FROM:
        lacks.append("compute capability {}.{}".format(*place.capability))
    return lacks


def _kernel_lacks(asked: Asked) -> str | None:
    """Why our CUDA kernel cannot take this, as the end of a sentence; None if it can."""
    whole = asked.head_size * asked.dtype.itemsize % _VECTOR == 0
    if whole and asked.head_size <= _WIDEST and asked.value_size == asked.head_size:
        return None
    return (
        f"our kernel takes heads of whole {_VECTOR} bytes up to {_WIDEST} wide, and these are {_heads(asked)}"
    )


def _native_lacks(place: Place, asked: Asked) -> str | None:
    """Why our C++ does not serve, in words; None if it does."""
    if place.native is None:
        return "no native kernels"
    extras = ["bias on grouped heads"] if asked.bias and asked.grouped else []
    if asked.sinks:
        extras.append("sinks")
    if asked.dtype not in _NATIVE:
        extras.append(str(asked.dtype).removeprefix("torch."))
    if asked.head_size % 16 or asked.head_size > _WIDEST or asked.value_size != asked.head_size:
        extras.append(_heads(asked))
    return ", ".join(extras) or None


def _heads(asked: Asked) -> str:
    if asked.value_size != asked.head_size:
        return f"heads of {asked.head_size} with values of {asked.value_size}"
    return f"heads of {asked.head_size}"
