"""The JSON Schema of every struct on the wire, as `/openapi.json` publishes it.

A request that fits its schema is well-formed: what the server may still refuse is what no schema can know (the
model's length, its vocabulary, its tasks). The other way round the server is kinder than the schema, by the rules
of `lax.py`: the schema says what a client should send.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import UnionType
from typing import Any, Union, get_args, get_origin

import msgspec
from msgspec import Struct, UnsetType

from carpool.server.fields import ALONE, EXAMPLES, FIELDS, FORMS, HIDDEN, NEEDED, NULL, Schema

TEMPLATE = "#/components/schemas/{name}"


def reference(kind: Any) -> Schema:
    """A type as a schema: a struct is referred to by its name, a union is any of its members."""
    schemas, _ = _made(members(kind))
    return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}


def members(kind: Any) -> tuple[Any, ...]:
    """msgspec knows no unions of structs, so they are taken apart first."""
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def components(requests: Iterable[Any], responses: Iterable[Any]) -> dict[str, Schema]:
    """Every struct in these types, by name."""
    asked = {struct.__name__: struct for kind in requests for struct in structs(kind)}
    told = {struct.__name__: struct for kind in responses for struct in structs(kind)}
    _, made = _made([*asked.values(), *told.values()])
    return {name: _request(name, made[name]) for name in sorted(asked)} | {
        name: _response(made[name], struct) for name, struct in sorted(told.items())
    }


def structs(kind: Any) -> Iterator[type[Struct]]:
    """The structs that a type names, and those that they name."""
    if isinstance(kind, type) and issubclass(kind, Struct):
        yield kind
        for field in msgspec.structs.fields(kind):
            yield from structs(field.type)
    for part in get_args(kind):
        yield from structs(part)


def _made(kinds: Iterable[Any]) -> tuple[list[Schema], dict[str, Schema]]:
    schemas, named = msgspec.json.schema_components(kinds, ref_template=TEMPLATE)
    return _tidied(list(schemas)), _tidied(named)


def _tidied(schema: Any) -> Any:
    """`{"anyOf": [{"type": "integer"}, {"type": "null"}]}` as the shorter `{"type": ["integer", "null"]}`."""
    if isinstance(schema, list):
        return [_tidied(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: _tidied(value) for key, value in schema.items() if key != "title"}
    match schema.get("anyOf"):
        case [{"type": str(kind), **rest}, {"type": "null"}]:
            return {**_without(schema, "anyOf"), **rest, "type": [kind, "null"]}
        case [{"enum": list(choices)}, {"type": "null"}]:
            return {**_without(schema, "anyOf"), "enum": [*choices, None]}
    return schema


def _without(schema: Schema, *keys: str) -> Schema:
    return {key: value for key, value in schema.items() if key not in keys}


def _request(name: str, schema: Schema) -> Schema:
    fields = {
        field: _described(f"{name}.{field}", typed)
        for field, typed in schema["properties"].items()
        if f"{name}.{field}" not in HIDDEN
    }
    made = {**schema, "properties": fields}
    groups = NEEDED.get(name, ())
    if choices := [*(_choice(group, groups, alone=name in ALONE) for group in groups), *FORMS.get(name, ())]:
        made["anyOf"] = choices
    return {**made, "examples": [EXAMPLES[name]]} if name in EXAMPLES else made


def _described(path: str, typed: Schema) -> Schema:
    """What the type says and what is written by hand. A default of null means no more than may be absent."""
    if typed.get("default", ...) is None:
        typed = _without(typed, "default")
    by_hand = FIELDS.get(path) or FIELDS.get(path.partition(".")[2], {})
    return {**({} if "anyOf" in by_hand else typed), **by_hand}


def _choice(group: tuple[str, ...], groups: Iterable[tuple[str, ...]], alone: bool) -> Schema:
    """These fields are there, and not null; the other groups' are not, if it stands alone."""
    others = {name for other in groups for name in other if name not in group} if alone else set()
    present: Schema = {name: {"not": NULL} for name in group}
    return {"required": list(group), "properties": present | dict.fromkeys(sorted(others), NULL)}


def _response(schema: Schema, struct: type[Struct]) -> Schema:
    """What the server writes it writes always, except for what may be unset."""
    fields = {name: _without(field, "default") for name, field in schema["properties"].items()}
    always = [f.encode_name for f in msgspec.structs.fields(struct) if UnsetType not in get_args(f.type)]
    return {**schema, "properties": fields, "required": always}
