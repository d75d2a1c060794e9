"""What the tests of the job service share: stand-ins for the scripts, and the service on a port of its own.

A stand-in trains nothing and imports no torch. It has its script's flags and leaves what a trainer leaves: run.json,
the live log, checkpoints, weights. Its data file tells it how to behave: {"seconds": a step, "fail_at": step,
"hold_at": step, "until": a file that it then waits for, ...}.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.jobs import local_backend
from common.jobs.local_backend import environment_of, process_ids
from common.jobs.routes import create_app
from common.jobs.service import JobServiceSettings
from common.jobs.store import ENDED
from support.http_server import LONGEST, Client, free_port, run_app
from support.inputs import ROOT
from support.processes import wait_for

TRAINER = """
import fcntl, json, os, signal, subprocess, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from common import cli
from common.{room} import flags

def build_parser():
    parser = cli.parser("A stand-in.", prog="stand_in.py")
    flags.{add_flags}(parser)
    return parser

def main(argv=None):
    args = cli.parse_args(build_parser(), argv)
    how = json.loads(Path(args.data or args.dataset).read_text())["how"]
    folder = Path(args.save_dir)
    folder.mkdir(parents=True, exist_ok=True)
    alone = open(folder / ".alone", "w")
    try:
        fcntl.flock(alone, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        (folder / "TWO_AT_ONCE").touch()

    def write(name, value):
        (folder / ("." + name)).write_text(json.dumps(value))
        os.replace(folder / ("." + name), folder / name)

    write("run.json", {{"state": "running", "argv": sys.argv[1:], "environment": dict(os.environ)}})
    point = folder / "checkpoints" / "checkpoint-1"
    point.mkdir(parents=True, exist_ok=True)
    start = 0
    if args.resume and (point / "state.json").exists():
        start = json.loads((point / "state.json").read_text())
    total = args.max_steps if args.max_steps > 0 else 3
    log = lambda step, **more: (folder / "progress.jsonl").open("a").write(
        json.dumps({{"step": step, "max_steps": total, "time": time.time(), **more}}) + "\\n")
    log(start)
    stopped = []
    if not how.get("deaf"):
        signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
    else:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if how.get("children"):
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    print("training from step", start, flush=True)
    for step in range(start + 1, total + 1):
        while step == how.get("hold_at") and not os.path.exists(how["until"]):
            time.sleep(0.01)
        time.sleep(how.get("seconds", 0))
        with open(folder / "steps.txt", "a") as done:
            done.write(f"{{step}}\\n")
        log(step, loss=round(3 - step / total, 4), forward_kl=1 / step, learning_rate=0.1)
        (point / "new").write_text(json.dumps(step))
        os.replace(point / "new", point / "state.json")
        if step == how.get("fail_at") and not args.resume:
            raise cli.UserError("the stand-in was told to fail; tell it otherwise")
        if step == how.get("fill_at"):
            (folder / "full").write_bytes(bytes(how["fill_bytes"]))
        if stopped:
            print("stopped at", step, flush=True)
            return 130
    (folder / "model.safetensors").write_bytes(args.save_dir.encode()[-60:] * 1000)
    write("config.json", {{"model_type": "stand_in"}})
    with open(folder / "ends.txt", "a") as ends:
        ends.write("end\\n")
    write("run.json", {{"state": "done", "argv": sys.argv[1:], "environment": dict(os.environ)}})

if __name__ == "__main__":
    raise SystemExit(cli.run(main))
"""
EXPORTER = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from common import cli

def main(argv=None):
    parser = cli.parser("A stand-in.")
    for name in ("--model_dir", "--format", "--save_dir", "--proof_data"):
        parser.add_argument(name, required=True)
    parser.add_argument("--quant")
    args = cli.parse_args(parser, argv)
    if not (Path(args.model_dir) / "model.safetensors").is_file():
        raise cli.UserError("no model")
    assert Path(args.proof_data).read_text() == '{{"input": "a", "output": "b"}}\\n'
    Path(args.save_dir).mkdir()
    (Path(args.save_dir) / f"model.{{args.format}}").write_text(args.format)

raise SystemExit(cli.run(main))
"""


def write_scripts(folder: Path) -> Path:
    """The stand-ins, under the names of the scripts."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("distill", "sft", "kd", "dpo"):
        room = "distillation" if name == "distill" else "training"
        add_flags = "add_dpo_flags" if name == "dpo" else "add_flags"
        text = TRAINER.format(root=str(ROOT), room=room, add_flags=add_flags)
        (folder / f"{name}_train.py").write_text(text)
    (folder / "export_model.py").write_text(EXPORTER.format(root=str(ROOT)))
    return folder


def make_place(folder: Path) -> Path:
    """A DATA_DIR with a model and data files for the stand-ins; what lies outside of it is not allowed."""
    data = folder / "data"
    (data / "student").mkdir(parents=True)
    (data / "student" / "config.json").write_text("{}")
    for name, how in {
        "quick": {},
        "slow": {"seconds": 0.03},
        "endless": {"seconds": 0.05, "children": True},
        "deaf": {"seconds": 0.05, "children": True, "deaf": True},
        "failing": {"fail_at": 2},
    }.items():
        write_data(data / f"{name}.jsonl", how)
    write_scripts(folder / "scripts")
    return data


def write_data(path: Path, how: dict[str, Any]) -> None:
    """One row that a trainer could take, too."""
    path.write_text(json.dumps({"input": "a", "output": "b", "how": how}) + "\n")


def settings(data: Path, **changes: Any) -> JobServiceSettings:
    every = {
        "data_dir": data,
        "backend": "local",
        "max_running": 1,
        "max_queue": 1000,
        "keep_days": None,
        "data_quota": None,
        "allowed_roots": (data,),
        "api_prefix": "",
        "api_key": None,
        "max_body_bytes": 1 << 18,
        "warm_up": False,
        "runs_dir": data.parent / "runs",
        "scripts": data.parent / "scripts",
    }
    return JobServiceSettings(**(every | changes))


class ServedJobs(Client):
    """A running service; `data` is its DATA_DIR, `app` and `service` are its insides."""

    def __init__(self, app, port: int) -> None:
        super().__init__(port)
        self.app, self.service = app, app.state.service
        self.data, self.prefix = self.service.settings.data_dir, self.service.settings.api_prefix

    def payload(self, how: str = "quick", **more: Any) -> dict[str, Any]:
        """A request for an SFT by the stand-in."""
        return {
            "method": "sft",
            "student": str(self.data / "student"),
            "data": str(self.data / f"{how}.jsonl"),
            "max_steps": 3,
            **more,
        }

    def submit(self, how: str = "quick", **more: Any) -> str:
        status, answer, _ = self.ask("POST", f"{self.prefix}/distill", self.payload(how, **more))
        assert status == 202, answer
        return answer["job_id"]

    def status(self, job_id: str) -> dict[str, Any]:
        status, answer, _ = self.ask("GET", f"{self.prefix}/status/{job_id}")
        assert status == 200, answer
        return answer

    def until(self, job_id: str, *states: str) -> dict[str, Any]:
        """The status once it is one of these states; ended is enough where none is named."""
        end = time.monotonic() + LONGEST
        while (status := self.status(job_id))["state"] not in (states or ENDED):
            assert time.monotonic() < end, f"waited in vain for {states or ENDED}: {status}"
            time.sleep(0.02)
        return status

    def artifacts(self, job_id: str) -> Path:
        return self.service.jobs_dir / job_id / "artifacts"


@contextlib.contextmanager
def serve_jobs(data: Path, **changes: Any) -> Iterator[ServedJobs]:
    """The service in a thread of this process; stopped at the end as by a signal."""
    app = create_app(settings(data, **changes))
    with run_app(app) as (_, port):
        yield ServedJobs(app, port)


class Process(ServedJobs):
    """The service in a process of its own, that can be killed; started again on the same port and DATA_DIR."""

    def __init__(self, data: Path) -> None:
        self.data, self.prefix, self.jobs = data, "", data / "jobs"
        self.port = free_port()
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        values = json.dumps(dataclasses.asdict(settings(self.data)), default=str)
        words = [sys.executable, str(Path(__file__).with_name("job_server.py")), str(self.port), values]
        self.process = subprocess.Popen(words, start_new_session=True, stderr=subprocess.DEVNULL)
        wait_for(self.is_up)

    def is_up(self) -> bool:
        with contextlib.suppress(OSError):
            return self.ask("GET", "/readyz")[0] == 200
        return False

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def artifacts(self, job_id: str) -> Path:
        return self.jobs / job_id / "artifacts"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def processes_of(job_id: str) -> list[int]:
    """All processes of a job: its worker and what that has started."""
    mark = f"{local_backend.MARK}={job_id}".encode()
    return [pid for pid in process_ids() if mark in environment_of(pid)]
