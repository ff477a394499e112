"""Certificates of nobody's, for tests of TLS."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from pathlib import Path

import pytest

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificates")


def make_certificate(folder: Path, name: str, passphrase: str = "") -> tuple[str, str]:
    """Its path and its key's, both written anew. It vouches for itself."""
    certificate, key = folder / "cert.pem", folder / "key.pem"
    closed = f"-passout pass:{passphrase}" if passphrase else "-nodes"
    command = (
        f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 {closed} -days 2 -subj /CN={name}"
    )
    subprocess.run([*command.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    return str(certificate), str(key)


def trusting(certificate: str) -> ssl.SSLContext:
    """A client's, which takes this certificate for whatever host it is shown by."""
    context = ssl.create_default_context(cafile=certificate)
    context.check_hostname = False
    return context
