"""What benches share: serve_creditmix.py in a process of its own, asked, weighed, killed and started again."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from support.http_server import free_port

from common import cli
from harness.memory import own_bytes

ROOT = Path(__file__).parents[2]
START = 180  # seconds a server may take to start and load


class ServerProcess:
    """A serve_creditmix.py on a port of its own.

    Args:
        runs_dir: folder of the runs.
        quiet: what it logs is not shown.
        environment: further settings.
    """

    def __init__(self, runs_dir: str, *, quiet: bool = False, **environment: str) -> None:
        self.port = free_port()
        self.runs_dir, self.environment = runs_dir, environment
        self.output = subprocess.DEVNULL if quiet else None
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        """Start it and wait until it answers; with PRELOAD until its base is loaded."""
        words = [sys.executable, str(ROOT / "serve_creditmix.py"), "--port", str(self.port)]
        environment = os.environ | {"RUNS_DIR": self.runs_dir} | self.environment
        self.process = subprocess.Popen(words, env=environment, stderr=self.output)
        until = time.monotonic() + START
        path = "/readyz" if self.environment.get("PRELOAD") else "/healthz"
        while not self.is_up(path):
            if self.process.poll() is not None or time.monotonic() > until:
                raise cli.UserError("the server did not start; its messages stand above")
            time.sleep(0.1)

    def stop(self) -> None:
        """End it as a service manager would."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(START)

    def kill(self) -> None:
        """End it as a lack of memory would."""
        self.process.kill()
        self.process.wait()

    def models(self) -> list[int]:
        """The process ids of its models."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(pid) for pid in children if b"adapter_host" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    def post(self, run: str, text: str) -> dict:
        """The answer to a row."""
        url = f"http://127.0.0.1:{self.port}/infer/{run}"
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(url, json.dumps({"features": text}).encode(), headers)
        with urllib.request.urlopen(request, timeout=START) as answer:
            return json.load(answer)

    def is_up(self, path: str) -> bool:
        """Whether a path is answered with 200."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5):
                return True
        except (urllib.error.URLError, OSError):
            return False

    def resident(self) -> int:
        """Bytes of memory that the server and its models' processes hold of their own."""
        return own_bytes(self.process.pid)


@contextlib.contextmanager
def running_server(runs_dir: str, *, quiet: bool = False, **environment: str) -> Iterator[ServerProcess]:
    """A started server, which is stopped at the end; see `ServerProcess`."""
    server = ServerProcess(runs_dir, quiet=quiet, **environment)
    try:
        server.start()
        yield server
    finally:
        if server.process is not None:
            server.stop()
