"""Freed memory goes back to the system, but not at every turn."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from carpool.engine.memory import HeapTrimmer, _find_trim

# Faults of a thread that has 24 MB in buffers of 3 MB twenty times over: 6,000 each time, if they are mapped anew.
BUFFERS = """
import resource, threading
from carpool.engine.memory import keep_buffers
import torch

def work():
    use = lambda: [torch.zeros(3 << 20, dtype=torch.uint8) for _ in range(8)]
    use(), use()
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    for _ in range(20):
        use()
    print(resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before)

keep_buffers()
thread = threading.Thread(target=work)
thread.start()
thread.join()
"""

# Megabytes by which a thread's products of 400 shapes have the process grow: 250 if either cache is as it comes.
SHAPES = """
import resource, threading
from carpool.engine.memory import bound_primitive_caches
bound_primitive_caches()
import torch

def work():
    weight = torch.ones(64, 16, dtype=torch.bfloat16)
    def multiply(shapes):
        for rows in shapes:
            torch.ones(rows, 64, dtype=torch.bfloat16) @ weight
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    before = multiply(range(1, 20))
    print((multiply(range(20, 420)) - before) >> 10)

thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


def test_it_trims_at_most_once_in_five_seconds() -> None:
    calls: list[int] = []
    heap = HeapTrimmer(calls.append)

    for now in (10.0, 10.1, 14.9, 15.0, 17.5, 100.0):
        heap.rest(now)

    assert calls == [0, 0, 0]  # at 10, 15 and 100


def test_the_systems_own_trim_is_found_or_nothing_happens() -> None:
    HeapTrimmer().rest(0.0)


@pytest.mark.skipif(_find_trim() is None, reason="another C library")
@pytest.mark.parametrize("told", [False, True])
def test_freed_buffers_are_used_again_unless_malloc_was_told_otherwise(told: bool) -> None:
    silent = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    env = {**silent, "MALLOC_TRIM_THRESHOLD_": "131072"} if told else silent
    done = subprocess.run(
        [sys.executable, "-c", BUFFERS], env=env, capture_output=True, text=True, check=True
    )
    assert (int(done.stdout) > 20 * 1000) is told


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="nothing is compiled for a shape"
)
def test_what_is_compiled_for_a_shape_is_not_kept_for_ever() -> None:
    untold = {name: value for name, value in os.environ.items() if not name.endswith("_CACHE_CAPACITY")}
    done = subprocess.run(
        [sys.executable, "-c", SHAPES], env=untold, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 60
