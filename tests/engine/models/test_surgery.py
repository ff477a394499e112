"""Surgery on whole models: the same numbers, less memory than two models, replicas that share, and loud failures."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from building import built
from carpool.engine.build import Parts
from carpool.engine.errors import ConfigError
from carpool.engine.models import surgery
from carpool.engine.models.backbone import Backbone
from carpool.engine.models.surgery import KINDS, gated_mlp, joint_linear, operate
from carpool.engine.models.surgery.joint_linear import FirstLinear
from carpool.engine.models.surgery.native_linear import NativeLinear
from carpool.engine.models.surgery.packed_linear import PackedLinear
from carpool.engine.models.surgery.residual_norm import ResidualNorm
from carpool.engine.models.surgery.rms_norm import RMSNorm, fused_norm
from carpool.engine.packing import pack_ids
from carpool.kernels import native, native_linear
from emu.backend import Emulated
from zoo import stock

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(),  # type: ignore[no-untyped-call]
    reason="no oneDNN in this torch",
)
needs_bfloat16 = pytest.mark.skipif(native.level < 3, reason="no AVX-512 BF16 here, or not built")
MAPS = Path("/proc/self/maps")
BATCH = pack_ids([[5, 6, 7], [8], list(range(10, 40))], torch.device("cpu"))
POST_NORM = ("bert", "xlmr", "roberta")
_BERT = {"joint_linear": 2, "linear_gelu": 2, "linear": 6}
_LLAMA = {"rms_norm": 5, "rotary": 2, "gated_mlp": 2, "joint_linear": 2, "linear": 8}
# No encoder: heads of 8 are not attended natively.
NONE = {**dict.fromkeys(KINDS, 0), "encoder_layer": 0, "encoder": 0, "embedding_rows": 0}
SWAPS = {
    "bert": _BERT,
    "xlmr": {**_BERT, "last_layer": 3},
    "roberta": {**_BERT, "last_layer": 3},
    "qwen2": {**_LLAMA, "last_layer": 2},
    "qwen3": {**_LLAMA, "rms_norm": 9, "last_layer": 2},
    "mistral": _LLAMA,
    "modernbert": {"rotary": 4, "gated_mlp": 4, "linear": 16},
    "gemma2": {**_LLAMA, "rms_norm": 9},
}


def swaps(family: str, dtype: str = "float32") -> dict[str, int]:
    """What is to be swapped on a CPU: linear layers run natively where it has the instructions."""
    summed = native.level >= 1 and family in (*POST_NORM, "modernbert")
    found = {**NONE, **SWAPS[family], "embedding_rows": int(summed)}
    if native.level < (1 if dtype == "float32" else 3):
        return found
    ends = {"residual_norm": 4, "encoder_layer": 2} if family in POST_NORM else {}
    return {**found, **ends, "native_linear": found["linear"], "linear": 0}


def hidden(parts: Parts) -> Tensor:
    with torch.inference_mode():
        return parts.runners[0]._backbone.forward(BATCH).float()


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def modules(parts: Parts) -> Sequence[nn.Module]:
    return list(parts.runners[0]._backbone.module.modules())


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_models_results_survive(family: str, checkpoint: Callable[[str], Path]) -> None:
    whole, patient = built(checkpoint(family), surgery=False), built(checkpoint(family))
    assert whole.model.surgery == {}
    assert not any(type(module).__module__.startswith(surgery.__name__) for module in modules(whole))
    assert patient.model.surgery == swaps(family)
    assert not any(type(module) is nn.Linear for module in modules(patient))
    assert patient.model.parameters == whole.model.parameters
    assert apart(hidden(patient), hidden(whole)) <= 2e-6


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_in_bfloat16_it_is_as_exact_as_before(family: str, checkpoint: Callable[[str], Path]) -> None:
    exact = hidden(built(checkpoint(family), surgery=False))
    before = apart(hidden(built(checkpoint(family), surgery=False, dtype="bfloat16")), exact)
    after = apart(hidden(built(checkpoint(family), dtype="bfloat16")), exact)
    assert 1e-3 < after <= 2 * before


@needs_bfloat16
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_in_bfloat16_linear_layers_run_natively(family: str, checkpoint: Callable[[str], Path]) -> None:
    patient = built(checkpoint(family), dtype="bfloat16")
    assert patient.model.surgery == swaps(family, "bfloat16")
    assert patient.model.surgery["native_linear"]
    assert not any(type(module) in (nn.Linear, PackedLinear) for module in modules(patient))


@needs_bfloat16
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_without_native_kernels_it_is_as_exact_too(
    family: str, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = hidden(built(checkpoint(family), surgery=False))
    natively = apart(hidden(built(checkpoint(family), dtype="bfloat16")), exact)
    monkeypatch.setattr(native, "library", None)
    monkeypatch.setattr(native, "level", 0)
    patient = built(checkpoint(family), dtype="bfloat16")
    assert patient.model.surgery == {**NONE, **SWAPS[family]}
    assert natively <= 1.3 * apart(hidden(patient), exact)
    assert apart(hidden(built(checkpoint(family))), exact) <= 2e-6


# What is swapped besides where kernels run, and the kernels that then do.
_SUMMED: tuple[dict[str, int], set[str]] = {"residual_norm": 4, "encoder_layer": 2}, {"norm_rows"}
_TURNED: tuple[dict[str, int], set[str]] = {}, {"rotary", "gated"}
ON_DEVICE = dict.fromkeys(tiny.FAMILIES, _TURNED) | dict.fromkeys(POST_NORM, _SUMMED)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_models_results_survive_on_a_device(
    family: str, checkpoint: Callable[[str], Path], emulated: Emulated
) -> None:
    whole = hidden(built(checkpoint(family), surgery=False))
    assert not emulated.ran & {"norm_rows", "rotary", "gated"}
    patient = built(checkpoint(family))
    more, kernels = ON_DEVICE[family]
    assert patient.model.surgery == {**NONE, **SWAPS[family], **more}
    emulated.ran.clear()
    assert apart(hidden(patient), whole) <= 2e-6
    assert emulated.ran & {"norm_rows", "rotary", "gated"} == kernels


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_on_a_device_in_bfloat16_it_is_as_exact_as_before(
    family: str, checkpoint: Callable[[str], Path], emulated: Emulated
) -> None:
    exact = hidden(built(checkpoint(family), surgery=False))
    before = apart(hidden(built(checkpoint(family), surgery=False, dtype="bfloat16")), exact)
    emulated.ran.clear()
    after = apart(hidden(built(checkpoint(family), dtype="bfloat16")), exact)
    assert 1e-3 < after <= 2 * before
    assert ("norm_rows" in emulated.ran) == (family in (*POST_NORM, "gemma2"))


def test_on_a_device_a_gate_and_up_that_were_one_already_are_found(
    tmp_path: Path, emulated: Emulated
) -> None:
    """Phi-3: one weight for query, key and value, one for gate and up."""
    member = next(member for member in stock.MEMBERS if "Phi-3" in member.name)
    member.make(tmp_path)
    patient = built(tmp_path)
    assert (patient.model.surgery["gated_mlp"], patient.model.surgery["rotary"]) == (2, 2)
    assert apart(hidden(patient), hidden(built(tmp_path, surgery=False))) <= 2e-6
    assert {"rotary", "gated"} <= emulated.ran


def test_residuals_are_summed_by_a_kernel_only_where_there_is_one(
    checkpoint: Callable[[str], Path], emulated: Emulated, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin takes more passes than torch's own functions do."""
    assert any(isinstance(module, ResidualNorm) for module in modules(built(checkpoint("bert"))))
    monkeypatch.undo()
    monkeypatch.setattr(native, "library", None)
    monkeypatch.setattr(native, "level", 0)
    assert not any(isinstance(module, ResidualNorm) for module in modules(built(checkpoint("bert"))))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["bert", "qwen3", "modernbert"])
