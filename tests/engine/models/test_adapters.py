"""Adapters on whole models: one a sequence, mixed in a batch, equal to PEFT; and what does not fit is refused."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification

import tiny
from carpool.engine.build import Parts, build
from carpool.engine.config import EngineConfig
from carpool.engine.errors import ConfigError
from carpool.engine.models import lora
from carpool.engine.models.adapters import check_adapters
from carpool.engine.models.backbone import Backbone
from carpool.engine.models.lora import Segment
from carpool.engine.models.padded import PaddedBackbone
from carpool.engine.params import PoolingParams
from carpool.engine.runner import ModelRunner
from carpool.engine.sequence import Sequence
from head_oracle import answer, close, run
from tiny_adapters import with_lora, write_lora
from zoo.measure import Prompt
from zoo.measure import run as run_prompts

LAYERS = {"qwen3": ["q_proj", "v_proj", "down_proj"], "bert": ["query", "dense"], "xlmr": ["query", "value"]}
LAYERS |= {"modernbert": ["Wqkv", "Wi"], "mpnet": ["q", "v"]}
IDS = [[5, 6, 7, 8, 9, 10], [11, 12], [13, 14, 15, 5], [6, 6, 9, 17, 20, 8, 7]]
RAW = PoolingParams(use_activation=False)


def stock(folder: Path) -> Any:
    return AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def adapted(
    checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Path, dict[str, str]]]:
    """A family's folder, and two adapters for it: name → folder."""

    def made(family: str) -> tuple[Path, dict[str, str]]:
        root, base = tmp_path_factory.mktemp("adapters"), checkpoint(family)
        for seed, name in enumerate("ab"):
            write_lora(root / name, stock(base), seed, r=4 + seed, target_modules=LAYERS[family])
        return base, {name: str(root / name) for name in "ab"}

    return made


def serve(folder: Path, modules: Any, **options: Any) -> Parts:
    return build(
        EngineConfig(
            **{"model": str(folder), "dtype": "float32", "cpu_workers": 1, "lora_modules": modules, **options}
        )
    )


def embed(parts: Parts, names: list[str | None], runner: ModelRunner | None = None) -> list[Tensor]:
    """IDS, each on the adapter of its name, in one batch."""
    prompts = [Prompt("embed", ids, adapter=name) for ids, name in zip(IDS, names, strict=True)]
    return run_prompts(parts if runner is None else replace(parts, runners=[runner]), prompts)


