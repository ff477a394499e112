"""LLM, the engine for scripts: the reference's examples as printed there, and what scripts do besides."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import carpool
import tiny
from carpool.engine.errors import ConfigError, InputTooLong, InvalidInput, InvalidParameter, UnsupportedTask
from carpool.engine.llm import LLM
from carpool.engine.params import PoolingParams
from carpool.engine.prompts import Prompt

TEXTS = ["the cat sat on a mat", "a", "rain in spain"]


@pytest.fixture(scope="module")
def llm(checkpoint: Callable[[str], Path]) -> Iterator[LLM]:
    made = LLM(str(checkpoint("qwen3")), dtype="float32", cpu_workers=1)
    yield made
    made.close()


def vectors(outputs: Any) -> torch.Tensor:
    return torch.tensor([output.outputs.embedding for output in outputs])


# ── the reference's pages ────────────────────────────────────────────────────────────────────────────────────


def test_embed_as_the_reference_prints_it(checkpoint: Callable[[str], Path]) -> None:
    llm = carpool.LLM(model=str(checkpoint("bert")), runner="pooling")
    (output,) = llm.embed("Hello, my name is")
    embeds = output.outputs.embedding
    assert f"Embeddings: {embeds!r} (size={len(embeds)})".endswith("(size=32)")
    assert torch.tensor(embeds).norm().item() == pytest.approx(1, abs=1e-5)
    (encoded,) = llm.encode("Hello, my name is", pooling_task="embed")
    data = encoded.outputs.data
    assert f"Data: {data!r}".startswith("Data: tensor(")
    llm.close()


def test_embed_as_the_older_page_prints_it(checkpoint: Callable[[str], Path]) -> None:
    llm = LLM(model=str(checkpoint("mistral")), task="embed")
    (output,) = llm.embed("Hello, my name is")
    (same,) = llm.encode("Hello, my name is")
    assert same.outputs.data.tolist() == output.outputs.embedding
    llm.close()


def test_matryoshka_as_the_reference_prints_it(checkpoint: Callable[[str], Path]) -> None:
    llm = LLM(model=str(checkpoint("qwen3")), runner="pooling", trust_remote_code=True)
    outputs = llm.embed(["Follow the white rabbit."], pooling_params=PoolingParams(dimensions=8))
    assert repr(outputs[0].outputs) == "EmbeddingOutput(hidden_size=8)"
    llm.close()


def test_a_model_that_looks_for_its_last_word_that_is_no_pad_starts(tmp_path: Path) -> None:
    """mBART's does, of the prompts of a warm-up as well."""
    config = transformers.MBartConfig(
        vocab_size=400, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=256,
        pad_token_id=1, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    model = transformers.MBartModel(config).eval()
    tiny.inflate(model)
    model.save_pretrained(tmp_path)
    tiny.save_tokenizer(
        tiny.byte_bpe(),
        tmp_path,
        pad="<|endoftext|>",
        tokenizer_class="PreTrainedTokenizerFast",
        model_max_length=256,
    )
    llm = LLM(str(tmp_path), dtype="float32", cpu_workers=1)
    ids = [5, 6, 7, 8, 2]
    (answer,) = llm.encode(
        [ids], pooling_task="token_embed", pooling_params=PoolingParams(use_activation=False)
    )
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).last_hidden_state[0]
    torch.testing.assert_close(answer.outputs.data, expected, rtol=1e-5, atol=1e-5)
    llm.close()


# ── prompts of every kind ────────────────────────────────────────────────────────────────────────────────────


