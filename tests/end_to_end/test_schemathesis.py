"""The server held to its word: schemathesis makes requests out of /openapi.json, and the answers have to fit it.

Each test takes a copy of the document that is truer than the published one in its direction. `narrowed` knows what no
schema of ours can (the model's name, its vocabulary, its widths), so that most requests get through to the model.
`widened` spells out the lax rules, which the published one keeps to itself: what does not even fit that is refused.

For longer than the usual seconds: CARPOOL_TEST_EXAMPLES=500 ./dev test tests/end_to_end/test_schemathesis.py
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import schemathesis
import structlog
import torch
from aiohttp import web
from hypothesis import HealthCheck, settings
from schemathesis.checks import CheckContext
from schemathesis.specs.openapi.checks import ignored_auth

import tiny
import tiny_heads
from carpool.engine.async_engine import AsyncEngine
from carpool.engine.config import EngineConfig
from carpool.engine.loop_thread import LoopThread
from carpool.server.app import ROUTES, make_app
from carpool.server.config import ServerConfig
from carpool.server.http import Runner
from carpool.server.openapi import describe

EXAMPLES = int(os.environ.get("CARPOOL_TEST_EXAMPLES", "5"))
KEY = "secret"
NAME = "org/served"
VOCABULARY = tiny.wordpiece().get_vocab_size()
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }} {% endfor %}"
TO_CLASSIFIERS = ("/classify", "/predict", "/score", "/rerank")

Schema = dict[str, Any]
Servers = tuple[str, str]
# Aliases are described alike (test_openapi.py sees to it), so one of them speaks for all. What a flag opens is left
# out: names of adapters that are made up would be looked for on the hub.
DOCUMENT: Schema = json.loads(
    describe(tuple({r.handler: r for r in reversed(ROUTES) if not r.needs}.values()), True, "", "flat")
)

# ── two servers ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """The URLs of a server that embeds, and of one that classifies, and so scores, with a key before both."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    loop = LoopThread("servers")
    runners, urls = [], []
    for make in (_embedder, tiny_heads.bert_cross):
        folder = tmp_path_factory.mktemp("model")
        make(folder)
        tiny.edit_json(folder / "tokenizer_config.json", chat_template=TEMPLATE)
        runner, url = loop.run(_start(folder))
        runners.append(runner)
        urls.append(url)
    yield (urls[0], urls[1])
    for runner in runners:
        loop.run(runner.cleanup())
    loop.close()
    structlog.reset_defaults()


def _embedder(folder: Path) -> None:
    """With the heads of BGE-M3 beside it, so that it has vectors of every kind."""
    tiny.bert(folder)
    tiny.edit_json(folder / "config.json", matryoshka_dimensions=[8, 16])
    for name, width in (("colbert", tiny.HIDDEN), ("sparse", 1)):
        layer = torch.nn.Linear(tiny.HIDDEN, width)
        torch.save(layer.state_dict(), folder / f"{name}_linear.pt")


async def _start(folder: Path) -> tuple[Runner, str]:
    config = ServerConfig(
        engine=EngineConfig(model=str(folder)), api_key=(KEY,), served_model_name=(NAME, "other")
    )
    engine = AsyncEngine(config.engine)
    runner = Runner(make_app(config, engine))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    await engine.start()
    return runner, f"http://127.0.0.1:{runner.addresses[0][1]}"


# ── two copies of the document ───────────────────────────────────────────────────────────────────────────────


def rewritten(value: Any, rule: Callable[[Schema], Schema]) -> Any:
    """A document with `rule` applied to each of its objects, the innermost first."""
    if isinstance(value, list):
        return [rewritten(item, rule) for item in value]
    if isinstance(value, dict):
        return rule({key: rewritten(item, rule) for key, item in value.items()})
    return value


# Fields that no schema knows all about, and what is right for these two models.
FACTS: Schema = {
    "model": {"enum": [NAME, "other", "", None]},
    "dimensions": {"enum": [8, tiny.HIDDEN, None]},
    "output_dimension": {"enum": [16, None]},
    "truncate_prompt_tokens": {"enum": [-1, 4, 128, None]},
    "max_tokens_per_query": {"enum": [0, 9, None]},
    "max_tokens_per_doc": {"enum": [0, 9, None]},
    "input_type": {"type": "null"},
    "prompt_name": {"type": "null"},
    "task": {"enum": ["embed", "token_embed", "encode", "embed&token_embed&sparse_embed", None]},
    "continue_final_message": {"enum": [False, None]},
}
# Fields that nobody reads where others say what to do: mistakes in them go unnoticed.
UNREAD = {
    "chat_template",
    "data",
    "media_io_kwargs",
    "messages",
    "items",
    "data_1",
    "data_2",
    "text_1",
    "text_2",
}


