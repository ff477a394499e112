"""The checker is checked: each of these faults, planted in the kernels one at a time, must be found.

Most of them give right numbers on some orders of threads, or on a device by luck: what finds those is the watching of
every access and barrier, which then names the place.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest
import torch

from carpool.kernels import cuda_table, launch, reference
from carpool.kernels.cuda_table import Instance
from emu import build
from emu.backend import Emulated
from emu.cases import CASES
from emu.choose import Seeded
from emu.module import KernelError

pytestmark = pytest.mark.skipif(build.MISSING is not None, reason=str(build.MISSING))
SEEDS = 30


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    find: str
    replace: str
    case: str
    found: str  # a pattern of the checker's message; "wrong" for an error that only the numbers show
    kernels: tuple[str, ...] = ()  # what the case launches, if not one kernel of its name
    output: reference.Output = "float32"

    @property
    def source(self) -> str:
        """All sources, this one's text in one of them replaced where it stands first."""
        before, mark, rest = cuda_table.source().partition(f'#line 1 "{self.file}"\n')
        own, other, behind = rest.partition('#line 1 "')
        assert self.find in own, f"{self.file} no longer has {self.find!r}"
        return before + mark + own.replace(self.find, self.replace, 1) + other + behind

    @property
    def launches(self) -> tuple[str, ...]:
        return self.kernels or (self.case,)


