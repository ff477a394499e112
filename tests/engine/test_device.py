"""What "auto" means, on whatever machine this runs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from carpool.engine import device as device_module
from carpool.engine.device import resolve_devices, resolve_dtype
from carpool.engine.errors import ConfigError

CPU = torch.device("cpu")


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let torch find GPUs of these compute capabilities, and be built for that CUDA."""

    def found(*capabilities: tuple[int, int], cuda: str | None = "13.0") -> None:
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device.index])

    return found


# ── devices ──────────────────────────────────────────────────────────────────────────────────────────────────


def names(devices: tuple[torch.device, ...]) -> list[str]:
    return [str(device) for device in devices]


def test_auto_is_the_first_gpu_where_there_is_one(gpus: Callable[..., None]) -> None:
    gpus((8, 0), (9, 0))
    assert names(resolve_devices("auto")) == ["cuda:0"]
    assert names(resolve_devices("cpu")) == ["cpu"]
    gpus()
    assert names(resolve_devices("auto")) == ["cpu"]


@pytest.mark.parametrize(
    ("name", "count", "expected"),
    [
        ("cuda", 1, ["cuda:0"]),
        ("cuda:2", 1, ["cuda:2"]),
        ("auto", 3, ["cuda:0", "cuda:1", "cuda:2"]),
        ("cuda:1", 2, ["cuda:1", "cuda:2"]),
    ],
)
def test_gpus_are_counted_from_the_named_one_on(
    name: str, count: int, expected: list[str], gpus: Callable[..., None]
) -> None:
    gpus((7, 5), (8, 9), (12, 0))
    assert names(resolve_devices(name, count)) == expected


@pytest.mark.parametrize(
    ("capabilities", "name", "count", "sentence"),
    [
        ([(9, 0)], "cuda", 2, "--data-parallel-size 2: there is one GPU here."),
        ([(9, 0)] * 3, "cuda", 4, "--data-parallel-size 4: there are 3 GPUs here."),
        ([(9, 0)] * 3, "cuda:1", 3, "--data-parallel-size 3: there are 2 GPUs here from cuda:1 on."),
        ([(9, 0)], "cuda:1", 1, "--device cuda:1: there is one GPU here, and numbers start at 0."),
        ([(9, 0)] * 2, "cpu", 2, "on a CPU, --cpu-workers says"),
        ([], "auto", 2, "on a CPU, --cpu-workers says"),
        (
            [(9, 0), (7, 0)],
            "cuda",
            2,
            "cuda:1 is of compute capability 7.0, and the kernels are for 7.5 and later",
        ),
        ([(6, 1)], "auto", 1, "use --device cpu"),
    ],
)
def test_what_is_not_there_or_too_old_is_refused(
    capabilities: list[tuple[int, int]], name: str, count: int, sentence: str, gpus: Callable[..., None]
) -> None:
    gpus(*capabilities)
    with pytest.raises(ConfigError) as refused:
        resolve_devices(name, count)
    assert sentence in str(refused.value)


def test_a_gpu_that_is_too_old_is_in_nobodys_way(gpus: Callable[..., None]) -> None:
    gpus((6, 1), (8, 6))
    assert names(resolve_devices("cuda:1")) == ["cuda:1"]
    assert names(resolve_devices("cpu")) == ["cpu"]


