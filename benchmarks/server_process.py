"""ServerProcess: `carpool serve` as a child, and what it costs the machine."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Self

_POLL_SECONDS = 0.02
_READY_WITHIN_SECONDS = 120.0
_TICKS = os.sysconf("SC_CLK_TCK")  # a second


class ServerProcess:
    """Started on a free port and ready when the constructor returns; stopped on leaving its `with` block."""

    host = "127.0.0.1"

    def __init__(self, *arguments: str) -> None:
        """`arguments` follow `carpool serve`. Raises RuntimeError with the server's last words if it does not start."""
        self.port = _free_port()
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115, it lives as long as the server
        # What the `carpool` script runs; a checkout that is on the path and not installed has no script.
        command = [sys.executable, "-P", "-m", "carpool.server", "serve", *arguments]
        command += ["--host", self.host, "--port", str(self.port), "--log-level", "warning"]
        began = time.perf_counter()
        self._process = subprocess.Popen(command, stdout=self._log, stderr=self._log)
        try:
            self._wait_until_ready()
        except BaseException:
            self._process.kill()
            raise
        self.ready_seconds = time.perf_counter() - began

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Ask it to finish. Raises RuntimeError unless it leaves with status 0."""
        self._process.send_signal(signal.SIGTERM)
        if self._process.wait(60.0) != 0:
            raise RuntimeError(self._last_words())

    def resident_bytes(self) -> int:
        """Memory that the process holds now."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
        return int(line.split()[1]) * 1024

    def cpu_seconds(self) -> float:
        """Of all its threads since it started."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        user, system = fields[11:13]  # fields 14 and 15 of proc(5)
        return (int(user) + int(system)) / _TICKS

    def _wait_until_ready(self) -> None:
        give_up = time.monotonic() + _READY_WITHIN_SECONDS
        while not self._is_ready():
            if self._process.poll() is not None:
                raise RuntimeError(self._last_words())
            if time.monotonic() > give_up:
                raise RuntimeError(f"not ready after {_READY_WITHIN_SECONDS:.0f} s\n{self._last_words()}")
            time.sleep(_POLL_SECONDS)

    def _is_ready(self) -> bool:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=1.0)
        try:
            connection.request("GET", "/health/ready")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    def _last_words(self) -> str:
        self._log.seek(0)
        return f"carpool serve ended with status {self._process.poll()}:\n{self._log.read()[-4000:]}"


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port