def narrowed() -> Schema:
    """Requests that these models can do something with; answers without a field that is not described."""

    def rule(schema: Schema) -> Schema:
        if schema.get("type") == "integer" and schema.get("minimum") == 0:  # of requests, only token ids are
            return {**schema, "maximum": VOCABULARY - 1}
        if schema.get("name") == "X-Request-Timeout":
            return {**schema, "schema": {"type": "number", "minimum": 10}}
        return schema

    document: Schema = rewritten(DOCUMENT, rule)
    for name, schema in document["components"]["schemas"].items():
        fields = schema["properties"]
        if name.endswith("Request"):
            fields |= {field: FACTS[field] for field in fields.keys() & FACTS.keys()}
        else:
            schema["additionalProperties"] = False
    del document["paths"]["/invocations"]  # its requests and answers are those of the others
    return document


def widened() -> Schema:
    """Requests as `lax.py` reads them, which one mistake makes wrong: the rest of each is fine with these models."""
    lax = {
        "integer": (
            {"type": "boolean"},
            {"type": "string", "pattern": r"^\s*[+-]?\d+(?:_\d+)*(?:\.0+)?\s*$"},
        ),
        "boolean": (
            {"enum": [0, 1]},
            {"type": "string", "pattern": "(?i)^(true|t|yes|y|on|1|false|f|no|n|off|0)$"},
        ),
    }

    def rule(schema: Schema) -> Schema:
        match schema:
            case {"type": ("integer" | "boolean") as kind} | {
                "type": [("integer" | "boolean") as kind, "null"]
            }:
                return {"anyOf": [schema, *lax[kind]]}
            case {"maxProperties": 0}:  # empty is empty
                return {}
        return schema

    document: Schema = rewritten(DOCUMENT, rule)
    left_out = FACTS.keys() | UNREAD
    for schema in document["components"]["schemas"].values():
        for field in schema["properties"].keys() & left_out:
            del schema["properties"][field]
        if "anyOf" in schema:
            schema["anyOf"] = [choice for choice in schema["anyOf"] if not left_out & {*choice["required"]}]
    bodies = {path: item for path, item in document["paths"].items() if "requestBody" in item.get("post", {})}
    for item in bodies.values():
        item["post"]["parameters"] = []
    document["paths"] = bodies
    return document


# ── the tests ────────────────────────────────────────────────────────────────────────────────────────────────


def of(document: Schema, mode: str) -> Any:
    config = {
        "generation": {
            "mode": mode,
            "max-examples": EXAMPLES,
            "deterministic": EXAMPLES < 100,
            "database": "none",
        },
        "checks": {"positive_data_acceptance": {"expected-statuses": ["200", "400", "404"]}},
    }
    return schemathesis.openapi.from_dict(document, config=schemathesis.Config.from_dict(config))


limits = partial(settings, deadline=None, suppress_health_check=list(HealthCheck))

# What a well-formed request may be refused for: no schema knows the model.
BEYOND_SCHEMAS = re.compile(
    "maximum context length|no tokens|lengths must be either|exceeds max_tokens|several tasks come as float or base64"
    "|max_tokens must be at least 1 and at most|The model has no prompt"
)


def no_refusal(context: CheckContext, response: Any, case: Any) -> None:
    """Well-formed requests are served, or told what about the model is in their way."""
    if response.status_code == 400:
        assert BEYOND_SCHEMAS.search(response.json()["message"]), response.text


def ask(case: Any, servers: Servers, *checks: Any) -> None:
    base = servers[case.operation.path.startswith(TO_CLASSIFIERS)]
    case.call_and_validate(
        base_url=base,
        headers={"Authorization": f"Bearer {KEY}"},
        additional_checks=list(checks),
        excluded_checks=[ignored_auth],  # two more requests for each; test_openapi.py looks at the doors
    )


@of(narrowed(), "positive").parametrize()  # type: ignore[untyped-decorator]
@limits()
def test_well_formed_requests_are_answered_as_described(case: Any, servers: Servers) -> None:
    ask(case, servers, no_refusal)


@of(widened(), "negative").parametrize()  # type: ignore[untyped-decorator]
@limits()
def test_malformed_requests_are_refused(case: Any, servers: Servers) -> None:
    ask(case, servers)