def test_prompts_of_all_kinds_are_answered_in_their_order(llm: LLM) -> None:
    plain = llm.embed(TEXTS)
    ids = [output.prompt_token_ids for output in plain]
    prompts: list[Prompt] = [ids[0], TEXTS[1], {"prompt": TEXTS[2]}, {"prompt_token_ids": ids[1]}, TEXTS[0]]
    mixed = llm.embed(prompts)
    torch.testing.assert_close(vectors(mixed), vectors(plain)[[0, 1, 2, 1, 0]], rtol=0, atol=1e-5)
    assert [output.prompt_token_ids for output in mixed] == [ids[0], ids[1], ids[2], ids[1], ids[0]]
    assert len({output.request_id for output in (*plain, *mixed)}) == 8
    assert all(output.finished for output in mixed)


def test_one_prompt_needs_no_list(llm: LLM) -> None:
    (whole,) = llm.embed([TEXTS[0]])
    for single in (TEXTS[0], whole.prompt_token_ids, {"prompt": TEXTS[0]}, (TEXTS[0],)):
        torch.testing.assert_close(vectors(llm.embed(single)), vectors([whole]), rtol=0, atol=1e-5)


def test_no_prompts_give_no_answers(llm: LLM) -> None:
    assert llm.embed([]) == []


@pytest.mark.parametrize("prompt", [3.5, None, {"text": "a"}, object()])
def test_what_is_no_prompt_is_a_type_error(prompt: Any, llm: LLM) -> None:
    with pytest.raises(TypeError, match="prompt"):
        llm.embed(["a", prompt])


# ── parameters ───────────────────────────────────────────────────────────────────────────────────────────────


def test_a_list_of_params_is_taken_one_a_prompt(llm: LLM) -> None:
    params = [PoolingParams(dimensions=8), PoolingParams(), PoolingParams(use_activation=False)]
    outputs = llm.embed(TEXTS, pooling_params=params)
    whole = vectors(llm.embed(TEXTS))
    assert [output.outputs.hidden_size for output in outputs] == [8, 32, 32]
    norms = [torch.tensor(output.outputs.embedding).norm().item() for output in outputs]
    assert norms[:2] == pytest.approx([1, 1], abs=1e-5)
    assert norms[2] != pytest.approx(1, abs=1e-2)
    torch.testing.assert_close(torch.tensor(outputs[1].outputs.embedding), whole[1], rtol=0, atol=1e-5)


def test_an_error_names_the_prompt_as_the_caller_counts_them(llm: LLM) -> None:
    given: list[tuple[list[Prompt], str]] = [
        ([[5], "a", "the cat " * 200, "a"], "input[2]"),
        ([[5], {"prompt": "a", "cache_salt": "x"}, [-1], "a"], "input[2]"),
        (["the cat " * 200], "input"),
    ]
    for prompts, param in given:
        with pytest.raises(InvalidInput) as refused:
            llm.embed(prompts)
        assert refused.value.param == param