@torch.no_grad()
def hidden(model: Any, ids: list[int]) -> Tensor:
    row = torch.tensor([ids])
    return model(input_ids=row, attention_mask=torch.ones_like(row)).last_hidden_state[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", sorted(LAYERS))
@pytest.mark.parametrize("surgery", [True, False])
def test_mixed_in_one_batch_each_equals_peft(
    adapted: Callable[..., tuple[Path, dict[str, str]]], family: str, surgery: bool
) -> None:
    base, modules = adapted(family)
    parts = serve(base, modules, surgery=surgery)
    assert parts.model.adapters == {"a": 1, "b": 2}
    assert parts.model.lora_modules == modules
    names = ["a", None, "b", "a"]
    models = {name: with_lora(stock(base), Path(modules[name])) for name in "ab"}
    prompts = [Prompt("token_embed", ids, None, name, RAW) for ids, name in zip(IDS, names, strict=True)]
    bare = [Prompt("token_embed", ids, None, None, RAW) for ids in IDS]
    for prompt, own, plain in zip(
        prompts, run_prompts(parts, prompts), run_prompts(parts, bare), strict=True
    ):
        if parts.model.matryoshka.size == tiny.HIDDEN:  # modernbert has a dense head: of it below
            assert close(own, hidden(models.get(prompt.adapter or "") or stock(base), prompt.ids))
        assert close(own, run_prompts(parts, [prompt])[0]), "alone and in company"
        assert (prompt.adapter is None) == close(own, plain), "every adapter shows"


def test_a_padded_model_is_adapted_as_well(
    adapted: Callable[..., tuple[Path, dict[str, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """BERT, told that it cannot be packed: results are those of the packed row."""
    base, modules = adapted("bert")
    parts = serve(base, modules, surgery=False)
    packed = embed(parts, ["a", None, "b", "a"])
    runner = parts.runners[0]
    runner._backbone = PaddedBackbone(runner._backbone.module, attention="eager", pads=True)
    for own, truth in zip(embed(parts, ["a", None, "b", "a"]), packed, strict=True):
        assert close(own, truth)


def test_replicas_in_threads_agree(adapted: Callable[..., tuple[Path, dict[str, str]]]) -> None:
    """Other adapters at the same time in each, over one set of weights."""
    base, modules = adapted("qwen3")
    parts = serve(base, modules, cpu_workers=2)
    first, second = parts.runners
    assert {id(w) for w in first._backbone.module.parameters()} == {
        id(w) for w in second._backbone.module.parameters()
    }
    mixes: list[list[str | None]] = [["a", "b", None, "a"], [None, "a", "b", "b"]]
    truths = [embed(parts, mix, first) for mix in mixes]
    wrong: list[int] = []

    def work(runner: ModelRunner, mix: int) -> None:
        for _ in range(10):
            ours = embed(parts, mixes[mix], runner)
            wrong.extend(not close(own, truth) for own, truth in zip(ours, truths[mix], strict=True))

    threads = [threading.Thread(target=work, args=(runner, i)) for i, runner in enumerate((first, second))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 80
    assert not any(wrong)


def test_in_bfloat16_adapters_cost_no_more_accuracy_than_the_base(
    adapted: Callable[..., tuple[Path, dict[str, str]]],
) -> None:
    base, modules = adapted("bert")
    full, half = serve(base, modules), serve(base, modules, dtype="bfloat16")
    names: list[str | None] = ["a", "b", "a", "b"]
    for own, truth in zip(embed(half, names), embed(full, names), strict=True):
        assert float(own @ truth) > 0.999


def test_over_an_int8_base_adapters_stay_float(adapted: Callable[..., tuple[Path, dict[str, str]]]) -> None:
    base, modules = adapted("bert")
    full, small = serve(base, modules), serve(base, modules, quantization="int8")
    assert small.model.surgery["int8"]
    names: list[str | None] = ["a", "b", None, "b"]
    for own, truth in zip(embed(small, names), embed(full, names), strict=True):
        assert float(own @ truth) > 0.99


def test_words_and_token_types_of_a_replica_are_still_seen(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """Tables that a backbone looks for when it is made again may be adapted by then."""
    base = checkpoint("bert")
    tables = ["word_embeddings", "token_type_embeddings", "position_embeddings"]
    write_lora(tmp_path, stock(base), target_modules=tables)
    parts = serve(base, {"a": str(tmp_path)}, cpu_workers=2)
    sequence = Sequence(0, 0, IDS[0], PoolingParams(), "embed", type_start=3, adapter=1)
    rows = [run(replace(parts, runners=[runner]), [sequence])[0] for runner in parts.runners]
    untyped = run(parts, [Sequence(0, 0, IDS[0], PoolingParams(), "embed", adapter=1)])[0]
    assert close(rows[0], rows[1])
    assert not close(rows[0], untyped)


# ── heads ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("family", ["bert_3", "albert_3", "xlmr_cross", "qwen2_3"])
def test_each_adapter_has_its_own_head(
    checkpoint: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    """BERT's pooler, which belongs to the head, is adapted too."""
    base = checkpoint(family)

    def classifier() -> Any:
        return AutoModelForSequenceClassification.from_pretrained(
            base, dtype=torch.float32, attn_implementation="eager"
        ).eval()

    layers = ["q_proj"] if family == "qwen2_3" else ["query", "dense"]
    if family == "albert_3":  # whose pooler is a layer and no module that holds one
        layers = ["query", "pooler"]
    if family == "xlmr_cross":  # its head has a layer `dense`, which is saved whole
        layers = ["query"]
    for seed, name in enumerate("ab"):
        write_lora(tmp_path / name, classifier(), seed, target_modules=layers, task_type="SEQ_CLS")
    parts = serve(base, {name: str(tmp_path / name) for name in "ab"})
    models = {"": classifier(), **{name: with_lora(classifier(), tmp_path / name) for name in "ab"}}
    names = ["b", "", "a", "b"]
    sequences = [
        Sequence(0, i, ids, RAW, "classify", adapter=("", "a", "b").index(name))
        for i, (ids, name) in enumerate(zip(IDS, names, strict=True))
    ]
    for own, ids, name in zip(run(parts, sequences), IDS, names, strict=True):
        row = torch.tensor([ids])
        with torch.no_grad():
            logits = models[name](input_ids=row, attention_mask=torch.ones_like(row)).logits[0]
        assert close(own, logits)
    bare = answer(parts, IDS, "classify", RAW)
    assert [close(own, plain) for own, plain in zip(run(parts, sequences), bare, strict=True)] == [
        False, True, False, False,
    ]  # fmt: skip


def test_a_head_for_other_labels_is_refused(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    other = AutoModelForSequenceClassification.from_pretrained(
        checkpoint("bert_3"), num_labels=5, ignore_mismatched_sizes=True
    )
    write_lora(tmp_path, other, target_modules=["query"], task_type="SEQ_CLS")
    with pytest.raises(
        ConfigError, match=r"classifier.*of shape \[5.*and the model's of \[3.*share its labels"
    ):
        serve(checkpoint("bert_3"), {"a": str(tmp_path)})


def test_a_head_for_a_model_without_one_is_refused(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    classifier = AutoModelForSequenceClassification.from_pretrained(checkpoint("bert_3"))
    write_lora(tmp_path, classifier, target_modules=["query"], task_type="SEQ_CLS")
    with pytest.raises(ConfigError, match=r"brings classifier.*serves no head.*ForSequenceClassification"):
        serve(checkpoint("bert"), {"a": str(tmp_path)})


@pytest.mark.parametrize(
    "options", [{"modules_to_save": ["pooler"]}, {"target_modules": ["query", "pooler.dense"]}]
)
def test_an_embedders_pooler_may_be_adapted_since_nobody_reads_it(
    options: dict[str, Any], checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    base = checkpoint("bert")
    write_lora(tmp_path / "a", stock(base), **{"target_modules": ["query"], **options})
    own = embed(serve(base, {"a": str(tmp_path / "a")}), ["a"] * len(IDS))
    theirs = with_lora(stock(base), tmp_path / "a")
    for row, ids in zip(own, IDS, strict=True):
        mean = hidden(theirs, ids).mean(0)
        assert close(row, mean / mean.norm())


# ── what does not fit ────────────────────────────────────────────────────────────────────────────────────────


def test_an_adapter_of_another_model_is_refused(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    write_lora(tmp_path, stock(checkpoint("qwen3")), target_modules=["q_proj"])
    with pytest.raises(ConfigError, match=r"adapter 'a'.*targets layers\.\d\.self_attn\.q_proj.*BertModel"):
        serve(checkpoint("bert"), {"a": str(tmp_path)})


def test_an_adapter_of_other_sizes_is_refused(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    write_lora(tmp_path, stock(checkpoint("bert")), target_modules=["query"])
    path = tmp_path / "adapter_model.safetensors"
    save_file(
        {key: torch.cat([w, w], -1 if "lora_A" in key else 0) for key, w in load_file(path).items()}, path
    )
    with pytest.raises(ConfigError, match="a layer of 32 to 32 and the adapter's is of 64 to 64"):
        serve(checkpoint("bert"), {"a": str(tmp_path)})


def test_a_copy_of_the_bases_words_is_accepted_and_another_table_refused(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """PEFT saves the whole embedding along where it is adapted."""
    write_lora(tmp_path, stock(checkpoint("qwen3")), target_modules=["embed_tokens"])
    path = tmp_path / "adapter_model.safetensors"
    weights = load_file(path)
    [table] = [key for key in weights if "lora" not in key]
    serve(checkpoint("qwen3"), {"a": str(tmp_path)})
    save_file({**weights, table: weights[table] + 1}, path)
    with pytest.raises(ConfigError, match=r"brings embed_tokens\.weight"):
        serve(checkpoint("qwen3"), {"a": str(tmp_path)})


@pytest.fixture
def backbone(checkpoint: Callable[[str], Path], tmp_path: Path) -> Backbone:
    """BERT with one adapter on one kind of layer."""
    write_lora(tmp_path, stock(checkpoint("bert")), target_modules=["query"])
    return serve(checkpoint("bert"), {"a": str(tmp_path)}).runners[0]._backbone


def test_a_layer_that_is_never_run_is_refused(backbone: Backbone) -> None:
    """Planted: a model that goes past the adapted layer to what is below it."""
    layer: Any = backbone.module.get_submodule("encoder.layer.0.attention.self.query")
    base = layer.base
    layer.__class__ = type("Bypassed", (type(layer),), {"__call__": lambda self, x: base(x)})
    with pytest.raises(
        ConfigError, match=r"on encoder\.layer\.0\.attention\.self\.query: it takes that layer's"
    ):
        check_adapters(backbone, [1], vocab_size=20, max_model_len=64)


def test_adapters_that_reach_into_neighbours_are_refused(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: segments that begin one row early."""

    def shifted(slots: list[int], lengths: list[int]) -> tuple[Segment, ...]:
        return tuple(Segment(slot, max(0, start - 1), end) for slot, start, end in segments(slots, lengths))

    segments = lora.segments
    check_adapters(backbone, [1], vocab_size=20, max_model_len=64)
    monkeypatch.setattr(lora, "segments", shifted)
    with pytest.raises(ConfigError, match="change each other's results"):
        check_adapters(backbone, [1], vocab_size=20, max_model_len=64)


def test_debertas_shared_projections_are_refused(tmp_path: Path) -> None:
    """Its table of positions is made by them once, without adapters."""
    from transformers import DebertaV2Config, DebertaV2Model

    tokenizer = tiny.unigram()
    model = DebertaV2Model(
        DebertaV2Config(vocab_size=tokenizer.get_vocab_size(), hidden_size=32, intermediate_size=48,
                        num_attention_heads=4, num_hidden_layers=2, max_position_embeddings=64, relative_attention=True,
                        position_buckets=8, share_att_key=True, pos_att_type=["c2p", "p2c"], pad_token_id=1)
    )  # fmt: skip
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    tiny.save_tokenizer(
        tokenizer, folder, pad="<pad>", tokenizer_class="PreTrainedTokenizerFast", model_max_length=64
    )
    write_lora(tmp_path / "q", model, target_modules=["query_proj"])
    with pytest.raises(ConfigError, match="table of positions"):
        serve(folder, {"a": str(tmp_path / "q")})
    write_lora(tmp_path / "v", model, target_modules=["value_proj"])
    assert serve(folder, {"a": str(tmp_path / "v")}).model.adapters == {"a": 1}


def test_the_folders_are_checked_at_start(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no adapter_config\.json"):
        serve(checkpoint("bert"), {"a": str(tmp_path)})
    with pytest.raises(ConfigError, match="There is no adapter folder"):
        serve(checkpoint("bert"), {"a": str(tmp_path / "nowhere")})


def test_peft_is_no_dependency_of_ours() -> None:
    """It is the tests' oracle only."""
    from tree import MODULES, packages

    assert peft.__version__
    assert not [path for path in MODULES if "peft" in packages(path)]
