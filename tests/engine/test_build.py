"""Build: what is resolved from the checkpoint, the machine and the user, and what is refused before anything serves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
import tiny_heads
from building import planned
from carpool.engine import build as building
from carpool.engine import cost, staging
from carpool.engine import runner as running
from carpool.engine.batch import Batch
from carpool.engine.build import Parts, build
from carpool.engine.config import EngineConfig, PoolerConfig
from carpool.engine.cores import Cores
from carpool.engine.cost import Cost
from carpool.engine.errors import ConfigError
from carpool.engine.models.backbone import Backbone
from carpool.engine.models.model import Model
from carpool.engine.packing import PackedBatch
from carpool.engine.params import PoolingParams
from carpool.engine.runner import ModelRunner
from carpool.engine.sequence import Sequence
from oracle import Oracle

TANH = "torch.nn.modules.activation.Tanh"


def made(path: Path, **options: Any) -> Parts:
    return build(EngineConfig(**{"model": str(path), "cpu_workers": 1, "dtype": "float32", **options}))


def embed(parts: Parts, text: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    (ids,) = parts.tokenizer.encode([text])
    (row,) = parts.runners[0].run(Batch((Sequence(0, 0, ids, PoolingParams()),)))
    assert isinstance(row, np.ndarray)
    return row


# ── what is resolved ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("family", "pooling"),
    [("xlmr", "cls"), ("qwen2", "last"), ("bert", "mean"), ("roberta", "cls"), ("mistral", "weighted_mean")],
)
def test_the_pooling_is_the_files_else_the_classs(
    family: str, pooling: str, parts: Callable[[str], Parts]
) -> None:
    assert parts(family).model.pooling == pooling


@pytest.mark.parametrize("family", ["xlmr", "bert", "qwen2"])
def test_the_users_pooling_wins_over_both(family: str, checkpoint: Callable[[str], Path]) -> None:
    parts = made(checkpoint(family), pooler_config=PoolerConfig(pooling_type="MEAN", use_activation=False))
    oracle = Oracle(checkpoint(family), ["mean"], normalize=False)
    assert (parts.model.pooling, parts.model.normalize) == ("mean", False)
    expected = oracle.embed(oracle.ids("the cat sat"))
    np.testing.assert_allclose(
        embed(parts, "the cat sat"), expected, rtol=0, atol=1e-5 * float(expected.abs().max())
    )


def test_a_causal_model_that_is_told_to_look_both_ways_does(checkpoint: Callable[[str], Path]) -> None:
    """As gte-Qwen2 says of itself; its pooling stays its class's."""
    parts = made(checkpoint("qwen2"), hf_overrides={"is_causal": False})
    assert parts.model.pooling == "last"
    causal = made(checkpoint("qwen2"))
    ids = parts.tokenizer.encode(["the cat sat"])[0]
    firsts = []
    for built in (parts, causal):
        for tail in ("on a mat", "in spain"):
            full = ids[:-1] + built.tokenizer.encode([tail])[0]
            (rows,) = built.runners[0].run(Batch((Sequence(0, 0, full, PoolingParams(), "token_embed"),)))
            assert isinstance(rows, np.ndarray)
            firsts.append(rows[0])
    assert not np.allclose(firsts[0], firsts[1], atol=1e-3)
    np.testing.assert_allclose(firsts[2], firsts[3], atol=1e-5)


@pytest.mark.parametrize("mode", tiny.ST_MODES)
@pytest.mark.parametrize("dialect", ["old", "new"])
def test_every_pooling_mode_computes_what_it_names(
    mode: str, dialect: str, fresh: Callable[[str], Path]
) -> None:
    folder = fresh("bert")
    tiny.sentence_transformers_files(folder, [mode], dialect=dialect, normalize=False)
    oracle = Oracle(folder, [mode], normalize=False)
    expected = oracle.embed(oracle.ids("the cat sat on a mat"))
    np.testing.assert_allclose(
        embed(made(folder), "the cat sat on a mat"), expected, rtol=0, atol=1e-5 * float(expected.abs().max())
    )