POOL = ("pool_rows", "pool_split")
STEP = ("step_count", "step_fill")
PAGED = ("kv_write", "kv_gather")
ATTENTION = ("attention",)
RACE = "race on|uninitialised"
SUM = "if (lane == 0) shared[warp] = v;\n    __syncthreads();"
MUTANTS = [
    # barriers left out
    Mutant("sum: warps not waited for", "element.cuh", SUM, SUM.split("\n")[0], "norm_rows", RACE),
    Mutant(
        "sum: total not waited for",
        "element.cuh",
        "    __syncthreads();\n    return shared[32];",
        "    return shared[32];",
        "norm_rows",
        RACE,
    ),
    Mutant(
        "pool: lanes not waited for",
        "pool.cu",
        "  __syncthreads();\n  if (lanes > 1) {",
        "  if (lanes > 1) {",
        "pool_rows",
        RACE,
        POOL,
    ),
    Mutant(
        "pool: sums not waited for",
        "pool.cu",
        "      to.base[at] = sum;\n    }\n    __syncthreads();",
        "      to.base[at] = sum;\n    }",
        "pool_rows",
        RACE,
        POOL,
    ),
    Mutant(
        "maxsim: tiles not waited for",
        "pairs.cu",
        "depth, document);\n        __syncthreads();",
        "depth, document);",
        "maxsim",
        RACE,
    ),
    Mutant(
        "maxsim: tiles overwritten",
        "pairs.cu",
        "__syncthreads();  // the tiles are read",
        ";  //",
        "maxsim",
        RACE,
    ),
    Mutant(
        "norm: another thread's column",
        "layers.cu",
        "const float v = kept[i * vectors + k] - mean;",
        "const float v = kept[i * vectors + vectors - 1 - k] - mean;",
        "norm_rows",
        RACE,
    ),
    # barriers and exchanges that not all reach
    Mutant(
        "threads end before a barrier",
        "pool.cu",
        "const float share =",
        "if (threadIdx.x >= 200) return;\n  const float share =",
        "pool_rows",
        "barrier divergence",
        POOL,
    ),
    Mutant(
        "two barriers for one",
        "pool.cu",
        "  __syncthreads();\n  if (lanes > 1) {",
        "  if (threadIdx.x < 64) __syncthreads();\n  else __syncthreads();\n  if (lanes > 1) {",
        "pool_rows",
        "barrier divergence",
        POOL,
    ),
    Mutant(
        "shuffle with lanes missing",
        "element.cuh",
        "v = warp_sum(lane < warps ? shared[lane] : 0.f);",
        "if (lane < warps) v = warp_sum(shared[lane]);",
        "norm_rows",
        "deadlock|takes no part",
    ),
    Mutant(
        "shuffle that leaves itself out",
        "element.cuh",
        "#define ALL_LANES 0xffffffffu",
        "#define ALL_LANES 0x7fffffffu",
        "cosine_pairs",
        "leaves it out",
    ),
    # out of bounds
    Mutant(
        "pool: a token too many",
        "pool.cu",
        "t < end; t += lanes",
        "t <= end; t += lanes",
        "pool_rows",
        "out of bounds",
        POOL,
    ),
    Mutant(
        "step: tokens behind the last",
        "gather.cu",
        "const bool hit = t + lane < end && ids[t + lane] == tag;",
        "const bool hit = ids[t + lane] == tag && t + lane < end;",
        "step_rows",
        "out of bounds: read",
        STEP,
    ),
    Mutant(
        "gather: warps without a row",
        "gather.cu",
        "if (r >= count) return;",
        "",
        "gather_rows",
        "out of bounds",
    ),
    Mutant(
        "sparse: threads without a column",
        "heads.cu",
        "if (c >= columns) return;",
        "",
        "sparse_rows",
        "out of bounds|race",
    ),
    Mutant(
        "sparse: a token too many",
        "heads.cu",
        "t < end; ++t) weight = larger",
        "t <= end; ++t) weight = larger",
        "sparse_rows",
        "out of bounds",
    ),
    Mutant(
        "cosine: a vector too many",
        "pairs.cu",
        "c < columns; c += 32 * V",
        "c <= columns; c += 32 * V",
        "cosine_pairs",
        "out of bounds",
    ),
    Mutant(
        "maxsim: tokens behind the last", "pairs.cu", "first + token < end && ", "", "maxsim", "out of bounds"
    ),
    Mutant(
        "gated: threads without a row", "layers.cu", "if (row >= rows) return;", "", "gated", "out of bounds"
    ),
    Mutant(
        "kv_write: slot behind the end",
        "paged.cu",
        "slot < 0 || slot >= capacity",
        "slot < 0",
        "paged",
        "out of bounds: write",
        PAGED,
    ),
    Mutant(
        "shared array one too small",
        "layers.cu",
        "__shared__ float shared[33];",
        "__shared__ float shared[32];",
        "norm_rows",
        "out of bounds: write of 4 bytes .* byte 128 of a __shared__ array of 128",
    ),
    Mutant(
        "shared memory far out",
        "element.cuh",
        "shared[32] = v;",
        "shared[40000] = v;",
        "norm_rows",
        "out of bounds",
    ),
    # what nobody has written, or may write, or two write
    Mutant(
        "uninitialised shared memory",
        "element.cuh",
        "v = warp_sum(lane < warps ? shared[lane] : 0.f);",
        "v = warp_sum(shared[lane] * 0.f + (lane < warps ? shared[lane] : 0.f));",
        "norm_rows",
        "uninitialised: read of shared",
    ),
    Mutant(
        "output read before it is written",
        "gather.cu",
        "if (lane == 0) counts[b] = found;",
        "if (lane == 0) counts[b] += found;",
        "step_rows",
        "uninitialised: read of argument 2",
        STEP,
    ),
    Mutant(
        "last column not written",
        "element.cuh",
        "for (int c = first; c < columns; c += step) out[c]",
        "for (int c = first; c < columns - 1; c += step) out[c]",
        "pool_rows",
        "was never written",
        POOL,
    ),
    Mutant(
        "scales not written",
        "element.cuh",
        "if (group.rank() == 0) *scale = of_one;",
        "",
        "gather_rows",
        "was never written",
    ),
    Mutant(
        "write to an input",
        "pool.cu",
        "const float share =",
        "const_cast<int*>(widths)[b] = width;\n  const float share =",
        "pool_rows",
        "write to const argument 3",
        POOL,
    ),
    Mutant(
        "two blocks write one row",
        "pool.cu",
        "TO* row_out = out + (i64)b *",
        "TO* row_out = out + (i64)(b / 2) *",
        "pool_rows",
        "race on global",
        POOL,
    ),
    Mutant(
        "lanes out of order",
        "gather.cu",
        "(1u << lane) - 1u",
        "(2u << lane) - 1u",
        "step_rows",
        "out of bounds|never written",
        STEP,
    ),
    Mutant(
        "misaligned vectors",
        "pool.cu",
        "rows + t * columns + k * V",
        "rows + t * columns + k * V + 1",
        "pool_rows",
        "misaligned read of 16 bytes",
        POOL,
    ),
    # numbers alone
    Mutant(
        "sums in 16 bits",
        "pool.cu",
        "sum[i] += x[i];",
        "sum[i] = Element<T>::up(Element<T>::down(sum[i] + x[i]));",
        "pool_rows",
        "wrong",
        POOL,
    ),
    Mutant(
        "chunks of two sequences meet",
        "pool.cu",
        "return bounds[b] / CHUNK + b;",
        "return bounds[b] / CHUNK;",
        "pool_rows",
        "wrong|out of bounds|race",
        POOL,
    ),
    Mutant(
        "int8 cut off, not rounded",
        "element.cuh",
        "__float2int_rn(row(c) * factor)",
        "(int)(row(c) * factor)",
        "gather_rows",
        "wrong",
        (),
        "int8",
    ),
    Mutant(
        "bits from the low end",
        "element.cuh",
        "bits = 2 * bits + (c < width && row(c) >= 0.f);",
        "bits |= (unsigned)(c < width && row(c) >= 0.f) << i;",
        "gather_rows",
        "wrong",
        (),
        "binary",
    ),
    Mutant(
        "softmax: each lane its own maximum",
        "heads.cu",
        "most = warp_max(most);",
        "",
        "activate_rows",
        "wrong",
    ),
    Mutant(
        "maxsim: empty places count",
        "pairs.cu",
        "if (td + x + 16 * j < end_d) best",
        "best",
        "maxsim",
        "wrong",
    ),
    Mutant(
        "rotary turned backwards",
        "layers.cu",
        "a * cosine(c) - b * sine(c)",
        "a * cosine(c) + b * sine(c)",
        "rotary",
        "wrong",
    ),
    Mutant(
        "norm of what was not rounded",
        "layers.cu",
        "v[i] = Element<T>::up(Element<T>::down(v[i] + more[i]));",
        "v[i] += more[i];",
        "norm_rows",
        "wrong",
    ),
    Mutant(
        "kv_gather: always the first page",
        "paged.cu",
        "place / page_size]",
        "0]",
        "paged",
        "wrong|out of bounds",
        PAGED,
    ),
    # attention
    Mutant(
        "attention: weights not waited for",
        "attention.cu",
        "__syncthreads();  // the weights are there, too",
        "",
        "packed_attention",
        RACE,
        ATTENTION,
    ),
    Mutant(
        "attention: slabs overwritten",
        "attention.cu",
        "__syncthreads();  // the slabs are read",
        ";  //",
        "packed_attention",
        RACE,
        ATTENTION,
    ),
    Mutant(
        "attention: values overwritten",
        "attention.cu",
        "__syncthreads();  // values and weights are read",
        ";  //",
        "packed_attention",
        RACE,
        ATTENTION,
    ),
    Mutant(
        "attention: a token sees the next",
        "attention.cu",
        "min(place + right, stop - 1)",
        "min(place + right + 1, stop - 1)",
        "packed_attention",
        "wrong|out of bounds",
        ATTENTION,
    ),
    Mutant(
        "attention: window one too wide on the left",
        "attention.cu",
        "low = place - left;",
        "low = place - left - 1;",
        "paged_attention",
        "wrong|out of bounds",
        ATTENTION,
    ),
    Mutant(
        "attention: empty places count",
        "attention.cu",
        "min(place + right, stop - 1)",
        "place + right",
        "packed_attention",
        "wrong|out of bounds",
        ATTENTION,
    ),
    Mutant(
        "attention: keys behind the last",
        "attention.cu",
        "first + token < end && ",
        "",
        "packed_attention",
        "out of bounds",
        ATTENTION,
    ),
    Mutant(
        "attention: keys that none sees passed over too soon",
        "attention.cu",
        "for (int s = max(0, past + first - left)",
        "for (int s = max(0, past + first - left + 1)",
        "paged_attention",
        "wrong",
        ATTENTION,
    ),
    Mutant(
        "attention: sums keep their old base",
        "attention.cu",
        "sum[i][c] *= kept;",
        ";",
        "packed_attention",
        "wrong",
        ATTENTION,
    ),
    Mutant(
        "attention: each lane its own maximum",
        "attention.cu",
        "most_now = row_max(most_now);",
        "",
        "packed_attention",
        "wrong",
        ATTENTION,
    ),
    Mutant(
        "attention: each lane its own sink",
        "attention.cu",
        "sinks == nullptr || x ? 0.f : 1.f",
        "sinks == nullptr ? 0.f : 1.f",
        "packed_attention",
        "wrong",
        ATTENTION,
    ),
    Mutant(
        "attention: bias of rows without a query",
        "attention.cu",
        "place < length ? min",
        "true ? min",
        "packed_attention",
        "out of bounds",
        ATTENTION,
    ),
    Mutant(
        "attention: bias the wrong way round",
        "attention.cu",
        "score[i][j] += of_place[t];",
        "score[i][j] += of_place[2 * place - t];",
        "packed_attention",
        "wrong|out of bounds",
        ATTENTION,
    ),
    Mutant(
        "attention: another head's keys",
        "attention.cu",
        "key + (i64)(head / group)",
        "key + (i64)(head % (gridDim.y / group))",
        "packed_attention",
        "wrong",
        ATTENTION,
    ),
    Mutant(
        "attention: always the first page",
        "attention.cu",
        "pages[t / page_size]",
        "pages[0]",
        "paged_attention",
        "wrong",
        ATTENTION,
    ),
    Mutant(
        "attention: queries at the front of what they see",
        "attention.cu",
        "past = length - queries;",
        "past = 0;",
        "paged_attention",
        "wrong",
        ATTENTION,
    ),
]
BACKENDS: dict[str, Emulated] = {}


