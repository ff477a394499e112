"""Contestants: embedding engines, each in a process of its own, so that no thread pool or setting leaks.

The parent holds a `Contestant` for each and lets one work at a time; the others sleep on their pipe. The child is
this same file run as a script, by the Python of whichever environment the engine is installed in: it may import the
standard library, numpy and that engine, nothing else. What they say to each other, in lines of JSON:

    child   {"absent": why} and the end, or {"versions": {…}}    when the model is loaded
    parent  {"texts": […]}                                       the texts from now on
    child   {"vectors": base64 of float32 [B, D], "width": D}    which was the warm-up, too
    parent  {}                                                   as often as it likes: embed the texts again
    child   {"seconds": …, "cpu_seconds": …, "others_cpu_seconds": …}
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]
Embed = Callable[[list[str]], Any]
LEAVE_SECONDS = 10.0

_REPORTED = (  # modules whose version matters
    *("carpool", "torch", "transformers", "sentence_transformers"),
    *("optimum.intel", "openvino", "onnxruntime", "infinity_emb"),
)
_THREAD_SETTINGS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS", "TOKENIZERS_PARALLELISM")


@dataclass(frozen=True, slots=True)
class Entry:
    """Who takes part. `kind` is a key of LOADERS; `batch_size` is for engines that must be told."""

    kind: str
    dtype: str
    batch_size: int | None = None

    @classmethod
    def parse(cls, text: str) -> Entry:
        """From KIND:DTYPE or KIND:DTYPE:BATCH_SIZE. Raises ValueError."""
        kind, dtype, *batch_size = text.split(":")
        if kind not in LOADERS:
            raise ValueError(f"no contestant {kind!r}; there are {', '.join(LOADERS)}")
        return cls(kind, dtype, *map(int, batch_size))

    def __str__(self) -> str:
        return f"{self.kind} {self.dtype}" + (f", batches of {self.batch_size}" if self.batch_size else "")


@dataclass(frozen=True, slots=True)
class Turn:
    """One pass over all texts."""

    seconds: float
    cpu_seconds: float  # of all threads of the contestant
    others_cpu_seconds: float  # of everyone else on the machine meanwhile, its host included


class Contestant:
    """The parent's end. Idle unless inside `embed` or `turn`."""

    def __init__(self, entry: Entry, model: str, threads: int, python: str = sys.executable) -> None:
        """Starts the process and waits until its model is loaded; `absent` says why there is none."""
        self.entry = entry
        job = {
            "kind": entry.kind,
            "dtype": entry.dtype,
            "batch_size": entry.batch_size,
            "model": model,
            "threads": threads,
        }
        environment = {name: value for name, value in os.environ.items() if name not in _THREAD_SETTINGS}
        self._process = subprocess.Popen(
            [python, "-P", __file__, json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**environment, "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"},
        )
        hello = self._hear()
        self.absent: str | None = hello.get("absent")
        self.versions: Mapping[str, str] = hello.get("versions", {})

    def embed(self, texts: list[str]) -> Vectors:
        """[B, D], and the texts are kept for `turn`."""
        self._say({"texts": texts})
        answer = self._hear()
        flat = np.frombuffer(base64.b64decode(answer["vectors"]), np.float32)
        return flat.reshape(len(texts), answer["width"])

    def turn(self) -> Turn:
        """One timed pass; the clock is the child's, so the pipe costs nothing."""
        self._say({})
        return Turn(**self._hear())

    def close(self) -> None:
        """End the process: it leaves when its pipe closes, unless a thread of its engine does not let it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(LEAVE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _say(self, message: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.entry} ended with status {self._process.wait()}; its reason is above")
        message: dict[str, Any] = json.loads(line)
        return message


# ── the child's side ─────────────────────────────────────────────────────────────────────────────────────────


def _carpool(model: str, dtype: str, batch_size: int | None, threads: int) -> Embed:
    """It chooses its batches itself, unless it is told the most tokens in one, and has a worker a core by default."""
    from carpool import LLM

    kind: dict[str, Any] = (
        {"dtype": "bfloat16", "quantization": "int8"} if dtype == "int8" else {"dtype": dtype}
    )
    if batch_size:
        kind["max_num_batched_tokens"] = batch_size
    llm = LLM(model, cpu_workers=threads, **kind)
    return lambda texts: [output.outputs.embedding for output in llm.embed(texts, use_tqdm=False)]


def _sentence_transformers(model: str, dtype: str, batch_size: int | None, threads: int) -> Embed:
    """It sorts texts by length itself before it cuts them into padded batches."""
    import torch
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(threads)
    encoder = SentenceTransformer(model, device="cpu", model_kwargs={"dtype": getattr(torch, dtype)})
    return lambda texts: encoder.encode(texts, batch_size=batch_size or 32, show_progress_bar=False)


def _openvino(model: str, dtype: str, batch_size: int | None, threads: int) -> Embed:
    """sentence-transformers, with the model exported to OpenVINO when it is loaded."""
    import_module("optimum.intel")  # where it is missing, sentence-transformers raises something else
    from sentence_transformers import SentenceTransformer

    precision = {"bfloat16": "bf16", "float32": "f32"}[dtype]
    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": str(threads)}
    encoder = SentenceTransformer(
        model, device="cpu", backend="openvino", model_kwargs={"export": True, "ov_config": settings}
    )
    return lambda texts: encoder.encode(texts, batch_size=batch_size or 32, show_progress_bar=False)


def _onnx(model: str, dtype: str, batch_size: int | None, threads: int) -> Embed:
    """sentence-transformers, with the model exported to ONNX when it is loaded: float32."""
    import onnxruntime
    from sentence_transformers import SentenceTransformer

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    asked = {"export": True, "provider": "CPUExecutionProvider", "session_options": options}
    encoder = SentenceTransformer(model, device="cpu", backend="onnx", model_kwargs=asked)
    return lambda texts: encoder.encode(texts, batch_size=batch_size or 32, show_progress_bar=False)


def _infinity(model: str, dtype: str, batch_size: int | None, threads: int) -> Embed:
    """Its engine without HTTP, by its face for scripts; it sorts and batches by itself."""
    import torch
    from infinity_emb import EngineArgs, SyncEngineArray

    torch.set_num_threads(threads)
    arguments = EngineArgs(
        model_name_or_path=model,
        engine="torch",
        device="cpu",
        dtype=dtype,
        batch_size=batch_size or 32,
        model_warmup=False,  # all texts are embedded once before anything is timed
    )
    engines = SyncEngineArray.from_args([arguments])
    return lambda texts: engines.embed(model=model, sentences=texts).result()[0]


LOADERS: Mapping[str, Callable[[str, str, int | None, int], Embed]] = {
    "carpool": _carpool,
    "sentence-transformers": _sentence_transformers,
    "sentence-transformers-openvino": _openvino,
    "sentence-transformers-onnx": _onnx,
    "infinity-emb": _infinity,
}


def _work(job: Mapping[str, Any], orders: TextIO, answers: TextIO) -> None:
    def answer(message: Mapping[str, Any]) -> None:
        print(json.dumps(message), file=answers, flush=True)

    try:
        embed = LOADERS[job["kind"]](job["model"], job["dtype"], job["batch_size"], job["threads"])
    except ModuleNotFoundError as error:
        answer({"absent": str(error)})
        return
    loaded = [name for name in _REPORTED if name in sys.modules]
    answer({"versions": {name: getattr(sys.modules[name], "__version__", "?") for name in loaded}})
    texts: list[str] = []
    for order in orders:
        if given := json.loads(order):
            texts = given["texts"]
            vectors = np.asarray(embed(texts), np.float32)
            answer({"vectors": base64.b64encode(vectors.tobytes()).decode(), "width": vectors.shape[1]})
        else:
            answer(asdict(_timed(embed, texts)))


def _timed(embed: Embed, texts: list[str]) -> Turn:
    machine, cpu, began = machine_cpu_seconds(), time.process_time(), time.perf_counter()
    embed(texts)
    seconds, own = time.perf_counter() - began, time.process_time() - cpu
    return Turn(seconds, own, max(0.0, machine_cpu_seconds() - machine - own))


def machine_cpu_seconds() -> float:
    """Of all cores since the machine started: work of every process, and time that its host kept for itself."""
    user, nice, system, _idle, _iowait, *rest = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    return sum(map(int, (user, nice, system, *rest))) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    # Libraries print; the pipe to the parent is moved where they cannot reach it.
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        _work(json.loads(sys.argv[1]), sys.stdin, answers)


if __name__ == "__main__":
    main()
