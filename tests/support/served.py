"""What the tests of the server share: run folders without training, and the server on a port of its own."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from common.models.source import ModelSource
from common.serving import adapter_host, model_process
from common.serving.messages import HostSettings
from common.serving.model_process import ModelProcess
from common.serving.routes import create_app
from common.serving.settings import ServerSettings
from common.tasks.ranking.creditmix import CREDITMIX
from support.http_server import LONGEST, Client, run_app
from support.inputs import CORPUS
from support.processes import fork_server, import_for_forks

ROWS = [text.partition("\n\n")[2] for text in CORPUS[:24]]  # features of unlike lengths
ROWS = [row[: 30 + 9 * (i % 8)] for i, row in enumerate(ROWS)]


NAMES = ["base", "sft", "kd", "dpo"]
JSON = {"Content-Type": "application/json"}
LONG = {  # a chat whose answer cannot be short
    "messages": [{"role": "user", "content": "Age: 23"}],
    "response_format": {
        "type": "json_schema",
        "json_schema": {"name": "long", "schema": {"type": "array", "items": {"type": "integer"}, "minItems": 30}},
    },
    "max_tokens": 400,
    "temperature": 1,  # greedily it would repeat itself, which is soon done
    "seed": 1,
}


def make_run(folder: Path, base: str, seed: int, method: str = "sft", *, r: int = 4, spread: float = 0.3) -> Path:
    """An adapter of random weights, those of B so far from 0, as a trainer leaves it."""
    import torch

    from common.models import adapters, tokenizers
    from common.models import loading as models

    model = models.load_base(ModelSource(base, dtype="float32"))
    fingerprint = adapters.fingerprint(model)
    adapted = adapters.add_lora(model, r=r, alpha=2 * r, dropout=0.0, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * spread
    adapted.save_pretrained(str(folder))
    tokenizers.load_tokenizer(base).save_pretrained(folder)
    record = {"method": method, "started": "2026-01-02T03:04:05Z", "state": "done", "base_fingerprint": fingerprint}
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def make_adapter(folder: Path, base: str, **settings: Any) -> Path:
    """An adapter of random weights with settings of PEFT's, and no record of a training."""
    import torch
    from peft import LoraConfig, get_peft_model

    from common.models import loading, tokenizers

    torch.manual_seed(5)
    model = loading.load_base(ModelSource(base, dtype="float32"))
    chosen = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]} | settings
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **chosen))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name or "lora_embedding_B" in name:
            parameter.data = torch.randn(parameter.shape) * 0.3
        elif "lora_magnitude" in name:
            parameter.data = parameter.data * (1 + 0.1 * torch.rand(parameter.shape))
    adapted.save_pretrained(str(folder), save_embedding_layers=False)  # the base has them
    tokenizers.load_tokenizer(base).save_pretrained(folder)
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


def settings(runs_dir: Path | str, **changes: Any) -> ServerSettings:
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
        "request_timeout": float(LONGEST),
        "max_body_bytes": 1 << 20,
        "api_key": None,
        "audit_log": None,
        "audit_inputs": False,
        "audit_max_bytes": 1 << 20,
        "preload": False,
    }
    return ServerSettings(**(every | changes))


def fork(end: socket.socket) -> SimpleNamespace:
    """`model_process.launch`, without the seconds that the imports take."""
    child = fork_server().Process(target=_serve_model, args=(end,), daemon=True)
    child.start()
    return SimpleNamespace(pid=child.pid, wait=lambda: (child.join(), child.exitcode)[1])


def _serve_model(end: socket.socket) -> None:
    gc.freeze()  # what was imported before the fork stays, and its pages stay shared
    adapter_host.main(end)


class Served(Client):
    """A running server: `app`, `server` and `uvicorn` are its insides."""

    def __init__(self, app, uvicorn_server, port: int) -> None:
        super().__init__(port)
        self.app, self.server, self.uvicorn = app, app.state.server, uvicorn_server

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

    def expire(self) -> None:
        """The time of the requests that are under way is over."""
        for pending, (request, _) in list(self.server.waiting.items()):
            self.server.waiting[pending] = (request, time.monotonic())

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """The model's process stands still in the middle of what it does."""
        (process,) = self.processes
        os.kill(process.process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(process.process.pid, signal.SIGCONT)

    @contextlib.contextmanager
    def held(self, run: str = "sft") -> Iterator[None]:
        """The model's process is there and stands still, so that what is sent to it waits."""
        self.post(f"/infer/{run}", {"features": ROWS[0]})
        with self.stopped():
            yield


launch = model_process.launch  # as it is
model_process.launch = fork


@contextlib.contextmanager
def serve(runs_dir: Path | str, **changes: Any) -> Iterator[Served]:
    """The server in a thread of this process; stopped at the end as by a signal."""
    import_for_forks()  # so that no request waits for it
    app = create_app(settings(runs_dir, **changes))
    with run_app(app) as (server, port):
        yield Served(app, server, port)


def same(answer: dict, wanted: dict) -> None:
    """Equal but for what another batch does to the last digits."""
    assert list(answer) == list(wanted)
    assert answer["model_name"] == wanted["model_name"]
    for key in ("scores", "raw_scores", "prior", "probabilities"):
        assert answer[key] == pytest.approx(wanted[key], abs=1e-4), key
    assert answer["top2_margin"] == pytest.approx(wanted["top2_margin"], abs=1e-4)
    assert answer["prediction"] == wanted["prediction"] or wanted["top2_margin"] < 1e-4


def metric(served, start: str, *parts: str) -> float:
    """A figure of /metrics."""
    lines = served.ask("GET", "/metrics")[1].splitlines()
    return next(
        float(line.rpartition(" ")[2]) for line in lines if line.startswith(start) and all(p in line for p in parts)
    )


def figure(page: str, name: str) -> float:
    return next((float(line.removeprefix(name)) for line in page.splitlines() if line.startswith(name + " ")), 0.0)


def chat_turn(role: str) -> dict[str, str]:
    return {"role": role, "content": "x"}
