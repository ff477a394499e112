"""Which attention serves a layer: the whole choice as a table, and what people are told of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from carpool.kernels import launch, native, ops, varlen
from carpool.kernels.attention import Asked, Choice, Place, choose

CPU = Place("cpu", None, "AVX2", "it is not for this kind of device", "-", "-")
HOPPER = Place("cuda", (9, 0), None, None, None, "has not been tried on pages")
TURING = HOPPER._replace(capability=(7, 5))
BARE = HOPPER._replace(kernels="CuPy is not installed: pip install 'carpool[cuda12]'")
FLASHLESS = HOPPER._replace(varlen="fails here (not built in)")
NOTHING = BARE._replace(varlen="fails here (not built in)")


def ask(**how: Any) -> Asked:
    size = how.pop("head_size", 64)
    return Asked(**{"dtype": torch.bfloat16, "head_size": size, "value_size": size, **how})


@pytest.mark.parametrize(
    ("place", "how", "chosen"),
    [
        # a CPU
        (CPU, {}, "native: AVX2"),
        (CPU, {"dtype": torch.float32, "softcap": True}, "native: AVX2"),
        (CPU, {"unseen": True}, "native: AVX2"),
        (CPU, {"dtype": torch.float16}, "torch: float16"),
        (CPU, {"head_size": 24}, "torch: heads of 24"),
        (CPU, {"bias": True}, "native: AVX2"),
        (CPU, {"bias": True, "grouped": True, "sinks": True}, "torch: bias on grouped heads, sinks"),
        (CPU._replace(native=None), {}, "torch: no native kernels"),
        (CPU, {"paged": True, "softcap": True}, "native: AVX2"),
        (CPU, {"paged": True, "sinks": True}, "torch: sinks"),
        # a CPU that launches our CUDA kernels: the emulator
        (CPU._replace(kernels=None), {}, "cupy"),
        (CPU._replace(kernels=None), {"head_size": 20}, "torch: heads of 20"),
        # a GPU of today
        (HOPPER, {}, "varlen_attn"),
        (HOPPER, {"dtype": torch.float16}, "varlen_attn"),
        (HOPPER, {"head_size": 256}, "varlen_attn"),
        (HOPPER, {"dtype": torch.float32}, "cupy: float32"),
        (HOPPER, {"softcap": True}, "cupy: soft cap"),
        (HOPPER, {"bias": True, "sinks": True, "unseen": True}, "cupy: bias, sinks, unseen tokens"),
        (HOPPER, {"dtype": torch.float32, "head_size": 20}, "cupy: float32, heads of 20"),
        (HOPPER, {"head_size": 20}, "sdpa: heads of 20"),
        (HOPPER, {"head_size": 512}, "sdpa: heads of 512"),
        (HOPPER, {"value_size": 32}, "sdpa: heads of 64 with values of 32"),
        # less than that
        (TURING, {}, "cupy: compute capability 7.5"),
        (FLASHLESS, {}, "cupy: varlen_attn fails here (not built in)"),
        (BARE, {}, "varlen_attn"),
        (BARE, {"sinks": True}, "sdpa: sinks"),
        (NOTHING, {}, "sdpa: varlen_attn fails here (not built in)"),
        # out of pages
        (HOPPER, {"paged": True}, "cupy: varlen_attn has not been tried on pages"),
        (HOPPER._replace(pages=None), {"paged": True}, "varlen_attn"),
        (BARE, {"paged": True}, "gather: varlen_attn has not been tried on pages"),
    ],
)
def test_chooses(place: Place, how: dict[str, Any], chosen: str) -> None:
    assert str(choose(place, ask(**how))) == chosen


@pytest.mark.parametrize(
    ("place", "how", "notice"),
    [
        (
            BARE,
            {"softcap": True},
            "Attention (soft cap) runs in torch, text by text, which is slow: "
            "CuPy is not installed: pip install 'carpool[cuda12]'.",
        ),
        (
            FLASHLESS,
            {},
            "torch's varlen_attn fails here (not built in): our kernel serves in its place.",
        ),
        (
            HOPPER,
            {"head_size": 20},
            "Attention (heads of 20) runs in torch, text by text, which is slow: our kernel takes heads of whole 16 "
            "bytes up to 256 wide, and these are heads of 20.",
        ),
    ],
)
def test_a_last_resort_is_said_and_what_to_do(place: Place, how: dict[str, Any], notice: str) -> None:
    assert choose(place, ask(**how)).notice == notice


@pytest.mark.parametrize("place", [CPU, HOPPER, TURING, BARE])
def test_whatever_is_as_it_should_be_is_not(place: Place) -> None:
    assert choose(place, ask()).notice is None


@pytest.mark.parametrize(
    ("place", "mixes"), [(CPU, True), (HOPPER, True), (CPU._replace(native=None), False)]
)
def test_a_twin_minds_which_lengths_are_in_a_call(place: Place, mixes: bool) -> None:
    assert choose(place, ask()).mixes_lengths is mixes


def test_a_choice_reads_like_a_sentence() -> None:
    assert str(Choice("varlen_attn")) == "varlen_attn"
    assert str(Choice("cupy", "bias")) == "cupy: bias"


# ── what there is ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def nothing_kept() -> Iterator[None]:
    ops._place.cache_clear()
    yield
    ops._place.cache_clear()


@pytest.mark.usefixtures("nothing_kept")
@pytest.mark.parametrize("kernels", [None, "CuPy is not installed: pip install it."])
@pytest.mark.parametrize("flash", [None, "fails here (not built in)"])
def test_of_a_cuda_device_is_known_what_it_is_and_what_can_be_had_there(
    kernels: str | None, flash: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, device.index))
    monkeypatch.setattr(launch, "fault", lambda: kernels)
    monkeypatch.setattr(varlen, "fault", lambda _: flash)
    place = ops.place(torch.device("cuda", 6))
    ending = "CuPy is not installed: pip install it" if kernels else None
    assert place == Place("cuda", (8, 6), None, ending, flash, "has not been tried on pages")


@pytest.mark.parametrize("level", range(len(native.LEVELS)))
def test_of_a_cpu_is_known_how_much_our_own_code_may_use(level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", object() if level else None)
    monkeypatch.setattr(native, "level", level)
    place = ops.place(torch.device("cpu"))
    assert (place.device, place.native) == ("cpu", native.LEVELS[level] if level else None)
    assert place.kernels
    assert place.varlen
