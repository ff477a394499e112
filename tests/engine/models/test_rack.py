"""Adapters that come and go while the model serves: equal to PEFT, as those that were there at start."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification

from carpool.engine.build import Parts, build
from carpool.engine.config import EngineConfig
from carpool.engine.errors import ConfigError
from carpool.engine.models.lora import adapted_layers
from carpool.engine.models.rack import Rack
from carpool.engine.params import PoolingParams
from carpool.engine.sequence import Sequence
from head_oracle import run
from tiny_adapters import with_lora, write_lora

LAYERS = {
    "qwen3": "all-linear",
    "bert": ["query", "dense"],
    "gemma2": ["embed_tokens", "o_proj"],
    "mpnet": ["q", "v"],
}
LAYERS |= {"xlmr": ["query", "word_embeddings"]}
IDS = [[5, 6, 7, 8, 9, 10], [11, 12], [13, 14, 15, 5], [6, 6, 9, 17, 20, 8, 7]]


def stock(folder: Path) -> Any:
    return AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def serve(folder: Path, **options: Any) -> Parts:
    options = {"dtype": "float32", "cpu_workers": 2, "allow_runtime_lora_updating": True, **options}
    return build(EngineConfig(model=str(folder), **options))


def rack(parts: Parts) -> Rack:
    assert parts.rack is not None
    return parts.rack


def tokens(parts: Parts, slots: list[int], worker: int = 0) -> list[Tensor]:
    """The vectors of IDS' tokens, each prompt on its slot, all in one batch."""
    raw = PoolingParams(use_activation=False)
    sequences = [
        Sequence(0, i, ids, raw, "token_embed", adapter=slot)
        for i, (ids, slot) in enumerate(zip(IDS, slots, strict=True))
    ]
    return run(replace(parts, runners=[parts.runners[worker]]), sequences)


