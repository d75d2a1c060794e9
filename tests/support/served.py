"""What the tests of the server share: run folders without training, and the server on a port of its own."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from common.models.source import ModelSource
from common.serving import adapter_host, model_process
from common.serving.adapter_host import HostSettings
from common.serving.model_process import ModelProcess
from common.serving.routes import create_app
from common.serving.server import Settings
from common.tasks.ranking.creditmix import CREDITMIX
from support.inputs import CORPUS
from support.processes import fork_server

ROWS = [text.partition("\n\n")[2] for text in CORPUS[:24]]  # features of unlike lengths
ROWS = [row[: 30 + 9 * (i % 8)] for i, row in enumerate(ROWS)]


def make_run(folder: Path, base: str, seed: int, method: str = "sft") -> Path:
    """An adapter of random weights, as a trainer leaves it."""
    import torch

    from common.models import adapters, tokenizers
    from common.models import loading as models

    model = models.load_base(ModelSource(base, dtype="float32"))
    fingerprint = adapters.fingerprint(model)
    adapted = adapters.add_lora(model, r=4, alpha=8, dropout=0.0, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    adapted.save_pretrained(str(folder))
    tokenizers.load_tokenizer(base).save_pretrained(folder)
    record = {"method": method, "started": "2026-01-02T03:04:05Z", "base_fingerprint": fingerprint}
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def make_runs(folder: Path, base: str) -> Path:
    """creditmix_sft, creditmix_kd and creditmix_dpo on one base."""
    for seed, method in enumerate(("sft", "kd", "dpo"), start=1):
        make_run(folder / f"creditmix_{method}", base, seed, method)
    return folder


def replace_adapter(run: Path, other: Path) -> None:
    """Put another adapter's weights in place, as a finished training does: at once, and a while ago."""
    shutil.copy(other / "adapter_model.safetensors", run / "new")
    os.utime(run / "new", (time.time() - 60,) * 2)
    os.replace(run / "new", run / "adapter_model.safetensors")


def settings(runs_dir: Path | str, **changes: Any) -> Settings:
    """The defaults, with `changes`; those of the host by their own names."""
    host = {
        "max_batch_tokens": 2048,
        "max_wait": 0.0,
        "max_queue": 512,
        "task": CREDITMIX,
        "num_null_prompts": len(CREDITMIX.null_inputs),
        "load_in_4bit": "auto",
        "auto_fit": False,
        "runs_dir": str(runs_dir),
    }
    host |= {name: changes.pop(name) for name in list(changes) if name in host}
    every = {
        "runs_dir": str(runs_dir),
        "base_model": None,
        "idp_schema": "none.json",
        "max_bases": 2,
        "host": HostSettings(**host),
        "request_timeout": 60.0,
        "max_body_bytes": 1 << 20,
        "api_key": None,
        "audit_log": None,
        "audit_inputs": False,
        "audit_max_bytes": 1 << 20,
        "preload": False,
    }
    return Settings(**(every | changes))


def fork(end: socket.socket) -> SimpleNamespace:
    """`model_process.launch`, without the seconds that the imports take."""
    child = fork_server().Process(target=adapter_host.main, args=(end,), daemon=True)
    child.start()
    return SimpleNamespace(pid=child.pid, wait=lambda: (child.join(), child.exitcode)[1])


class Served:
    """A running server: `ask` and `post` talk to it, `app` and `server` are its insides."""

    def __init__(self, app, uvicorn_server) -> None:
        self.app, self.server, self.uvicorn = app, app.state.server, uvicorn_server
        self.port = 0

    @property
    def processes(self) -> list[ModelProcess]:
        """Those of the bases that are in memory or on their way there."""
        return self.server.models.all()

    def waiting(self) -> int:
        """Rows in the queues."""
        return sum(process.rows for process in self.processes)

    def busy(self) -> int:
        """Jobs that are being worked on."""
        return sum(process.busy for process in self.processes)

    @contextlib.contextmanager
    def held(self, run: str = "sft") -> Iterator[None]:
        """The model's process stands still, so that what is sent to it waits."""
        self.post(f"/infer/{run}", {"features": ROWS[0]})
        (process,) = self.processes
        os.kill(process.process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(process.process.pid, signal.SIGCONT)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any, dict[str, str]]:
        """(status, JSON or text, headers); `body` as JSON unless it is bytes."""
        connection = self.connect()
        sent = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, sent, {"Content-Type": "application/json", **(headers or {})})
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        found = dict(answer.getheaders())
        is_json = found.get("content-type", "").startswith("application/json")
        return answer.status, json.loads(content) if is_json else content.decode(), found

    def post(self, path: str, body: Any) -> Any:
        """The answer to a request that must succeed."""
        status, answer, _ = self.ask("POST", path, body)
        assert status == 200, answer
        return answer

    def refused(self, status: int, path: str, body: Any, method: str = "POST") -> str:
        """The message of an error of this status, in the one shape of errors."""
        found, answer, headers = self.ask(method, path, body)
        assert found == status, answer
        assert set(answer["error"]) == {"message", "type", "param", "request_id"}
        assert answer["error"]["request_id"] == headers["x-request-id"]
        return answer["error"]["message"]


model_process.launch = fork


@contextlib.contextmanager
def serve(runs_dir: Path | str, **changes: Any) -> Iterator[Served]:
    """The server in a thread of this process; stopped at the end as by a signal."""
    import uvicorn

    app = create_app(settings(runs_dir, **changes))
    config = uvicorn.Config(app, port=0, log_level="warning", access_log=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.005)
        served = Served(app, server)
        served.port = server.servers[0].sockets[0].getsockname()[1]
        yield served
    finally:
        server.should_exit = True
        thread.join(60)
    assert not thread.is_alive()