def test_several_modes_and_dense_layers_are_applied_in_order(fresh: Callable[[str], Path]) -> None:
    folder = fresh("bert")
    modes = ["mean", "cls", "max"]  # listed so on purpose: not the order of the old dialect
    dense = [(96, 20, TANH), (20, 8, "torch.nn.modules.linear.Identity")]
    tiny.sentence_transformers_files(folder, modes, dialect="new", dense=dense)
    oracle = Oracle(folder, modes, activations=[torch.tanh, lambda x: x])
    parts = made(folder)
    assert (parts.model.pooling, parts.model.embedding_size) == ("mean+cls+max", 8)
    np.testing.assert_allclose(embed(parts, "a cat"), oracle.embed(oracle.ids("a cat")), rtol=0, atol=1e-5)


def test_facts_about_the_model_are_told(checkpoint: Callable[[str], Path]) -> None:
    model = made(checkpoint("bert"), max_num_seqs=7).model
    folder = checkpoint("bert")
    assert (model.root, model.architectures, model.vocab_size) == (str(folder), ("BertModel",), 113)
    assert (model.embedding_size, model.max_model_len, model.max_num_seqs) == (32, 128, 7)
    assert (model.max_num_batched_tokens, model.dtype, model.device) == (2048, "float32", "cpu")
    weights = load_file(folder / "model.safetensors")
    assert model.parameters == sum(w.numel() for name, w in weights.items() if not name.startswith("pooler."))
    assert model.notices == ()


@pytest.mark.parametrize(
    ("instructions", "known"),
    [
        ({"query": "mine: ", "document": "", "none": None}, {"query": "mine: ", "document": ""}),
        ({}, {"query": "find: "}),
        (["query"], {"query": "find: "}),
        (None, {"query": "find: "}),
    ],
)
def test_instructions_of_the_config_win_over_the_files_prompts(
    instructions: Any, known: dict[str, str], fresh: Callable[[str], Path]
) -> None:
    path = fresh("bert")
    tiny.edit_json(path / "config_sentence_transformers.json", prompts={"query": "find: "})
    tiny.edit_json(path / "config.json", task_instructions=instructions)
    assert made(path).model.prompts == known