def test_replicas_run_side_by_side_over_one_set_of_weights(
    family: str, dtype: str, checkpoint: Callable[[str], Path]
) -> None:
    parts = built(checkpoint(family), cpu_workers=4, dtype=dtype)
    backbones = [runner._backbone for runner in parts.runners]
    weights = [[id(weight) for weight in one.module.parameters()] for one in backbones]
    assert all(own == weights[0] for own in weights)
    generator = torch.Generator().manual_seed(5)
    batches = [
        pack_ids(torch.randint(5, 60, (3, 20), generator=generator).tolist(), torch.device("cpu"))
        for _ in backbones
    ]

    def run(place: int) -> list[Tensor]:
        torch.set_num_threads(1)
        with torch.inference_mode():
            return [backbones[place].forward(batches[place]) for _ in range(20)]

    with ThreadPoolExecutor(len(backbones)) as pool:
        for place, rounds in enumerate(pool.map(run, range(len(backbones)))):
            with torch.inference_mode():
                expected = backbones[0].forward(batches[place])
            assert all(apart(each, expected) <= 1e-6 for each in rounds)


@pytest.mark.parametrize(("family", "layers"), [("bert", 2), ("qwen3", 2), ("modernbert", 4)])
def test_no_weight_is_held_twice(
    family: str, layers: int, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a layer's weights are joined, those that were joined before are gone already."""
    parts = built(checkpoint(family), surgery=False)
    backbone = parts.runners[0]._backbone
    matrices = [weakref.ref(weight) for weight in backbone.module.parameters() if weight.ndim == 2]
    size = sum(weight.numel() for weight in backbone.module.parameters())
    most = 0

    def joined(layers: Sequence[nn.Linear]) -> nn.Linear:
        nonlocal most
        linear = honest(layers)
        gc.collect()
        alive = {id(weight): weight for ref in matrices if (weight := ref()) is not None}
        alive |= {id(weight): weight for weight in backbone.module.parameters()}
        most = max(most, sum(weight.numel() for weight in alive.values()) + linear.weight.numel())
        return linear

    honest = joint_linear.joined
    monkeypatch.setattr(joint_linear, "joined", joined)
    monkeypatch.setattr(gated_mlp, "joined", joined)
    # Of layers this narrow, panels are mostly the zeros that fill them up.
    monkeypatch.setattr(native_linear, "serves", lambda _: False)
    del parts
    operate(backbone, vocab_size=60)
    gc.collect()
    tables = sum(isinstance(module, nn.Embedding) for module in backbone.module.modules())
    assert sum(ref() is not None for ref in matrices) == tables
    assert sum(weight.numel() for weight in backbone.module.parameters()) == size
    assert most <= size * (1 + 1 / layers)


@pytest.mark.skipif(not MAPS.exists(), reason="needs Linux's list of mapped files")
@pytest.mark.parametrize("how", [{}, {"dtype": "bfloat16"}, {"quantization": "int8"}])
@pytest.mark.parametrize("family", ["bert", "qwen3", "modernbert", "bert_3", "qwen2_3"])
def test_the_checkpoints_file_is_let_go(
    family: str, how: dict[str, str], fresh: Callable[[str], Path]
) -> None:
    """It would stay resident beside the weights made of it."""
    folder = fresh(family)
    parts = built(folder, **how)
    gc.collect()
    assert str(folder) not in MAPS.read_text()
    assert parts.model.surgery
    kept = built(folder, surgery=False)
    assert str(folder) in MAPS.read_text(), "this test sees nothing here"
    assert kept.model.surgery == {}


def test_layers_of_more_than_one_kind_are_where_they_belong(checkpoint: Callable[[str], Path]) -> None:
    """What is joined is packed as well."""
    patient = built(checkpoint("qwen3"))
    firsts = [module for module in modules(patient) if isinstance(module, FirstLinear)]
    assert firsts
    assert all(isinstance(first.linear, (NativeLinear, PackedLinear)) for first in firsts)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("family", "kind"), [("qwen3", "gated_mlp"), ("bert", "joint_linear")])
