"""Which peak counts, and that the program which measures them says what a CPU lacks."""

import shutil
import subprocess
from pathlib import Path

import pytest

import peaks
from peaks import Peaks


def test_the_fastest_instructions_for_a_type_bound_it() -> None:
    found = Peaks({"fma": 100.0, "vdpbf16ps": 200.0, "amx_bf16": 900.0}, {"fma": 180.0, "amx_bf16": 1500.0})
    assert found.of("bfloat16") == "amx_bf16"
    assert found.of("float32") == "fma"
    assert found.fraction("bfloat16", 450.0) == "50 %"
    assert found.fraction("bfloat16", 450.0, everywhere=True) == "30 %"


def test_of_two_measurements_the_higher_is_the_peak() -> None:
    early = Peaks({"fma": 100.0, "copy": 70.0}, {"fma": 180.0})
    late = Peaks({"fma": 90.0, "copy": 80.0}, {"fma": 190.0})
    assert early.or_higher(late) == Peaks({"fma": 100.0, "copy": 80.0}, {"fma": 190.0})


def test_without_a_peak_there_is_no_fraction_and_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    found = peaks.measure()
    assert found.of("bfloat16") is None
    assert found.fraction("bfloat16", 1.0) == ""
    assert "no C++ compiler" in found.text()


def test_what_does_not_compile_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if not shutil.which("c++"):
        pytest.skip("needs a compiler")
    source = tmp_path / "wrong.cpp"
    source.write_text("int main() { return what; }")
    monkeypatch.setattr(peaks, "SOURCE", source)
    assert "does not build" in peaks.measure().text()


def test_the_program_measures_or_says_that_the_cpu_cannot(tmp_path: Path) -> None:
    if not shutil.which("c++"):
        pytest.skip("needs a compiler")
    program = tmp_path / "peaks"
    subprocess.run(["c++", "-O2", "-std=c++17", str(peaks.SOURCE), "-o", str(program)], check=True)
    flags = Path("/proc/cpuinfo").read_text()
    for kind, flag in (("copy", ""), ("vdpbf16ps", "avx512_bf16"), ("amx_bf16", "amx_bf16")):
        rate = peaks._rate(program, kind, 1)
        if flag and f" {flag}" not in flags:
            assert rate is None
        elif flag != "amx_bf16":  # whose use a kernel may refuse
            assert rate is not None
            assert rate > 0.1
    assert subprocess.run([str(program), "nonsense"], check=False).returncode == 3