@pytest.mark.parametrize(
    ("cuda", "words"),
    [
        (None, "built for CPUs only: pip install --force-reinstall"),
        ("13.0", "built for CUDA 13.0, finds no device"),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_refused_with_what_to_do(
    cuda: str | None, words: str, gpus: Callable[..., None]
) -> None:
    gpus(cuda=cuda)
    with pytest.raises(ConfigError) as refused:
        resolve_devices("cuda")
    assert words in str(refused.value)
    assert str(refused.value).endswith("or use --device cpu.")


def test_every_gpu_is_told_how_much_of_its_memory_to_take(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[float, torch.device]] = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *given: told.append(given))
    devices = (torch.device("cuda", 0), torch.device("cuda", 1))
    device_module.limit_memory(devices, 0.5)
    assert told == [(0.5, device) for device in devices]


# ── dtype ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("capability", "stored", "expected", "noticed"),
    [
        ((7, 5), "bfloat16", torch.float32, True),
        ((7, 5), "float16", torch.float16, False),
        ((8, 0), "bfloat16", torch.bfloat16, False),
        ((12, 0), "bfloat16", torch.bfloat16, False),
    ],
)
def test_a_gpu_that_only_emulates_bfloat16_does_not_run_in_it(
    capability: tuple[int, int],
    stored: str,
    expected: torch.dtype,
    noticed: bool,
    gpus: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpus(capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    dtype, notice = resolve_dtype("auto", stored, torch.device("cuda", 0))
    assert (dtype, notice is not None) == (expected, noticed)


@pytest.mark.parametrize(
    ("native", "name", "stored", "expected", "noticed"),
    [
        ({"bfloat16"}, "auto", "bfloat16", torch.bfloat16, False),
        ({"bfloat16"}, "auto", "float16", torch.float32, True),
        (set(), "auto", "bfloat16", torch.float32, True),
        ({"bfloat16"}, "auto", "float32", torch.float32, False),
        ({"bfloat16"}, "auto", "float64", torch.float32, False),
        ({"bfloat16"}, "auto", None, torch.float32, False),
        ({"bfloat16"}, "bfloat16", "float32", torch.bfloat16, False),
        (set(), "bfloat16", "float32", torch.bfloat16, True),
        ({"float16"}, "half", None, torch.float16, False),
        (set(), "float16", "float16", torch.float16, True),
        (set(), "float", "bfloat16", torch.float32, False),
        (set(), "float32", "bfloat16", torch.float32, False),
    ],
)
def test_the_dtype_and_whether_the_user_is_told(
    native: set[str],
    name: str,
    stored: str | None,
    expected: torch.dtype,
    noticed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(device_module, "_native_16_bit", lambda device: native)
    monkeypatch.setattr(device_module, "_multiplies_bfloat16", lambda device: False)
    dtype, notice = resolve_dtype(name, stored, CPU)
    assert dtype is expected
    assert (notice is not None) is noticed


@pytest.mark.parametrize(
    ("name", "stored", "kind", "expected"),
    [
        ("auto", "float32", "bert", torch.bfloat16),
        ("auto", "float16", "bert", torch.bfloat16),
        ("auto", None, "bert", torch.bfloat16),
        ("auto", "float32", "deberta", torch.float32),
        ("float32", "bfloat16", "bert", torch.float32),
        ("half", "float32", "bert", torch.float16),
    ],
)
def test_a_cpu_that_multiplies_bfloat16_runs_in_it_unless_told_otherwise(
    name: str, stored: str | None, kind: str, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_module, "_native_16_bit", lambda device: {"bfloat16", "float16"})
    monkeypatch.setattr(device_module, "_multiplies_bfloat16", lambda device: True)
    assert resolve_dtype(name, stored, CPU, kind) == (expected, None)


@pytest.mark.parametrize("unit", ["_is_avx512_bf16_supported", "_is_amx_tile_supported"])
def test_bfloat16_takes_a_cpu_with_units_for_it(unit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for each in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, each, lambda: False)
    assert not device_module._multiplies_bfloat16(CPU)
    monkeypatch.setattr(torch.cpu, unit, lambda: True)
    assert device_module._multiplies_bfloat16(CPU)
    assert not device_module._multiplies_bfloat16(torch.device("cuda"))


def test_what_this_cpu_computes_natively_is_known_without_running_it() -> None:
    assert device_module._native_16_bit(CPU) <= {"bfloat16", "float16"}


def test_float16_is_kept_from_models_that_overflow_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for native, expected in (({"bfloat16", "float16"}, torch.bfloat16), ({"float16"}, torch.float32)):
        monkeypatch.setattr(device_module, "_native_16_bit", lambda device, native=native: native)
        for kind in ("gemma2", "gemma3_text"):
            for name in ("float16", "half"):
                with pytest.raises(
                    ConfigError, match=f"float16 overflows in models of type {kind}.*bfloat16"
                ):
                    resolve_dtype(name, "float32", CPU, kind)
            dtype, notice = resolve_dtype("auto", "float16", CPU, kind)
            assert dtype is expected
            assert "overflows" in (notice or "")
            assert resolve_dtype("float32", "float16", CPU, kind) == (torch.float32, None)
        assert resolve_dtype("float16", None, CPU, "gemma")[0] is torch.float16


def test_the_first_deberta_runs_in_float32_only() -> None:
    with pytest.raises(
        ConfigError, match=r"bfloat16 meets float32 in .* models of type deberta: use --dtype float32"
    ):
        resolve_dtype("bfloat16", None, CPU, "deberta")
    dtype, notice = resolve_dtype("auto", "bfloat16", CPU, "deberta")
    assert (dtype, notice is None) == (torch.float32, False)
    assert resolve_dtype("bfloat16", None, CPU, "deberta-v2")[0] is torch.bfloat16