def test_what_is_to_be_quantised_is_not_packed(
    family: str, kind: str, dtype: str, checkpoint: Callable[[str], Path]
) -> None:
    backbone = built(checkpoint(family), surgery=False, dtype=dtype).runners[0]._backbone
    counts = operate(backbone, vocab_size=60, pack=False)
    assert (counts["linear"], counts["native_linear"], counts[kind]) == (0, 0, 2)
    packed = (PackedLinear, NativeLinear)
    assert not any(isinstance(module, packed) for module in backbone.module.modules())


# ── faults that no single swap shows ─────────────────────────────────────────────────────────────────────────


def test_a_model_that_reaches_past_its_modules_is_refused_with_a_way_out(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: the backbone, far above the attention layer, reads the weight of its key."""
    honest = Backbone.forward

    def forward(self: Backbone, batch: Any) -> Tensor:
        layer: Any = self.module.get_submodule("encoder.layer.0.attention.self.key")
        nothing: Tensor = 0 * layer.weight.float().sum()
        return honest(self, batch) + nothing

    monkeypatch.setattr(Backbone, "forward", forward)
    built(checkpoint("bert"), surgery=False)
    with pytest.raises(ConfigError, match=r"BertModel does not run as before .*weight.*--no-surgery\."):
        built(checkpoint("bert"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_swap_that_nobody_checked_is_seen_in_the_end(
    dtype: str, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: every RMSNorm becomes one of other weights."""

    def wrong(*asked: Any) -> RMSNorm | None:
        norm = honest(*asked)
        return norm and RMSNorm(norm.weight * 1.5 + 0.2, norm.eps)

    honest = fused_norm
    monkeypatch.setattr(surgery, "fused_norm", wrong)
    with pytest.raises(ConfigError, match=r"its results change by .*--no-surgery\."):
        built(checkpoint("qwen3"), dtype=dtype)
