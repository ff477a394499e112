"""The description of the API: complete, consistent in itself, and this server's. schemathesis asks if it is true."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jsonschema_rs
import pytest
import schemathesis

from carpool.server.app import ROUTES, Route
from carpool.server.config import ServerConfig
from carpool.server.errors import STATUS
from carpool.server.fields import ALONE, EXAMPLES, FIELDS, FORMS, HIDDEN, NEEDED
from carpool.server.openapi import describe
from carpool.server.schemas import structs
from fakes import FAKE_CROSS_ENCODER, FAKE_M3, FakeEngine
from serving import OPEN, serving

DOCUMENT: dict[str, Any] = json.loads(describe(ROUTES, False, "", "flat"))
GUARDED: dict[str, Any] = json.loads(describe(ROUTES, True, "", "flat"))
SCHEMAS: dict[str, Any] = DOCUMENT["components"]["schemas"]
REQUESTS = {struct.__name__ for route in ROUTES for struct in structs(route.request)}
NAMED_FIELDS = {f"{name}.{field}" for name in REQUESTS for field in SCHEMAS[name]["properties"]}


def operations(document: dict[str, Any]) -> Iterator[tuple[Route, dict[str, Any]]]:
    for route in ROUTES:
        for method in route.methods:
            yield route, document["paths"][route.path][method.lower()]


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from references(item)


def fits(schema: str, body: Any) -> bool:
    validator = jsonschema_rs.Draft202012Validator(
        {"$ref": f"#/components/schemas/{schema}", "components": DOCUMENT["components"]}
    )
    return bool(validator.is_valid(body))


# ── complete ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_it_is_openapi_3_1() -> None:
    schemathesis.openapi.from_dict(GUARDED).validate()
    for schema in SCHEMAS.values():
        jsonschema_rs.meta.validate({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema})


def test_every_reference_leads_somewhere() -> None:
    for reference in references(GUARDED):
        place = GUARDED
        for step in reference.removeprefix("#/").split("/"):
            place = place[step]


def test_nothing_is_left_over() -> None:
    used = set(references(GUARDED))
    for kind in ("schemas", "parameters", "headers"):
        assert {f"#/components/{kind}/{name}" for name in GUARDED["components"][kind]} <= used


def test_operations_have_names_of_their_own() -> None:
    names = [operation["operationId"] for _, operation in operations(DOCUMENT)]
    assert len(set(names)) == len(names)
    assert all(name.isidentifier() for name in names)


def test_every_operation_says_what_goes_in_and_out() -> None:
    for route, operation in operations(DOCUMENT):
        answers = operation["responses"]
        assert operation["summary"], route.path
        assert ("requestBody" in operation) == (route.request is not None), route.path
        assert bool(answers["200"]["content"]) == (route.response is not None), route.path
        assert "X-Request-Id" in answers["200"]["headers"]
        assert {"400", "500"} <= answers.keys()
        assert ("504" in answers) == ("Server-Timing" in answers["200"]["headers"]) == route.runs_model


def test_vectors_may_leave_as_bytes() -> None:
    for path in ("/v1/embeddings", "/pooling", "/invocations"):
        answer = DOCUMENT["paths"][path]["post"]["responses"]["200"]
        assert "application/octet-stream" in answer["content"]
        assert "metadata" in answer["headers"]
    assert "application/octet-stream" not in str(DOCUMENT["paths"]["/rerank"])


def test_aliases_are_described_alike() -> None:
    alike: dict[Any, Any] = {}
    for route, operation in operations(DOCUMENT):
        told = {**operation, "operationId": None}
        if "GET" not in route.methods:
            assert alike.setdefault(route.handler, told) == told


def test_every_error_has_a_description() -> None:
    described = DOCUMENT["components"]["responses"]
    assert set(described) == {kind for _, kind in STATUS.values()}
    assert all("X-Request-Id" in answer["headers"] for answer in described.values())
    assert "Retry-After" in described["ServiceUnavailableError"]["headers"]


# ── what is written by hand ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("path", sorted(NAMED_FIELDS))
def test_every_field_of_a_request_is_described(path: str) -> None:
    name, field = path.split(".")
    assert SCHEMAS[name]["properties"][field]["description"].endswith(".")


def test_nothing_by_hand_is_about_what_is_no_more() -> None:
    fields = {path.partition(".")[2] for path in NAMED_FIELDS}
    assert not [path for path in FIELDS if path not in NAMED_FIELDS | fields]
    assert not [path for path in HIDDEN if path.partition(".")[0] not in REQUESTS]
    assert set(EXAMPLES) == REQUESTS
    assert ALONE <= NEEDED.keys() <= REQUESTS
    assert FORMS.keys() <= REQUESTS
    assert not [
        f"{name}.{field}"
        for name, groups in NEEDED.items()
        for group in groups
        for field in group
        if f"{name}.{field}" not in NAMED_FIELDS
    ]


@pytest.mark.parametrize("route", [route for route in ROUTES if route.request], ids=lambda route: route.path)
async def test_every_example_is_served(route: Route) -> None:
    to_classifier = "classif" in route.handler.__name__ or "predict" in route.handler.__name__
    engine = FakeEngine(FAKE_CROSS_ENCODER if to_classifier else FAKE_M3)
    async with serving(OPEN, engine) as server:
        for struct in structs(route.request):
            example = EXAMPLES[struct.__name__]
            assert fits(struct.__name__, example)
            answer = await server.post(route.path, example)
            assert answer.status == 200, answer.json


CHAT = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        (
            "EmbeddingRequest",
            [
                {"input": "a"},
                {"input": ["a", "b"]},
                {"input": [1, 2]},
                {"input": [[1], [2, 3]]},
                {"input": CHAT},
                {"input": [CHAT, CHAT]},
                {"input": ["a", "b"], "modality": ["text"], "truncation": "END"},
                {"messages": CHAT},
                {"messages": CHAT, "input": None},
                {"input": "a", "dimensions": 8, "model": None, "unknown": {}},
            ],
            [
                {},
                {"input": None},
                {"input": []},
                {"input": [[]]},
                {"input": ["a", 1]},
                {"input": ["a", None]},
                {"input": {}},
                {"input": [{"image": "a"}]},
                {"input": "a", "modality": ["image"]},
                {"input": "a", "dimensions": 0},
                {"input": "a", "dimensions": 1.5},
                {"input": "a", "encoding_format": "hex"},
                {"messages": [{"content": "no role"}]},
                {"messages": CHAT, "chat_template": "{{ x }}"},
                [],
            ],
        ),
        (
            "ScoreRequest",
            [{"text_1": "a", "text_2": ["b"]}, {"queries": "a", "items": [{"content": [{"text": "b"}]}]}],
            [{"text_1": "a"}, {"queries": "a", "text_2": "b"}, {"data_1": "a", "data_2": []}],
        ),
        (
            "CohereEmbedRequest",
            [{"texts": ["a"]}, {"inputs": [{"content": [{"type": "text", "text": "a"}]}], "texts": None}],
            [{}, {"texts": []}, {"texts": ["a"], "inputs": []}, {"images": ["a"]}],
        ),
        (
            "TeiPredictRequest",
            [
                {"inputs": "a"},
                {"inputs": ["a", "b"]},
                {"inputs": [["a"], "b", ["c", "d"]]},
                {"inputs": ["a", "b", "c"], "parameters": {}},
                {"inputs": {"text": "a", "text_pair": "b"}},
                {"inputs": [{"text": "a"}, "b"]},
            ],
            [
                {"inputs": ["a", "b", "c"]},
                {"inputs": ["a", "b", "c"], "parameters": None},
                {"inputs": [["a", "b", "c"]]},
                {"inputs": []},
                {"inputs": {"text_pair": "b"}},
                {"parameters": {}},
            ],
        ),
    ],
)
def test_the_unions_written_by_hand(schema: str, good: list[Any], bad: list[Any]) -> None:
    assert [body for body in good if not fits(schema, body)] == []
    assert [body for body in bad if fits(schema, body)] == []


# ── of this server ───────────────────────────────────────────────────────────────────────────────────────────


async def test_it_is_served_as_it_is() -> None:
    async with serving(OPEN) as served:
        answer = await served.get("/openapi.json")
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.json == DOCUMENT


async def test_it_is_behind_the_key() -> None:
    async with serving(replace(OPEN, api_key=("secret",))) as server:
        assert (await server.get("/openapi.json")).status == 401
        answer = await server.get("/openapi.json", headers={"Authorization": "Bearer secret"})
    assert answer.json == GUARDED


def test_what_needs_a_key_says_so() -> None:
    assert "securitySchemes" not in DOCUMENT["components"]
    for route, operation in operations(GUARDED):
        assert ("security" in operation) == ("401" in operation["responses"]) == (not route.open)
    for _, operation in operations(DOCUMENT):
        assert "security" not in operation


async def test_the_doors_are_where_it_says() -> None:
    async with serving(ServerConfig(api_key=("secret",))) as server:
        for route, operation in operations(GUARDED):
            answer = await server.ask(route.methods[0], route.path.replace("{asset}", "docs.css"))
            assert (answer.status == 401) == ("security" in operation), route.path


@pytest.mark.parametrize(("root_path", "url"), [("", "/"), ("/proxy/", "/proxy"), ("/a.b/c-d", "/a.b/c-d")])
async def test_it_knows_the_proxys_prefix(root_path: str, url: str) -> None:
    async with serving(ServerConfig(root_path=root_path)) as server:
        assert (await server.get("/openapi.json")).json["servers"] == [{"url": url}]


@pytest.mark.parametrize("shape", ["flat", "openai"])
async def test_errors_look_as_described(shape: Any) -> None:
    async with serving(ServerConfig(error_format=shape)) as server:
        document = (await server.get("/openapi.json")).json
        for kind, path in (("BadRequestError", "/v1/embeddings"), ("NotFoundError", "/v1/models/none")):
            answer = await (server.post(path, {}) if kind == "BadRequestError" else server.get(path))
            schema = document["components"]["responses"][kind]["content"]["application/json"]["schema"]
            validator = jsonschema_rs.Draft202012Validator({**schema, "components": document["components"]})
            validator.validate(answer.json)
            assert not validator.is_valid({**answer.json, "error": {}, "code": 500})
