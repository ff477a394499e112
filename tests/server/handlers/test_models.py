"""/v1/models."""

from __future__ import annotations

from carpool.server.config import ServerConfig
from serving import assert_error, serving

NAMES = ("first", "org/second", "third one")


async def test_every_name_is_listed() -> None:
    async with serving(ServerConfig(served_model_name=NAMES)) as server:
        listed = (await server.get("/v1/models")).json
        assert listed["object"] == "list"
        assert [card["id"] for card in listed["data"]] == list(NAMES)
        card = listed["data"][0]
        assert card["object"] == "model"
        assert card["root"] == "/models/fake"
        assert card["parent"] is None
        assert card["max_model_len"] == 256
        assert card["created"] > 1_700_000_000


async def test_each_can_be_asked_for_slashes_and_all() -> None:
    async with serving(ServerConfig(served_model_name=NAMES)) as server:
        for path in ("first", "org/second", "org%2Fsecond", "org/second/", "third%20one"):
            assert (await server.get(f"/v1/models/{path}")).status == 200
            assert (await server.get(f"/models/{path}")).status == 200
        assert_error(await server.get("/v1/models/fourth"), 404, "NotFoundError", "model")


async def test_they_are_listed_without_the_version_too() -> None:
    async with serving(ServerConfig(served_model_name=NAMES)) as server:
        ours, theirs = (await server.get("/v1/models")).json, (await server.get("/models")).json
    assert [card["id"] for card in theirs["data"]] == [card["id"] for card in ours["data"]] == list(NAMES)