@pytest.mark.parametrize("tokenizer", [None, "another/one"])
def test_the_tokenizers_own_revision_is_obeyed_whosever_it_is(
    tokenizer: str | None, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, asked = checkpoint("bert"), []

    def locate(*name: str | None, what: str = "model") -> Path:
        asked.append(name)
        return folder

    monkeypatch.setattr(building, "locate", locate)
    build(EngineConfig(model="some/model", revision="a", tokenizer=tokenizer, tokenizer_revision="b"))
    assert asked == [("some/model", "a", None), (tokenizer or "some/model", "b", None)]


def test_batches_are_filled_to_what_was_measured_unless_told_otherwise(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def measured(runners: list[ModelRunner], **about: Any) -> Cost:
        asked.append(len(runners))
        return Cost(1.0, 1 / 16)  # 31 times the fixed part are 496 tokens

    monkeypatch.setattr(cost, "measured", measured)
    model = made(checkpoint("bert"), cpu_workers=3).model
    assert (model.batch_tokens, model.max_num_batched_tokens, asked) == (512, 2048, [3])
    model = made(checkpoint("bert"), max_num_batched_tokens=700).model
    assert (model.batch_tokens, model.max_num_batched_tokens, asked) == (None, 700, [3])


def test_workers_have_cores_of_their_own_where_there_are_as_many_or_it_is_asked_for(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Cores, "here", lambda: Cores(((0, 2), (1, 3))))
    folder = checkpoint("bert")
    both = made(folder, cpu_workers=None).model
    assert (both.workers, both.worker_cpus, both.notices) == (2, ((0, 2), (1, 3)), ())
    assert made(folder, cpu_workers=2, pin_workers=True).model.worker_cpus == ((0, 2), (1, 3))
    assert made(folder, cpu_workers=2, pin_workers=False).model.worker_cpus == ()
    assert made(folder, cpu_workers=1).model.worker_cpus == (), "which core is free, the system knows"
    assert made(folder, cpu_workers=1, pin_workers=True).model.worker_cpus == ((0, 2),)
    silent = made(folder, cpu_workers=3).model
    assert (silent.worker_cpus, silent.notices) == ((), ())
    crowd = made(folder, cpu_workers=3, pin_workers=True).model
    assert crowd.worker_cpus == ()
    assert "--pin-workers: there are fewer cores than workers" in crowd.notices[0]


def test_batches_of_one_prompt_are_not_measured(checkpoint: Callable[[str], Path]) -> None:
    parts = made(checkpoint("bert"), max_num_seqs=1)
    assert parts.model.batch_tokens == 2048
    assert parts.tokens_per_second is None


def found_by_measuring(found: Cost, monkeypatch: pytest.MonkeyPatch) -> list[ModelRunner]:
    """The runners of the last measurement, all of which find this from now on."""
    tried: list[ModelRunner] = []

    def measured(runners: list[ModelRunner], **about: Any) -> Cost:
        tried[:] = runners
        return found

    monkeypatch.setattr(cost, "measured", measured)
    return tried


def test_what_was_measured_serves_and_says_how_fast(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = found_by_measuring(Cost(1.0, 1 / 16), monkeypatch)  # 512 tokens in 33 s
    parts = made(checkpoint("bert"), cpu_workers=3)
    assert parts.runners == tried
    assert parts.tokens_per_second == pytest.approx(3 * 512 / 33)
    assert made(checkpoint("bert"), max_num_batched_tokens=700).tokens_per_second is None


def test_runners_are_made_anew_where_keys_and_values_are_kept(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layers are marked for it after batches were measured, and each worker has layers of its own."""
    tried = found_by_measuring(Cost(0.0, 0.0), monkeypatch)
    parts = made(checkpoint("qwen3"), cpu_workers=2)
    assert parts.cache is not None
    assert all(runner._storage is not None for runner in parts.runners)
    assert not {id(runner) for runner in parts.runners} & {id(runner) for runner in tried}
    assert parts.tokens_per_second is None, "no time went by: a rate out of that would be none"


def test_a_small_model_is_checked_on_one_thread(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several would wait for one another longer than they compute."""
    found: list[int] = []
    load = Model.load

    def watched(*about: Any) -> Model:
        found.append(torch.get_num_threads())
        return load(*about)

    monkeypatch.setattr(Model, "load", watched)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        made(checkpoint("bert"))
        assert found == [1]
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("workers", [1, 2, 3, None])
def test_a_runner_for_each_worker(workers: int | None, checkpoint: Callable[[str], Path]) -> None:
    parts = made(checkpoint("bert"), cpu_workers=workers)
    assert len(parts.runners) == parts.model.workers == (workers or Cores.here().workers)
    assert len({id(runner._backbone.module) for runner in parts.runners}) == len(parts.runners)


def test_the_tokenizer_may_come_from_elsewhere(
    checkpoint: Callable[[str], Path], fresh: Callable[[str], Path]
) -> None:
    folder = fresh("bert")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    parts = made(folder, tokenizer=str(checkpoint("bert")))
    assert parts.tokenizer.encode(["the cat"]) == made(checkpoint("bert")).tokenizer.encode(["the cat"])


@pytest.mark.parametrize(
    ("options", "length", "tokens"),
    [
        ({}, 100, 2048),  # max_seq_length of sentence-transformers
        ({"max_model_len": 30}, 30, 2048),
        ({"max_model_len": 128}, 128, 2048),  # more than it was meant for, no more than it has
        ({"max_num_batched_tokens": 100}, 100, 100),
    ],
)
def test_lengths(
    options: dict[str, Any], length: int, tokens: int, checkpoint: Callable[[str], Path]
) -> None:
    parts = made(checkpoint("roberta"), **options)
    assert (parts.model.max_model_len, parts.model.max_num_batched_tokens) == (length, tokens)
    assert parts.tokenizer._max_model_len == length


def test_a_batch_holds_at_least_one_prompt_of_any_length(fresh: Callable[[str], Path]) -> None:
    folder = fresh("qwen3")
    tiny.edit_json(folder / "config.json", max_position_embeddings=5000)
    assert made(folder).model.max_num_batched_tokens == 5000


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_auto_is_the_checkpoints_dtype_where_no_instruction_multiplies_bfloat16(
    dtype: str, fresh: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("carpool.engine.device._native_16_bit", lambda _: {"bfloat16"})
    monkeypatch.setattr("carpool.engine.device._multiplies_bfloat16", lambda _: False)
    folder = fresh("bert")
    tiny.edit_json(folder / "config.json", dtype=dtype)
    parts = made(folder, dtype="auto")
    assert parts.model.dtype == dtype
    weights = parts.runners[0]._backbone.module.parameters()
    assert {str(w.dtype) for w in weights if w.ndim > 1} == {f"torch.{dtype}"}, "biases may be wider"


def test_a_dtype_that_is_emulated_is_noticed(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("carpool.engine.device._native_16_bit", lambda _: set())
    (notice,) = made(checkpoint("bert"), dtype="bfloat16").model.notices
    assert "bfloat16" in notice


def test_code_that_is_not_run_is_noticed(fresh: Callable[[str], Path]) -> None:
    """A class of transformers' name may still be another."""
    folder = fresh("bert")
    tiny.edit_json(
        folder / "config.json",
        auto_map={"AutoConfig": "code.OwnConfig", "AutoModel": "someone/code--code.BertModel"},
    )
    (notice,) = made(folder).model.notices
    assert "someone/code--code.BertModel" in notice
    assert "BertModel computes in its place" in notice


# ── GPUs ─────────────────────────────────────────────────────────────────────────────────────────────────────

CPU = torch.device("cpu")
GPUS = (torch.device("cuda", 0), torch.device("cuda", 1))


class Replicated:
    """A runner of which copies are made, but on a GPU that is full."""

    def __init__(self, device: torch.device, full: torch.device | None = None) -> None:
        self.device, self.full = device, full

    def replica(self, device: torch.device) -> Replicated:
        if device == self.full:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return Replicated(device)

    def attempt(self, batch: Batch) -> None:
        if batch.distinct()[0].num_tokens > 9000:
            raise torch.OutOfMemoryError("CUDA out of memory")


def test_every_gpu_has_a_copy_of_the_model_and_one_worker() -> None:
    plan: Any = SimpleNamespace(device=GPUS[0], devices=GPUS)
    first: Any = Replicated(GPUS[0])
    runners: list[Any] = building._runners(plan, first, 2)
    assert runners[0] is first
    assert [runner.device for runner in runners] == list(GPUS)
    config = EngineConfig(cpu_workers=7)
    assert planned(config, *GPUS).workers == 2
    assert planned(config, CPU).workers == 7


@pytest.mark.parametrize("asked", [True, False])
def test_every_gpu_records_its_own_graphs_if_asked_to(asked: bool) -> None:
    recorded: list[tuple[int, int]] = []

    def record(vocab_size: int, max_model_len: int) -> str | None:
        recorded.append((vocab_size, max_model_len))
        return f"A model of {vocab_size} words runs without CUDA graphs." if len(recorded) > 1 else None

    plan: Any = SimpleNamespace(
        config=EngineConfig(cuda_graphs=asked), checkpoint=SimpleNamespace(vocab_size=113), max_model_len=64
    )
    runners: list[Any] = [SimpleNamespace(record=record) for _ in range(3)]
    notices = building._recorded(plan, runners)
    assert recorded == [(113, 64)] * 3 * asked
    assert list(notices) == ["A model of 113 words runs without CUDA graphs."] * asked


def test_a_model_that_cannot_be_recorded_runs_on_as_it_did(checkpoint: Callable[[str], Path]) -> None:
    parts = made(checkpoint("bert"))
    before = embed(parts, "a cat")
    notice = parts.runners[0].record(113, 100)  # on a CPU: there is nothing to record on
    assert "runs without CUDA graphs, which were asked for" in str(notice)
    np.testing.assert_array_equal(embed(parts, "a cat"), before)


def test_a_recorded_backbone_is_the_one_that_is_run(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = made(checkpoint("bert"))
    run: list[int] = []

    class Recorded(Backbone):
        def forward(self, batch: PackedBatch) -> torch.Tensor:
            run.append(batch.num_tokens)
            return super().forward(batch)

    monkeypatch.setattr(running, "graphed", lambda inner, **_: (Recorded(inner.module), None))
    assert parts.runners[0].record(113, 100) is None
    embed(parts, "a cat")
    assert run == [4]


def test_a_trial_is_of_as_many_batches_as_may_be_under_way_and_is_not_taken_apart(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging.Host, "depth", 2)
    (runner,) = made(checkpoint("bert")).runners
    batch = Batch(tuple(Sequence(0, i, [5, 6, i], PoolingParams()) for i in range(4)))
    begun: list[str] = []

    def begin(whole: Batch) -> Callable[[], list[Any]]:
        begun.append("begun")
        if len(begun) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return lambda: begun.append("landed") or []  # type: ignore[func-returns-value]

    monkeypatch.setattr(runner, "_begin", begin)
    runner.attempt(batch)
    assert begun == ["begun", "begun", "landed", "landed"]
    with pytest.raises(torch.OutOfMemoryError):
        runner.attempt(batch)
    assert len(begun) == 5, "halves are for requests"


def test_a_gpu_without_room_for_the_weights_is_named() -> None:
    plan: Any = SimpleNamespace(device=GPUS[0], devices=GPUS)
    first: Any = Replicated(GPUS[0], full=GPUS[1])
    with pytest.raises(ConfigError, match=r"weights do not fit in the memory of cuda:1"):
        building._runners(plan, first, 2)


def test_the_model_says_how_large_batches_are_that_fit(checkpoint: Callable[[str], Path]) -> None:
    info = replace(
        made(checkpoint("bert")).model, max_num_batched_tokens=16_384, notices=("another",), device="cuda:0"
    )
    runner: Any = Replicated(GPUS[0])
    fitted = building._fitted(info, GPUS[:1], [runner])
    assert fitted.max_num_batched_tokens == 8192
    assert fitted.notices == (
        "another",
        "A batch of 16384 tokens does not fit in the memory of cuda:0: 8192 are the most.",
    )
    roomy: Any = Replicated(GPUS[0])
    small = replace(info, max_num_batched_tokens=4096)
    assert building._fitted(small, GPUS[:1], [roomy]) == small


@pytest.mark.parametrize("family", [*tiny.FAMILIES, *tiny_heads.FAMILIES])
def test_what_is_tried_on_a_gpu_is_what_every_kind_of_model_can_be_asked(
    family: str, parts: Callable[[str], Parts]
) -> None:
    """The trial's batches mean nothing; no pool may fail at them, for then the server would not start."""
    built = parts(family)
    info = replace(built.model, max_num_batched_tokens=4 * built.model.max_model_len, max_num_seqs=16)
    assert building._fitted(info, (CPU,), built.runners) == info


def test_graphs_are_for_gpus(checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match="--cuda-graphs is for GPUs"):
        made(checkpoint("bert"), device="cpu", cuda_graphs=True)


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_model_len": 129}, ["129", "128"]),
        ({"max_num_batched_tokens": 99}, ["99", "100"]),
        ({"pooler_config": PoolerConfig(dimensions=16)}, ["matryoshka"]),
        ({"pooler_config": PoolerConfig(dimensions=0)}, ["matryoshka"]),
        (
            {"hf_overrides": {"matryoshka_dimensions": [8]}, "pooler_config": PoolerConfig(dimensions=9)},
            ["[8]"],
        ),
        ({"tokenizer": "./no/such/tokenizer"}, ["no/such/tokenizer"]),
    ],
)
def test_what_cannot_be_served_is_a_config_error(
    options: dict[str, Any], words: list[str], checkpoint: Callable[[str], Path]
) -> None:
    with pytest.raises(ConfigError) as refused:
        made(checkpoint("roberta"), **options)
    assert all(word in str(refused.value) for word in words)
    assert "\n" not in str(refused.value)


def test_the_default_dimensions_of_the_pooler_config_are_cut_to(checkpoint: Callable[[str], Path]) -> None:
    native = made(checkpoint("qwen3"))
    parts = made(checkpoint("qwen3"), pooler_config=PoolerConfig(dimensions=8))
    whole, cut = embed(native, "a cat"), embed(parts, "a cat")
    np.testing.assert_allclose(cut, whole[:8] / np.linalg.norm(whole[:8]), rtol=0, atol=1e-6)
    assert (native.model.default_width, parts.model.default_width) == (len(whole), 8)


def test_what_sentence_transformers_does_unasked_is_done_or_said(
    checkpoint: Callable[[str], Path], fresh: Callable[[str], Path]
) -> None:
    folder = fresh("bert")
    prompts = {"prompts": {"query": "find: "}, "default_prompt_name": "query"}
    tiny.edit_json(folder / "config_sentence_transformers.json", truncate_dim=8, **prompts)
    parts = made(folder)
    whole, cut = embed(made(checkpoint("bert")), "a cat"), embed(parts, "a cat")
    np.testing.assert_allclose(cut, whole[:8] / np.linalg.norm(whole[:8]), rtol=0, atol=1e-6)
    assert parts.model.default_width == len(cut)
    assert any("puts this model's prompt 'query' before every text" in said for said in parts.model.notices)
    assert not any("before every text" in said for said in made(checkpoint("bert")).model.notices)


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("qwen2", {"step_tag_id": 3}, "pooler config's step_tag_id decide nothing."),
        (
            "qwen2_prm",
            {"tok_pooling_type": "ALL", "step_tag_id": 3, "returned_token_ids": (1,)},
            "returned_token_ids",
        ),
        ("qwen2_prm", {"step_tag_id": 3}, ""),
        ("qwen2", {}, ""),
    ],
)
def test_what_is_said_of_steps_where_there_are_none_is_not_passed_over_silently(
    checkpoint: Callable[[str], Path], kind: str, options: dict[str, Any], said: str
) -> None:
    notices = made(checkpoint(kind), pooler_config=PoolerConfig(**options)).model.notices
    found = [sentence for sentence in notices if "pooling_type STEP" in sentence]
    assert bool(found) is bool(said)
    assert said in "".join(found)


# ── Dense layers on disk ─────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def dense_folder(fresh: Callable[[str], Path]) -> Path:
    folder = fresh("bert")
    tiny.sentence_transformers_files(folder, dense=[(32, 16, TANH)])
    return folder


@pytest.mark.parametrize("prefix", ["linear.", "dense.", ""])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_every_spelling_of_dense_weights(prefix: str, file: str, dense_folder: Path) -> None:
    expected = embed(made(dense_folder), "a cat")
    path = dense_folder / "2_Dense" / "model.safetensors"
    weights = {prefix + name.removeprefix("linear."): weight for name, weight in load_file(path).items()}
    path.unlink()
    if file == "model.safetensors":
        save_file(weights, path)
    else:
        torch.save(weights, path.with_name(file))
    np.testing.assert_array_equal(embed(made(dense_folder), "a cat"), expected)


@pytest.mark.parametrize("damage", ["no weights", "no bias", "another shape", "a pickle with code"])
def test_dense_weights_that_are_not_right_are_refused(damage: str, dense_folder: Path) -> None:
    path = dense_folder / "2_Dense" / "model.safetensors"
    weights = load_file(path)
    path.unlink()
    if damage == "no bias":
        save_file({"linear.weight": weights["linear.weight"]}, path)
    elif damage == "another shape":
        save_file({**weights, "linear.weight": weights["linear.weight"].T.contiguous()}, path)
    elif damage == "a pickle with code":
        torch.save({"linear.weight": Harmful()}, path.with_name("pytorch_model.bin"))
    with pytest.raises(ConfigError, match="2_Dense"):
        made(dense_folder)


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("code from a checkpoint was run",)


@pytest.mark.parametrize(
    "activation", ["os.system", "torch.nn.modules.activation.NoSuch", "torch.nn.modules.linear.Linear",
                   "Tanh", "torch.nn.modules.activation.F", "torch.nn.modules.activation.warnings"]
)  # fmt: skip
def test_an_activation_that_is_none_is_refused(activation: str, dense_folder: Path) -> None:
    tiny.edit_json(dense_folder / "2_Dense" / "config.json", activation_function=activation)
    with pytest.raises(ConfigError, match="Activation"):
        made(dense_folder)


def test_a_dense_layer_that_does_not_fit_the_pooled_width_is_refused(fresh: Callable[[str], Path]) -> None:
    folder = fresh("bert")
    tiny.sentence_transformers_files(folder, ["mean", "cls"], dense=[(32, 16, TANH)])
    with pytest.raises(ConfigError, match=r"2_Dense takes .*32.*64"):
        made(folder)
