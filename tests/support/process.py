"""`carpool serve` as a stranger runs it: a process of its own, on a free port of this machine."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

PATIENCE = 90.0  # seconds to load a model on a busy machine


@dataclass(slots=True)
class Process:
    """A server that is ready."""

    popen: subprocess.Popen[bytes]
    url: str
    log: Path

    def resident_mb(self) -> float:
        status = Path(f"/proc/{self.popen.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert found
        return int(found[1]) / 1024

    def terminate(self, patience: float = 60.0) -> int:
        """SIGTERM, and the exit status it leads to."""
        self.popen.send_signal(signal.SIGTERM)
        return self.popen.wait(patience)


@contextmanager
def carpool_serve(log: Path, *arguments: str) -> Iterator[Process]:
    """Run `carpool serve` with `arguments` until the block ends; its output goes to the file `log`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("carpool")), "serve", *arguments]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as out:
        popen = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
    process = Process(popen, f"http://127.0.0.1:{port}", log)
    try:
        _wait_until_ready(process)
        yield process
    finally:
        if popen.poll() is None:
            popen.kill()
        popen.wait()


def _wait_until_ready(process: Process) -> None:
    give_up = time.monotonic() + PATIENCE
    while time.monotonic() < give_up:
        assert process.popen.poll() is None, process.log.read_text()
        try:
            with urlopen(f"{process.url}/health/ready", timeout=5) as answer:
                if answer.status == 200:
                    return
        except (HTTPError, URLError, ConnectionError, TimeoutError):  # the last while its fronts come up
            time.sleep(0.1)
    raise AssertionError(f"not ready after {PATIENCE} s: {process.log.read_text()}")
