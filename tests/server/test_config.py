"""ServerConfig refuses what cannot be served, in one sentence each."""

from __future__ import annotations

import socket
from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from carpool.engine.config import EngineConfig, LoraModule
from carpool.engine.errors import ConfigError
from carpool.server.config import ServerConfig


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"port": 70000}, "--port"),
        ({"port": -1}, "--port"),
        ({"max_body_size": 0}, "--max-body-size"),
        ({"shutdown_timeout": -1.0}, "--shutdown-timeout"),
        ({"shutdown_timeout": float("nan")}, "--shutdown-timeout"),
        ({"ssl_keyfile": "key.pem"}, "--ssl-certfile"),
        ({"ssl_ciphers": "ECDHE"}, "--ssl-ciphers needs --ssl-certfile"),
        ({"enable_ssl_refresh": True}, "--enable-ssl-refresh needs --ssl-certfile"),
        ({"ssl_certfile": "c", "ssl_cert_reqs": 2}, "--ssl-cert-reqs needs --ssl-ca-certs"),
        ({"ssl_certfile": "c", "ssl_ca_certs": "a", "ssl_cert_reqs": 3}, "--ssl-cert-reqs must be 0, 1 or 2"),
        ({"api_key": ("good", "")}, "--api-key"),
        ({"served_model_name": ("",)}, "--served-model-name"),
        ({"served_model_name": ("good", "caf\udce9")}, "is not UTF-8"),
        ({"engine": EngineConfig(model="caf\udce9")}, "is not UTF-8"),
        ({"engine": EngineConfig(model="m", lora_modules=(LoraModule("caf\udce9", "x"),))}, "is not UTF-8"),
        ({"root_path": "embed"}, "--root-path"),
        ({"root_path": "/{x}"}, "--root-path"),
    ],
)
def test_what_cannot_be_served_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=rf"{words}.*\.$"):
        ServerConfig(**fields)


def test_the_names_of_the_model() -> None:
    assert ServerConfig().model_names == ("all-MiniLM-L6-v2",)
    assert ServerConfig(engine=EngineConfig(model="org/name")).model_names == ("org/name",)
    assert ServerConfig(engine=EngineConfig(model="x"), served_model_name=("a", "b")).model_names == (
        "a",
        "b",
    )


def test_it_is_frozen_and_its_prefix_has_no_slash_at_the_end() -> None:
    config = ServerConfig(root_path="/embed/")
    assert config.root_path == "/embed"
    with pytest.raises(FrozenInstanceError):
        config.port = 1  # type: ignore[misc]


def test_an_adapter_needs_a_name_of_its_own() -> None:
    engine = EngineConfig(model="m", lora_modules=(LoraModule("m", "x"),))
    with pytest.raises(ConfigError, match=r"--lora-modules names 'm', which is the model's own name\."):
        ServerConfig(engine=engine)
    assert ServerConfig(engine=engine, served_model_name=("other",)).model_names == ("other",)


def test_several_front_ends_need_a_number_and_sockets_to_reach_them(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"--api-workers must be at least 1, got 0\."):
        ServerConfig(api_workers=0)
    assert ServerConfig(api_workers=2).api_workers == 2
    monkeypatch.delattr(socket, "AF_UNIX")
    with pytest.raises(ConfigError, match="--api-workers above 1 needs Unix sockets"):
        ServerConfig(api_workers=2)
    assert ServerConfig().api_workers == 1


def test_vouchers_may_be_given_though_nobody_is_asked() -> None:
    """As the reference takes it; the log says that clients are not asked."""
    config = ServerConfig(ssl_certfile="c", ssl_ca_certs="a")
    assert (config.ssl_ca_certs, config.ssl_cert_reqs) == ("a", 0)
