"""ServerConfig: all the process can be told, the engine's part inside. One frozen value, made once by `cli`.

Each field carries its help text; flags, environment variables and YAML keys are made from the fields.
"""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass
from typing import Literal

from carpool.engine.config import EngineConfig, option
from carpool.engine.errors import ConfigError

ErrorFormat = Literal["flat", "openai"]
LogFormat = Literal["auto", "console", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]

BUNDLED_MODEL_NAME = "all-MiniLM-L6-v2"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Where to listen, whom to let in, how to answer; and what the engine runs.

    Option metadata read by `options.py`: `several` takes all words that follow the flag, `unit="bytes"`
    reads 64MiB, `shown` replaces the default in the help text.
    """

    engine: EngineConfig = EngineConfig()
    host: str = option("0.0.0.0", "Address to listen on; 0.0.0.0 is every IPv4 interface, :: IPv6 too.")
    port: int = option(8000, "Port to listen on; 0 takes a free one and the log names it.")
    uds: str | None = option(None, "Path of a Unix socket to listen on instead of host and port.")
    ssl_certfile: str | None = option(None, "Certificate chain (PEM) to serve HTTPS with.")
    ssl_keyfile: str | None = option(None, "Private key (PEM), if it is not in the certificate file.")
    ssl_ca_certs: str | None = option(None, "Certificates (PEM) of those who vouch for clients.")
    ssl_cert_reqs: int = option(
        0,
        "Whether a client needs a certificate that they vouch for: 0 none is asked for, 1 it may, 2 it must.",
    )
    ssl_ciphers: str | None = option(None, "Ciphers to use up to TLS 1.2, as OpenSSL names them.")
    enable_ssl_refresh: bool = option(
        False,
        "Load these files again when they change. Whom --ssl-ca-certs vouched for is trusted until a restart.",
    )
    served_model_name: tuple[str, ...] = option(
        (),
        "Names that requests may use for the model; answers carry the first.",
        several=True,
        shown="MODEL as given, or all-MiniLM-L6-v2",
    )
    api_key: tuple[str, ...] = option((), "Key a client must send as a Bearer token; repeat it for several.")
    enable_prompt_tokens_details: bool = option(
        False, "Say in usage how many of the prompt tokens were found in the prefix cache."
    )
    allow_cache_reset: bool = option(
        False,
        "Serve POST /reset_prefix_cache, by which any client empties the caches of prefixes and results.",
    )
    error_format: ErrorFormat = option("flat", "Shape of error bodies: flat, or nested as OpenAI has them.")
    max_body_size: int = option(64 << 20, "Largest request body, decompressed.", unit="bytes", shown="64MiB")
    shutdown_timeout: float = option(30.0, "Seconds that accepted requests get to finish after SIGTERM.")
    api_workers: int = option(
        1,
        "Processes for HTTP and tokenizing. With more than 1 they are apart from the engine's, for where one core's "
        "worth of Python cannot feed the model.",
    )
    log_level: LogLevel = option("info", "Least severe messages to log.")
    access_log: bool = option(True, "Log a line for each request; --no-access-log for failures of ours only.")
    log_format: LogFormat = option("auto", "How log lines look; auto is console on a terminal, else json.")
    allowed_origins: tuple[str, ...] = option(
        (), "Web origin that browsers may call from; * is any; repeat it."
    )
    allowed_methods: tuple[str, ...] = option(("*",), "Methods that pages from there may use; * is any.")
    allowed_headers: tuple[str, ...] = option(("*",), "Headers that they may send; * is any.")
    allow_credentials: bool = option(
        False, "Let browsers send cookies and certificates along; with any origin, that is from any page."
    )
    docs: bool = option(True, "Serve /openapi.json and /docs; --no-docs hides them.")
    root_path: str = option("", "Path prefix under which a proxy publishes the server.")

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port must be between 0 and 65535, got {self.port}.")
        if self.api_workers < 1:
            raise ConfigError(f"--api-workers must be at least 1, got {self.api_workers}.")
        if self.api_workers > 1 and not hasattr(socket, "AF_UNIX"):
            raise ConfigError("--api-workers above 1 needs Unix sockets, which this platform does not have.")
        if self.max_body_size < 1:
            raise ConfigError(f"--max-body-size must be at least 1 byte, got {self.max_body_size}.")
        if not 0 <= self.shutdown_timeout < float("inf"):
            raise ConfigError(f"--shutdown-timeout must be a number of seconds, got {self.shutdown_timeout}.")
        if not self.ssl_certfile:
            for name in ("ssl_keyfile", "ssl_ca_certs", "ssl_cert_reqs", "ssl_ciphers", "enable_ssl_refresh"):
                if getattr(self, name):
                    raise ConfigError(f"--{name.replace('_', '-')} needs --ssl-certfile beside it.")
        if self.ssl_cert_reqs not in (0, 1, 2):
            raise ConfigError(f"--ssl-cert-reqs must be 0, 1 or 2, got {self.ssl_cert_reqs}.")
        if self.ssl_cert_reqs and not self.ssl_ca_certs:
            raise ConfigError(
                "--ssl-cert-reqs needs --ssl-ca-certs beside it: who vouches for clients' certificates."
            )
        if "" in self.api_key:
            raise ConfigError("--api-key must not be empty.")
        if any(key != key.strip() for key in self.api_key):
            raise ConfigError(
                "--api-key must not begin or end with a blank: in a header blanks around it get lost."
            )
        if "" in self.served_model_name:
            raise ConfigError("--served-model-name must not be empty.")
        for name in (*self.model_names, *(module.name for module in self.engine.lora_modules)):
            if not _is_utf8(name):
                raise ConfigError(
                    f"The name {name!r} is not UTF-8, and answers carry it: give a model another by "
                    "--served-model-name, an adapter by --lora-modules."
                )
        for module in self.engine.lora_modules:
            if module.name in self.model_names:
                raise ConfigError(f"--lora-modules names {module.name!r}, which is the model's own name.")
        if self.root_path and not re.fullmatch(r"(/[\w.~-]+)+/?", self.root_path, re.ASCII):
            raise ConfigError(f"--root-path must be a path such as /embed, got {self.root_path}.")
        object.__setattr__(self, "root_path", self.root_path.rstrip("/"))

    @property
    def model_names(self) -> tuple[str, ...]:
        """Every name the model answers to; the first is the one it reports."""
        return self.served_model_name or (self.engine.model or BUNDLED_MODEL_NAME,)


def _is_utf8(word: str) -> bool:
    """Words of a command line that are not come with surrogates in place of their bytes."""
    try:
        word.encode()
    except UnicodeEncodeError:
        return False
    return True
