"""What HTTPS is served with; tests/server/test_lifespan.py serves it."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from carpool.engine.errors import ConfigError
from carpool.server import tls
from carpool.server.config import ServerConfig
from certificates import make_certificate, needs_openssl


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ssl_ca_certs": "/nowhere", "ssl_cert_reqs": 1}, "Cannot use --ssl-ca-certs /nowhere"),
        ({"ssl_ciphers": "ROT13"}, "--ssl-ciphers ROT13 names no ciphers"),
    ],
)
@needs_openssl
def test_what_tls_cannot_use_is_one_sentence(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    certificate, key = make_certificate(tmp_path, "a")
    with pytest.raises(ConfigError, match=rf"^{words}.*\.$"):
        tls.load(ServerConfig(ssl_certfile=certificate, ssl_keyfile=key, **options))


@needs_openssl
def test_nobody_is_asked_for_the_passphrase_of_a_key(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path, "a", passphrase="secret")
    with pytest.raises(ConfigError, match=r"^The key of --ssl-certfile is encrypted"):
        tls.load(ServerConfig(ssl_certfile=certificate, ssl_keyfile=key))


@needs_openssl
def test_clients_are_vouched_for_by_those_named_only(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path, "a")
    config = ServerConfig(
        ssl_certfile=certificate, ssl_keyfile=key, ssl_ca_certs=certificate, ssl_cert_reqs=2
    )
    assert names_trusted(tls.load(config)) == ["a"]


@needs_openssl
@pytest.mark.parametrize(("asks", "warnings"), [(0, 1), (1, 0)])
def test_vouchers_whom_nobody_asks_for_are_told_of(tmp_path: Path, asks: int, warnings: int) -> None:
    certificate, key = make_certificate(tmp_path, "a")
    config = ServerConfig(
        ssl_certfile=certificate, ssl_keyfile=key, ssl_ca_certs=certificate, ssl_cert_reqs=asks
    )
    with capture_logs() as logged:
        context = tls.load(config)
    assert context is not None
    assert context.verify_mode == asks
    assert [entry["log_level"] for entry in logged] == ["warning"] * warnings


@needs_openssl
async def test_those_who_vouch_for_clients_are_renewed_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls, "REFRESH_SECONDS", 0.01)
    certificate, key = make_certificate(tmp_path, "a")
    voucher = tmp_path / "ca.pem"
    voucher.write_bytes(Path(certificate).read_bytes())
    config = ServerConfig(
        ssl_certfile=certificate, ssl_keyfile=key, ssl_ca_certs=str(voucher), ssl_cert_reqs=2
    )
    context = tls.load(config)
    assert context is not None
    refreshing = asyncio.create_task(tls.keep_fresh(context, config))
    await asyncio.sleep(0.02)
    (tmp_path / "b").mkdir()
    other, _ = make_certificate(tmp_path / "b", "b")
    with capture_logs() as logged:
        voucher.unlink()  # as a link is put in place of another, with a moment of none
        await until_logged(logged, "certificate not loaded again")
        voucher.write_bytes(Path(other).read_bytes())
        await until_logged(logged, "certificate loaded again")
    assert "b" in names_trusted(context)
    assert not refreshing.done()
    refreshing.cancel()


def names_trusted(context: ssl.SSLContext | None) -> list[str]:
    assert context is not None
    found: list[Any] = context.get_ca_certs()
    subjects = [dict(pair for [pair] in each["subject"]) for each in found]
    return [subject["commonName"] for subject in subjects]


async def until_logged(logged: Any, event: str) -> None:
    async with asyncio.timeout(5):
        while not any(line["event"] == event for line in logged):
            await asyncio.sleep(0.005)
