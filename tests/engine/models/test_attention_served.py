"""Whole models by each attention that a GPU would give them: as if on one, and by our kernel on the emulator.

Nothing here has run on a device: torch's varlen_attn is one made from its definition, strict in what it takes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import flash
from carpool.engine.build import Parts, build
from carpool.engine.config import EngineConfig
from carpool.engine.models.backbone import Backbone
from carpool.engine.packing import pack_ids
from carpool.kernels import launch, native, ops, varlen
from carpool.kernels.attention import Place
from emu import build as emulation
from emu.backend import Emulated
from zoo import MEMBERS

CPU = torch.device("cpu")
HOPPER = Place("cuda", (9, 0), None, None, None, "has not been tried on pages")
TURING = HOPPER._replace(capability=(7, 5))
BARE = HOPPER._replace(kernels="CuPy is not installed: pip install it")
ZOO = {
    "t5": "sentence-transformers/sentence-t5-base",
    "deberta": "microsoft/deberta-v3-base",
    "gpt_oss": "openai/gpt-oss-20b",
    "jina_bert": "jina-embeddings-v2-base-en",
    "colbert": "colbert-ir/colbertv2.0",
}


@pytest.fixture(scope="module")
def folder(
    checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in ZOO:
            return checkpoint(name)
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            next(member for member in MEMBERS if member.name == ZOO[name]).make(made[name])
        return made[name]

    return folder


@pytest.fixture(scope="module")
def on_cpu(folder: Callable[[str], Path]) -> Callable[[str, str], Parts]:
    made: dict[tuple[str, str], Parts] = {}

    def on_cpu(name: str, dtype: str) -> Parts:
        if (name, dtype) not in made:
            made[name, dtype] = built(folder(name), dtype)
        return made[name, dtype]

    return on_cpu


@pytest.fixture
def placed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Place], None]:
    """From here on, what is run is run as if there."""

    def placed(place: Place) -> None:
        monkeypatch.setattr(ops, "place", lambda _: place)
        monkeypatch.setattr(varlen, "implementation", lambda: flash.varlen_attn)

    return placed


def built(folder: Path, dtype: str) -> Parts:
    return build(EngineConfig(model=str(folder), dtype=dtype, cpu_workers=1, surgery=False))  # type: ignore[arg-type]


def backbone_of(parts: Parts) -> Backbone:
    return parts.runners[0]._backbone


def hidden(backbone: Backbone, unseen: tuple[int | None, ...] = ()) -> Tensor:
    """float32 [T, H] for four texts, some longer than any window."""
    generator = torch.Generator().manual_seed(5)
    ids = [torch.randint(5, 60, (length,), generator=generator).tolist() for length in (3, 21, 1, 21)]
    with torch.inference_mode():
        return backbone.forward(pack_ids(ids, CPU, unseen=unseen)).float()


def by_twin(backbone: Backbone, unseen: tuple[int | None, ...] = ()) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "library", None)
        return hidden(backbone, unseen)


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


# ── as if on a GPU ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "place", "attention"),
    [
        ("bert", HOPPER, "varlen_attn (2 layers)"),
        ("xlmr", HOPPER, "varlen_attn (2 layers)"),
        ("qwen3", HOPPER, "varlen_attn (2 layers)"),
        ("mistral", HOPPER, "varlen_attn (2 layers)"),
        ("modernbert", HOPPER, "varlen_attn (4 layers)"),
        ("mpnet", HOPPER, "cupy: bias (2 layers)"),
        ("t5", HOPPER, "cupy: bias (3 layers)"),
        ("jina_bert", HOPPER, "cupy: bias (2 layers)"),
        ("gemma2", HOPPER, "cupy: soft cap (2 layers)"),
        ("gpt_oss", HOPPER, "cupy: sinks (3 layers)"),
        ("deberta", HOPPER, "torch: disentangled (3 layers)"),
        ("bert", TURING, "cupy: compute capability 7.5 (2 layers)"),
        ("gemma2", BARE, "sdpa: soft cap (2 layers)"),
    ],
)
def test_a_model_says_what_serves_it_and_gives_what_it_gives_on_a_cpu(
    name: str,
    place: Place,
    attention: str,
    folder: Callable[[str], Path],
    on_cpu: Callable[[str, str], Parts],
    placed: Callable[[Place], None],
) -> None:
    expected = by_twin(backbone_of(on_cpu(name, "bfloat16")))
    placed(place)
    parts = built(folder(name), "bfloat16")
    assert parts.model.attention == attention
    last_resorts = [notice for notice in parts.model.notices if "runs in torch" in notice]
    assert len(last_resorts) == attention.startswith("sdpa")
    assert apart(hidden(backbone_of(parts)), expected) <= 1e-2


def test_a_last_resort_names_what_is_missing_and_what_to_do(
    folder: Callable[[str], Path], placed: Callable[[Place], None]
) -> None:
    placed(BARE)
    model = built(folder("gemma2"), "bfloat16").model
    (notice,) = [each for each in model.notices if "CuPy" in each]
    assert notice == (
        "Attention (soft cap) runs in torch, text by text, which is slow: CuPy is not installed: pip install it."
    )
    assert not model.chunked_prefill, "nothing would look back at what is kept without waiting"


@pytest.mark.parametrize("name", ["qwen3", "modernbert"])
def test_a_wrong_window_or_direction_would_show(
    name: str,
    on_cpu: Callable[[str, str], Parts],
    placed: Callable[[Place], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Planted: all layers look at everything."""
    backbone = backbone_of(on_cpu(name, "bfloat16"))
    expected = by_twin(backbone)
    placed(HOPPER)

    def everything(*args: Tensor, window_size: object, **how: object) -> Tensor:
        return flash.varlen_attn(*args, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(varlen, "implementation", lambda: everything)
    assert apart(hidden(backbone), expected) > 3e-2


@pytest.mark.parametrize("name", ["bert", "gemma2", "mpnet", "colbert"])
def test_no_layer_meets_its_choice_while_serving(
    name: str, folder: Callable[[str], Path], placed: Callable[[Place], None]
) -> None:
    placed(HOPPER._replace(pages=name))  # a place that no other test has been to
    parts = built(folder(name), "bfloat16")
    met = ops._choose.cache_info().misses
    hidden(backbone_of(parts))
    if parts.tokenizer.expands_unseen:
        hidden(backbone_of(parts), (2, None, None, 7))
    assert ops._choose.cache_info().misses == met


def test_expanded_queries_say_what_serves_them(
    folder: Callable[[str], Path], placed: Callable[[Place], None]
) -> None:
    placed(HOPPER)
    parts = built(folder("colbert"), "bfloat16")
    assert parts.tokenizer.expands_unseen
    layers = len(list(backbone_of(parts).module.encoder.layer))  # type: ignore[arg-type,union-attr]
    assert parts.model.attention == f"varlen_attn ({layers} layers), cupy: unseen tokens ({layers} layers)"


# ── by our kernel, emulated ──────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def by_kernel(emulator: Emulated) -> Callable[..., Tensor]:
    if emulation.MISSING:
        pytest.skip(emulation.MISSING)

    def by_kernel(backbone: Backbone, unseen: tuple[int | None, ...] = ()) -> Tensor:
        emulator.ran.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launch, "backend", emulator)
            out = hidden(backbone, unseen)
        assert emulator.ran == {"attention"}
        return out

    return by_kernel


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["bert", "qwen3", "modernbert", "gemma2", "mpnet", "t5", "gpt_oss"])
def test_the_kernel_gives_what_the_twin_gives(
    name: str, dtype: str, on_cpu: Callable[[str, str], Parts], by_kernel: Callable[..., Tensor]
) -> None:
    backbone = backbone_of(on_cpu(name, dtype))
    bound = 1e-5 if dtype == "float32" else 1e-2
    assert apart(by_kernel(backbone), by_twin(backbone)) <= bound


def test_the_kernel_leaves_out_what_is_not_to_be_looked_at(
    on_cpu: Callable[[str, str], Parts], by_kernel: Callable[..., Tensor]
) -> None:
    backbone, unseen = backbone_of(on_cpu("bert", "float32")), (2, None, None, 7)
    expected = by_twin(backbone, unseen)
    assert apart(by_kernel(backbone, unseen), expected) <= 1e-5
    assert apart(by_twin(backbone), expected) > 1e-2
