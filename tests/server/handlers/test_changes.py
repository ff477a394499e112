"""/v1/load_lora_adapter, /v1/unload_lora_adapter and /reset_prefix_cache: what the engine is told, and who may."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from carpool.engine.changes import Change, LoadAdapter, ResetCaches, UnloadAdapter
from carpool.engine.errors import UnknownAdapter
from carpool.server.config import ServerConfig
from serving import OPEN, assert_error, serving

LOAD, UNLOAD, RESET = "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/reset_prefix_cache"


@pytest.mark.parametrize(
    ("path", "body", "change", "text"),
    [
        (LOAD, {"lora_name": "a", "lora_path": "/a"}, LoadAdapter("a", "/a"), "'a' added successfully."),
        (
            LOAD,
            {"lora_name": "a", "lora_path": "/a", "load_inplace": True, "is_3d_lora_weight": False},
            LoadAdapter("a", "/a", replace=True),
            "Success: LoRA adapter 'a' added successfully.",
        ),
        (UNLOAD, {"lora_name": "a"}, UnloadAdapter("a"), "Success: LoRA adapter 'a' removed successfully."),
        (UNLOAD, {"lora_name": "a", "lora_int_id": 3}, UnloadAdapter("a"), "'a' removed successfully."),
        (RESET, None, ResetCaches(), ""),
        (f"{RESET}?reset_running_requests=true", None, ResetCaches(), ""),
    ],
)
async def test_the_engine_is_told(path: str, body: Any, change: Change, text: str) -> None:
    async with serving(OPEN) as server:
        answer = await (server.post(path, body) if body else server.ask("POST", path))
        assert (answer.status, server.engine.changes) == (200, [change])
        assert answer.body.decode().endswith(text)


@pytest.mark.parametrize(
    ("path", "body", "words", "param"),
    [
        (LOAD, {"lora_name": "a"}, "lora_path", "lora_path"),
        (
            LOAD,
            {"lora_name": "", "lora_path": "/a"},
            "Both 'lora_name' and 'lora_path' must be provided.",
            None,
        ),
        (LOAD, {"lora_name": "a\n2026 forged", "lora_path": "/a"}, "printable", "lora_name"),
        (LOAD, {"lora_name": "a\x1b[2J", "lora_path": "/a"}, "printable", "lora_name"),
        (LOAD, {"lora_name": "a" * 257, "lora_path": "/a"}, "at most 256", "lora_name"),
        (LOAD, {"lora_name": "a", "lora_path": "/a\x1b[2J"}, "printable", "lora_path"),
        (LOAD, {"lora_name": "m", "lora_path": "/a"}, "m is the model's own name.", "lora_name"),
        (
            LOAD,
            {"lora_name": "a", "lora_path": "/a", "is_3d_lora_weight": True},
            "three dim",
            "is_3d_lora_weight",
        ),
        (UNLOAD, {"lora_name": ""}, "'lora_name' needs to be provided", "lora_name"),
        (UNLOAD, {}, "lora_name", "lora_name"),
    ],
)
async def test_what_cannot_be_is_refused(path: str, body: Any, words: str, param: str | None) -> None:
    async with serving(replace(OPEN, served_model_name=("m",))) as server:
        answer = await server.post(path, body)
        assert_error(answer, 400, "BadRequestError", param)
        assert words in answer.json["message"]
        assert not server.engine.changes


async def test_an_adapter_that_is_not_there_is_not_found() -> None:
    async with serving(OPEN) as server:
        server.engine.error = UnknownAdapter("The lora adapter 'x' cannot be found.", "lora_name")
        assert_error(await server.post(UNLOAD, {"lora_name": "x"}), 404, "NotFoundError", "lora_name")


async def test_nobody_changes_anything_unless_the_operator_says_so() -> None:
    async with serving(ServerConfig()) as server:
        for path in (LOAD, UNLOAD, RESET):
            assert_error(await server.post(path, {"lora_name": "a", "lora_path": "/a"}), 404, "NotFoundError")
            assert path not in (await server.get("/openapi.json")).json["paths"]
        assert not server.engine.changes
    async with serving(OPEN) as server:
        assert {LOAD, UNLOAD, RESET} <= (await server.get("/openapi.json")).json["paths"].keys()


async def test_the_key_guards_them() -> None:
    async with serving(replace(OPEN, api_key=("k",))) as server:
        for path in (LOAD, UNLOAD, RESET):
            assert (await server.post(path, {"lora_name": "a", "lora_path": "/a"})).status == 401
        assert not server.engine.changes