def test_prompts_that_have_little_in_common_are_run_together(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = LLM(str(checkpoint("bert")), dtype="float32", cpu_workers=1)
    waiting: list[int] = []
    run = one._engine.core.run

    async def observed(*args: Any) -> Any:
        waiting.append(one._engine.waiting_sequences)
        return await run(*args)

    monkeypatch.setattr(one._engine.core, "run", observed)
    salted = one.embed([{"prompt": "a", "cache_salt": str(i)} for i in range(5)])
    assert waiting == [0, 1, 2, 3, 4]
    assert len({tuple(output.outputs.embedding) for output in salted}) == 1
    one.close()


def test_a_script_may_queue_as_much_as_it_has(checkpoint: Callable[[str], Path]) -> None:
    for given, bound in ((None, sys.maxsize), (7, 7)):
        one = LLM(str(checkpoint("bert")), dtype="float32", cpu_workers=1, max_queued_tokens=given)
        assert one._engine.config.max_queued_tokens == bound
        one.close()


def test_a_list_of_params_of_another_length_is_refused(llm: LLM) -> None:
    with pytest.raises(ValueError, match="3 prompts but 2"):
        llm.embed(TEXTS, pooling_params=[PoolingParams()] * 2)


def test_dimensions_that_the_model_lacks_are_refused(llm: LLM) -> None:
    with pytest.raises(InvalidParameter, match=r"\[1, 32\]"):
        llm.embed("a", pooling_params=PoolingParams(dimensions=33))


def test_too_long_is_refused_unless_cut(llm: LLM) -> None:
    text = "the cat " * 200
    with pytest.raises(InputTooLong):
        llm.embed(text)
    (output,) = llm.embed(text, truncate_prompt_tokens=-1)
    assert len(output.prompt_token_ids) == 128


def test_an_error_leaves_the_next_call_alone(llm: LLM) -> None:
    before = vectors(llm.embed(TEXTS))
    with pytest.raises(InputTooLong):
        llm.embed(["a", "the cat " * 200])
    torch.testing.assert_close(vectors(llm.embed(TEXTS)), before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("task", ["token_embed", "encode"])
def test_token_tasks_give_a_row_a_token(task: str, llm: LLM) -> None:
    outputs = llm.encode(TEXTS, pooling_task=task)
    for output, whole in zip(outputs, llm.encode(TEXTS), strict=True):
        assert output.outputs.data.shape == (len(output.prompt_token_ids), 32)
        torch.testing.assert_close(output.outputs.data[-1], whole.outputs.data, rtol=0, atol=1e-5)  # LAST


def test_a_task_that_does_not_exist_names_those_that_do(llm: LLM) -> None:
    with pytest.raises(UnsupportedTask, match="embed, classify, token_embed"):
        llm.encode("a", pooling_task="poetry")


def test_text_is_not_generated_and_that_is_said(llm: LLM) -> None:
    for ask in (llm.generate, llm.chat):
        with pytest.raises(ValueError, match="generates no text"):
            ask(["a prompt"], use_tqdm=False)


def test_results_are_the_callers_own(llm: LLM) -> None:
    (output,) = llm.encode("a")
    output.outputs.data.zero_()
    assert llm.encode("a")[0].outputs.data.abs().sum() > 0


# ── options ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_model_length": 5}, "'max_model_length'.*'max_model_len'"),
        ({"zzzzzzzz": 5}, "'zzzzzzzz'"),
        ({"pooler_config": {"poolingtype": "CLS"}}, "'poolingtype'.*'pooling_type'"),
        ({"task": "generate"}, "generate"),
        ({"dtype": "int8"}, "int8"),
        ({"model": "./no/such/folder"}, "no/such/folder"),
        ({"hf_token": "secret"}, "--hf-token is not served: set HF_TOKEN"),
    ],
)
def test_an_option_that_is_not_known_names_its_neighbour(
    options: dict[str, Any], message: str, checkpoint: Callable[[str], Path]
) -> None:
    with pytest.raises(ConfigError, match=message):
        LLM(**{"model": str(checkpoint("bert")), **options})


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ({"max_model_len": "x"}, "max_model_len must be an integer, got 'x'"),
        ({"max_num_seqs": True}, "max_num_seqs must be an integer, got True"),
        ({"gpu_memory_utilization": "much"}, "gpu_memory_utilization must be a number"),
    ],
)
def test_an_option_that_is_no_number_and_should_be_one_is_named(
    option: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        LLM("no/model", **option)


@pytest.mark.parametrize("key", ["pooler_config", "override_pooler_config"])
def test_options_of_the_reference_are_taken_or_ignored(key: str, checkpoint: Callable[[str], Path]) -> None:
    ignored = {"enforce_eager": True, "gpu_memory_utilization": 0.9, "tensor_parallel_size": 1}
    options: dict[str, Any] = {**ignored, key: {"pooling_type": "CLS", "normalize": False}}
    llm = LLM(str(checkpoint("bert")), **options)
    assert (llm._engine.model.pooling, llm._engine.model.normalize) == ("cls", False)
    llm.close()


def test_none_leaves_an_option_to_its_default(checkpoint: Callable[[str], Path]) -> None:
    nothing: dict[str, Any] = {
        "seed": None,
        "hf_token": None,
        "enable_prompt_embeds": False,
        "max_model_len": -1,
    }
    llm = LLM(str(checkpoint("bert")), block_size=None, hf_overrides=None, max_num_seqs=None, **nothing)
    assert (llm._engine.config.block_size, llm.model_info.max_num_seqs) == (16, 256)
    llm.close()


# ── the prefix cache ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def caching(checkpoint: Callable[[str], Path]) -> Iterator[LLM]:
    made = LLM(str(checkpoint("qwen3")), dtype="float32", cpu_workers=1, block_size=4)
    yield made
    made.close()


def cached(outputs: Any) -> list[int]:
    return [output.num_cached_tokens for output in outputs]


def test_what_was_run_before_is_found_and_the_results_stay(caching: LLM, llm: LLM) -> None:
    first, other = list(range(1, 20)), [*range(1, 11), *range(30, 40)]
    assert cached(caching.embed(first)) == [0]
    again = caching.embed([other, first])
    assert cached(again) == [8, 16]  # full blocks of 4, and the last token is always run
    torch.testing.assert_close(vectors(again), vectors(llm.embed([other, first])), rtol=0, atol=1e-5)
    assert cached(caching.encode(first, pooling_task="token_embed")) == [0]  # every row is wanted
    assert cached(caching.encode(first, pooling_task="embed")) == [16]
    assert cached(caching.encode(first, pooling_task="embed&token_embed")) == [0]


def test_a_score_tells_what_was_found_of_both_sides(caching: LLM) -> None:
    query, documents = "the cat sat on a mat", ["the cat sat on the rain", "ice cream"]
    caching.score(query, documents)
    lengths = [len(output.prompt_token_ids) for output in caching.embed([query, *documents])]
    full = [(length - 1) // 4 * 4 for length in lengths]
    assert full[0] > 0
    assert cached(caching.score(query, documents)) == [full[0] + full[1], full[0] + full[2]]


def test_a_prompts_salt_keeps_it_apart(caching: LLM) -> None:
    ids = list(range(1, 20))
    caching.embed(ids)
    salted: list[Prompt] = [{"prompt_token_ids": ids, "cache_salt": salt} for salt in ("a", "b")]
    assert cached(caching.embed([*salted, ids])) == [0, 0, 16]
    assert cached(caching.embed(salted)) == [16, 16]
    with pytest.raises(TypeError, match="a cache_salt is a text, not int"):
        caching.embed({"prompt_token_ids": ids, "cache_salt": 5})


def test_what_was_found_of_a_texts_slices_is_found_of_the_text(checkpoint: Callable[[str], Path]) -> None:
    options: dict[str, Any] = {"max_model_len": 16, "pooler_config": {"enable_chunked_processing": True}}
    llm = LLM(str(checkpoint("qwen3")), dtype="float32", cpu_workers=1, block_size=4, **options)
    prompts = [list(range(1, 41)), list(range(50, 60))]  # slices of 16, 16 and 8 tokens; of 10
    assert cached(llm.embed(prompts)) == [0, 0]
    assert cached(llm.embed(prompts)) == [12 + 12 + 4, 8]
    llm.close()


def test_the_cache_can_be_left_out(checkpoint: Callable[[str], Path]) -> None:
    llm = LLM(
        str(checkpoint("qwen3")), dtype="float32", cpu_workers=1, block_size=4, enable_prefix_caching=False
    )
    assert not llm.model_info.prefix_caching
    for _ in range(2):
        assert cached(llm.embed(list(range(1, 20)))) == [0]
    llm.close()


# ── threads, loops, exits ────────────────────────────────────────────────────────────────────────────────────


def test_threads_may_call_at_once(llm: LLM) -> None:
    expected = vectors(llm.embed(TEXTS))
    results: list[torch.Tensor] = []
    threads = [threading.Thread(target=lambda: results.append(vectors(llm.embed(TEXTS)))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(results) == 8
    for result in results:
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


async def test_it_works_where_a_loop_runs_already(llm: LLM) -> None:
    assert len(llm.embed(TEXTS)) == 3


def test_closing_ends_its_threads_and_may_be_done_twice(checkpoint: Callable[[str], Path]) -> None:
    before = set(threading.enumerate())
    llm = LLM(str(checkpoint("bert")), cpu_workers=2)
    llm.embed("a")
    llm.close()
    llm.close()
    left = {
        thread.name for thread in set(threading.enumerate()) - before if thread.name.startswith("carpool")
    }
    assert left == set()


def test_closing_frees_the_model_and_nothing_can_be_asked_of_it_any_more(
    checkpoint: Callable[[str], Path],
) -> None:
    llm = LLM(str(checkpoint("bert")), dtype="float32", cpu_workers=1)
    llm.embed("a")
    engine = weakref.ref(llm._engine)
    llm.close()
    gc.collect()
    assert engine() is None
    for ask in (lambda: llm.embed("a"), lambda: llm.score("a", "b"), lambda: llm.model_info):
        with pytest.raises(RuntimeError, match="This LLM is closed"):
            ask()


@pytest.mark.parametrize("options", [{"dtyp": "float32"}, {"max_model_len": 10**9}])
def test_one_that_cannot_be_made_leaves_nothing_behind(
    options: dict[str, Any], checkpoint: Callable[[str], Path]
) -> None:
    before = set(threading.enumerate())
    with pytest.raises(ConfigError):
        LLM(str(checkpoint("bert")), **options)
    left = set(threading.enumerate()) - before
    for thread in left:  # what ends is not waited for
        thread.join(10)
    assert not any(thread.is_alive() for thread in left)


def test_it_may_be_collected_as_garbage_in_its_own_loops_thread(checkpoint: Callable[[str], Path]) -> None:
    """Python collects cycles in whichever thread is at it; that one must not wait for itself."""
    llm = LLM(str(checkpoint("bert")), cpu_workers=1)
    loop, engine = llm._loop, llm._engine
    cycle: list[Any] = [llm]
    cycle.append(cycle)
    del llm, cycle

    async def collect() -> None:
        gc.collect()

    asyncio.run_coroutine_threadsafe(collect(), loop._loop).result(10)
    loop._thread.join(10)
    assert not loop._thread.is_alive()
    assert engine.state == "stopped"


ENDINGS = {
    "it falls off the end": "",
    # Its own thread is told by an exception, which Python may print or not; the script must end all the same. The call
    # must not be over by then: a daemon thread that is left alone with tensors while Python ends aborts any program.
    "a call is under way": "from carpool.engine.runner import ModelRunner\nlaunch = ModelRunner.launch\n"
    "begun = threading.Event()\n"
    "ModelRunner.launch = lambda self, batch: (begun.set(), time.sleep(0.5), launch(self, batch))[2]\n"
    "texts = [f'{i} ' + 'a ' * 60 for i in range(3000)]\n"
    "threading.Thread(target=llm.embed, args=(texts,), daemon=True).start()\n"
    "assert begun.wait(50)\n",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_script_exits_in_peace_when(ending: str, checkpoint: Callable[[str], Path]) -> None:
    code = (
        "import threading, time\nfrom carpool import LLM\n"
        f"llm = LLM({str(checkpoint('bert'))!r}, cpu_workers=2)\n"
        "print(len(llm.embed('a', use_tqdm=False)[0].outputs.embedding))\n" + ENDINGS[ending]
    )
    env = {**os.environ, "PYTHONPATH": str(Path(carpool.__file__).parent.parent), "PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=env)
    assert done.stdout == "32\n"
    assert done.returncode == 0
    if ending == "it falls off the end":
        assert "Traceback" not in done.stderr
        assert "Error" not in done.stderr
