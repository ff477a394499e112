"""What "auto" means, on whatever machine this runs."""

from __future__ import annotations

import pytest
import torch

from carpool.engine import device as device_module
from carpool.engine.device import resolve_device, resolve_dtype
from carpool.engine.errors import ConfigError

CPU = torch.device("cpu")


@pytest.mark.parametrize(("available", "kind"), [(True, "cuda"), (False, "cpu")])
def test_auto_is_the_gpu_where_there_is_one(
    available: bool, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert resolve_device("auto").type == kind
    assert resolve_device("cpu").type == "cpu"


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="--device cpu"):
        resolve_device("cuda")


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
    dtype, notice = resolve_dtype(name, stored, CPU)
    assert dtype is expected
    assert (notice is not None) is noticed


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