def _only(mutant: Mutant, instance: Instance) -> bool:
    """16-bit inputs, one output."""
    wanted = ("__nv_bfloat16", launch.ELEMENTS[reference.OUTPUTS[mutant.output]])
    if len(instance.types) == 2 and instance.kernel.letters[1] == "TO":
        return instance.types == wanted
    return instance.types[:1] in ((), wanted[:1])


def _backend(mutant: Mutant, source: str) -> Emulated:
    return Emulated(check=True, source=source, only=lambda each: _only(mutant, each))


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    """All of them start to build, on two cores, while the first ones are tried."""
    for mutant in MUTANTS:
        backend = BACKENDS[mutant.name] = _backend(mutant, mutant.source)
        backend.prepare(cuda_table.BY_NAME[name] for name in mutant.launches)


def _fault(mutant: Mutant, backend: Emulated) -> str | None:
    """What the first seeds bring to light."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "backend", backend)
        for seed in range(SEEDS):
            backend.begin(seed)
            try:
                CASES[mutant.case](Seeded(seed, (torch.bfloat16,), (mutant.output,)))
            except KernelError as error:
                return str(error)
            except AssertionError as error:
                return f"wrong: {error}"
    return None


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_found(mutant: Mutant) -> None:
    fault = _fault(mutant, BACKENDS[mutant.name])

    assert fault is not None, "the fault was not noticed"
    assert re.search(mutant.found, fault), fault


@pytest.mark.parametrize("case", sorted({mutant.case for mutant in MUTANTS}))
def test_nothing_is_found_where_nothing_is_planted(case: str) -> None:
    """The same seeds, types and outputs, of the kernels as they are."""
    for output in sorted({mutant.output for mutant in MUTANTS if mutant.case == case}):
        mutant = next(each for each in MUTANTS if (each.case, each.output) == (case, output))
        assert _fault(mutant, _backend(mutant, cuda_table.source())) is None
