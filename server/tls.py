"""What HTTPS is served with: certificate and key, who vouches for clients, and all of it again once it is renewed."""

from __future__ import annotations

import asyncio
import os
import ssl
from typing import TYPE_CHECKING, NoReturn

import structlog

from carpool.engine.errors import ConfigError

if TYPE_CHECKING:
    from carpool.server.config import ServerConfig

log = structlog.get_logger()

REFRESH_SECONDS = 10.0  # between looks at the files


def load(config: ServerConfig) -> ssl.SSLContext | None:
    """What to serve with, if not plain HTTP. Raises ConfigError."""
    if config.ssl_certfile is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.verify_mode = ssl.VerifyMode(config.ssl_cert_reqs)
    if config.ssl_ca_certs and not config.ssl_cert_reqs:
        log.warning(
            "no client is asked for a certificate: --ssl-ca-certs needs --ssl-cert-reqs 1 or 2 for that"
        )
    _take_files(context, config)
    if config.ssl_ciphers:
        try:
            context.set_ciphers(config.ssl_ciphers)
        except ssl.SSLError as error:
            raise ConfigError(f"--ssl-ciphers {config.ssl_ciphers} names no ciphers of OpenSSL's.") from error
    return context


async def keep_fresh(context: ssl.SSLContext, config: ServerConfig) -> None:
    """Once the files are others, new connections get those; what cannot be used leaves the old ones."""
    seen = _written(config)
    while True:
        await asyncio.sleep(REFRESH_SECONDS)
        if (now := _written(config)) == seen:
            continue
        seen = now
        try:
            load(config)  # elsewhere first: a certificate whose key is yet to come must not be half taken
            _take_files(context, config)
            log.info("certificate loaded again", ssl_certfile=config.ssl_certfile)
        except ConfigError as error:
            log.error("certificate not loaded again", reason=str(error))


def _take_files(context: ssl.SSLContext, config: ServerConfig) -> None:
    try:
        context.load_cert_chain(str(config.ssl_certfile), config.ssl_keyfile, password=_refuse_passphrase)
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(f"Cannot use the certificate {config.ssl_certfile}: {error}.") from error
    if config.ssl_ca_certs:
        try:
            context.load_verify_locations(config.ssl_ca_certs)
        except OSError as error:
            raise ConfigError(f"Cannot use --ssl-ca-certs {config.ssl_ca_certs}: {error}.") from error


def _refuse_passphrase() -> NoReturn:
    """OpenSSL would ask for it on the terminal, and the server would stand still until somebody typed it."""
    raise ConfigError(
        "The key of --ssl-certfile is encrypted: openssl pkey -in KEY -out PLAIN takes that away."
    )


def _written(config: ServerConfig) -> list[tuple[int, int, int] | None]:
    """Which file each is, and as of when; None: it is not there."""
    return [_stamp(path) for path in (config.ssl_certfile, config.ssl_keyfile, config.ssl_ca_certs) if path]


def _stamp(path: str) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:  # while a link is put in place of another
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size