@torch.no_grad()
def truth(model: Any, ids: list[int]) -> Tensor:
    row = torch.tensor([ids])
    return model(input_ids=row, attention_mask=torch.ones_like(row)).last_hidden_state[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", sorted(LAYERS))
def test_what_is_hung_later_equals_peft_on_every_worker_and_leaves_nothing(
    family: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    base = checkpoint(family)
    parts = serve(base)
    bare = tokens(parts, [0] * 4)
    for seed, name in enumerate("ab", start=1):
        write_lora(tmp_path / name, stock(base), seed, r=3 + seed, target_modules=LAYERS[family])
        rack(parts).hang(seed, name, str(tmp_path / name))
    slots = [1, 0, 2, 1]
    models = {slot: with_lora(stock(base), tmp_path / "ab"[slot - 1]) for slot in (1, 2)} | {0: stock(base)}
    for worker in range(2):
        for ids, slot, own in zip(IDS, slots, tokens(parts, slots, worker), strict=True):
            torch.testing.assert_close(own, truth(models[slot], ids), rtol=2e-4, atol=2e-4)
    rack(parts).drop(1)
    left = tokens(parts, [0, 0, 2, 0])
    torch.testing.assert_close(left[2], truth(models[2], IDS[2]), rtol=2e-4, atol=2e-4)
    rack(parts).drop(2)
    for before, after in zip(bare, tokens(parts, [0] * 4), strict=True):
        assert torch.equal(before, after)
    for runner in parts.runners:
        assert not any(layer.slots for layer in adapted_layers(runner._backbone.module).values())


def test_workers_share_an_adapters_weights(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    parts = serve(checkpoint("bert"))
    write_lora(tmp_path, stock(checkpoint("bert")), target_modules=["query"])
    rack(parts).hang(1, "a", str(tmp_path))
    one, other = (adapted_layers(runner._backbone.module) for runner in parts.runners)
    hung = [name for name, layer in one.items() if layer.slots]
    assert hung
    for name in hung:
        assert one[name].down["1"] is other[name].down["1"]


def test_a_file_that_is_written_anew_changes_nothing(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """Trainers write over their last checkpoint, and weights of a file are mapped."""
    base = checkpoint("bert")
    parts = serve(base, dtype="float32")
    write_lora(tmp_path, stock(base), target_modules=["query"])
    rack(parts).hang(1, "a", str(tmp_path))
    before = tokens(parts, [1] * 4)
    weights = tmp_path / "adapter_model.safetensors"
    changed = {name: torch.full_like(tensor, 3.0) for name, tensor in load_file(weights).items()}
    save_file(changed, tmp_path / "new")
    weights.write_bytes((tmp_path / "new").read_bytes())
    for own, again in zip(before, tokens(parts, [1] * 4), strict=True):
        assert torch.equal(own, again)


def test_a_classifiers_head_comes_and_goes_with_its_adapter(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    config = stock(checkpoint("bert")).config
    config.num_labels = 3
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((checkpoint("bert") / name).read_bytes())

    def whole() -> Any:
        return AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()

    write_lora(tmp_path / "a", whole(), target_modules=["query"], task_type="SEQ_CLS")
    parts = serve(folder)
    rack(parts).hang(1, "a", str(tmp_path / "a"))
    raw = PoolingParams(use_activation=False)
    adapted = with_lora(whole(), tmp_path / "a")
    row = torch.tensor([IDS[0]])
    for slot, model in ((1, adapted), (0, whole())):
        (own,) = run(parts, [Sequence(0, 0, IDS[0], raw, "classify", adapter=slot)])
        with torch.no_grad():
            torch.testing.assert_close(own, model(input_ids=row).logits[0], rtol=2e-4, atol=2e-4)
    rack(parts).drop(1)
    (own,) = run(parts, [Sequence(0, 0, IDS[0], raw, "classify")])
    with torch.no_grad():
        torch.testing.assert_close(own, whole()(input_ids=row).logits[0], rtol=2e-4, atol=2e-4)


def test_what_does_not_fit_is_refused_and_leaves_nothing(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    parts = serve(checkpoint("bert"))
    with pytest.raises(ConfigError, match="no adapter folder"):
        rack(parts).hang(1, "a", str(tmp_path / "nowhere"))
    write_lora(tmp_path / "qwen3", stock(checkpoint("qwen3")), target_modules=["q_proj"])
    with pytest.raises(ConfigError, match=r"'b' cannot be served: it targets layers\.0\.self_attn\.q_proj"):
        rack(parts).hang(2, "b", str(tmp_path / "qwen3"))
    for runner in parts.runners:
        assert not any(layer.slots for layer in adapted_layers(runner._backbone.module).values())


@pytest.mark.parametrize("factor", [float("nan"), 1e30])
def test_one_that_makes_numbers_that_are_not_finite_is_refused(
    factor: float, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    parts = serve(checkpoint("bert"))
    write_lora(tmp_path, stock(checkpoint("bert")), target_modules=["query"])
    weights = tmp_path / "adapter_model.safetensors"
    save_file({name: tensor * factor for name, tensor in load_file(weights).items()}, weights)
    with pytest.raises(ConfigError, match="with one of them its numbers are not finite"):
        rack(parts).hang(1, "a", str(tmp_path))


def test_a_layer_whose_weight_is_taken_past_it_carries_none(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: BERT's last layer multiplies by its query's weight itself."""
    from transformers.models.bert.modeling_bert import BertSelfAttention

    forward = BertSelfAttention.forward

    def nosy(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.layer_idx == 1:
            _ = self.query.weight + 0
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(BertSelfAttention, "forward", nosy)
    parts = serve(checkpoint("bert"))
    write_lora(tmp_path, stock(checkpoint("bert")), target_modules=["query"])
    with pytest.raises(
        ConfigError, match=r"layer\.1\.attention\.self\.query, which no adapter can be put on while"
    ):
        rack(parts).hang(1, "a", str(tmp_path))


def test_the_base_is_as_without_room_for_adapters(checkpoint: Callable[[str], Path]) -> None:
    with_room, without = (
        serve(checkpoint("qwen3")),
        serve(checkpoint("qwen3"), allow_runtime_lora_updating=False),
    )
    assert without.rack is None
    for own, other in zip(tokens(with_room, [0] * 4), tokens(without, [0] * 4), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)
