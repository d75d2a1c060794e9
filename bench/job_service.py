"""The job service under load and under fire: many clients at once, and kill -9 of its processes at random.

    python bench/job_service.py
    python bench/job_service.py --jobs 50 --clients 20 --kills 100 --seed 1

Stand-ins take the place of the trainers (tests/support/jobs_served.py): the service alone is measured. First --clients
submit --jobs at once while as many ask for states; then server, workers and trainings are killed --kills times while
jobs run, each time one of them at random, and what had failed by that is resumed. Every job must succeed, trained by
one process at a time, with files whose SHA-256 is the one listed; those that nobody kills in order, and once. The last
line is JSON. Exit code 1: one did not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import harness  # noqa: F401 (which finds the repository)
from support.jobs_served import Process, make_place, sha256

from common import cli
from common.jobs import local_backend
from common.jobs.store import ENDED

LONGEST = 600  # seconds that all jobs may take


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__, prog="bench/job_service.py")
    parser.add_argument("--jobs", type=cli.positive_int, default=50, help="submitted at once")
    parser.add_argument("--clients", type=cli.positive_int, default=20, help="that submit, and that ask meanwhile")
    parser.add_argument("--kills", type=cli.positive_int, default=100, help="of server, worker or training")
    parser.add_argument("--steps", type=cli.positive_int, default=10, help="of a job that is killed; 0.05 s each")
    parser.add_argument("--seed", type=cli.seed, default=0)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = cli.parse_args(build_parser(), argv)
    results = []
    for part in (under_load, under_fire):
        with tempfile.TemporaryDirectory() as folder:
            process = Process(make_place(Path(folder)))
            process.start()
            try:
                results.append(part(process, args))
            finally:
                process.kill()
                for job in process.jobs.iterdir():
                    local_backend.kill_marked(job.name)
        print(", ".join(f"{name} {value}" for name, value in results[-1].items()), file=sys.stderr)
    machine = {"cpus": os.cpu_count(), "load": os.getloadavg()[0]}
    print(json.dumps({"bench": "job_service", "settings": vars(args), "machine": machine, "rows": results}))
    return cli.FAILED if any(result["lost"] or result["wrong"] for result in results) else cli.DONE


def under_load(process: Process, args: argparse.Namespace) -> dict[str, Any]:
    """All jobs at once; how long a state takes meanwhile."""
    states, submissions, stop = [], [], threading.Event()
    ids: list[str] = []

    def submit(number: int) -> str:
        started = time.perf_counter()
        job_id = process.submit(seed=number)
        submissions.append(time.perf_counter() - started)
        ids.append(job_id)
        return job_id

    def ask(number: int) -> None:
        rng = random.Random(number)
        connection = process.connect()
        while not stop.is_set():
            if ids:
                started = time.perf_counter()
                connection.request("GET", f"/status/{rng.choice(ids)}")
                answer = connection.getresponse()
                answer.read()
                states.append(time.perf_counter() - started)
                assert answer.status == 200
            time.sleep(0.1)  # as a page or a script would

    began = time.perf_counter()
    askers = [threading.Thread(target=ask, args=(number,)) for number in range(args.clients)]
    for thread in askers:
        thread.start()
    with ThreadPoolExecutor(args.clients) as pool:
        list(pool.map(submit, range(args.jobs)))
    wait(process, ids)
    took = time.perf_counter() - began
    stop.set()
    for thread in askers:
        thread.join()
    return {"name": "load", **judge(process, ids), "jobs_per_s": round(args.jobs / took, 2), "states": len(states),
            "status": milliseconds(states), "submit": milliseconds(submissions)}  # fmt: skip


def under_fire(process: Process, args: argparse.Namespace) -> dict[str, Any]:
    """kill -9 while jobs run; some jobs always wait."""
    rng, ids = random.Random(args.seed), []
    killed = {"server": 0, "worker": 0, "training": 0}
    resumed = 0
    while sum(killed.values()) < args.kills:
        while len(ids) < 3 or process.status(ids[-2])["state"] in ENDED:
            ids.append(process.submit("slow", max_steps=args.steps, export_onnx=rng.random() < 0.3))
        resumed += resume_failed(process, ids)
        time.sleep(rng.random() * 0.8)
        victim = rng.choice(list(killed))
        if victim == "server":
            process.kill()
            process.start()
        else:
            pid = find(process, ids, victim)
            if pid is None:
                continue
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        killed[victim] += 1
    until = time.monotonic() + LONGEST
    while any(process.status(job_id)["state"] != "succeeded" for job_id in ids) and time.monotonic() < until:
        resumed += resume_failed(process, ids)
        time.sleep(0.2)
    return {"name": "kills", **judge(process, ids, in_order=False), "killed": killed, "resumed": resumed}


def find(process: Process, ids: Sequence[str], victim: str) -> int | None:
    """A process of a running job."""
    for job_id in ids:
        mark = f"{local_backend.MARK}={job_id}".encode()
        marked = [pid for pid in local_backend.process_ids() if mark in local_backend.environment_of(pid)]
        leaders = [pid for pid in marked if os.getpgid(pid) == pid] if marked else []
        others = [pid for pid in marked if pid not in leaders]
        chosen = leaders if victim == "worker" else others
        if chosen:
            return chosen[0]
    return None


def resume_failed(process: Process, ids: Sequence[str]) -> int:
    """Resume what a kill has made fail; how many."""
    failed = [job_id for job_id in ids if process.status(job_id)["state"] == "failed"]
    for job_id in failed:
        process.ask("POST", f"/resume/{job_id}")
    return len(failed)


def wait(process: Process, ids: Sequence[str]) -> None:
    until = time.monotonic() + LONGEST
    while any(process.status(job_id)["state"] not in ENDED for job_id in ids) and time.monotonic() < until:
        time.sleep(0.2)


def judge(process: Process, ids: Sequence[str], in_order: bool = True) -> dict[str, int]:
    """Jobs, those that are lost (not succeeded), those that went wrong: run twice, other bytes, out of order."""
    lost = wrong = files = 0
    jobs = sorted((process.status(job_id) for job_id in ids), key=lambda job: job["created"])
    for job in jobs:
        folder = process.artifacts(job["job_id"])
        if job["state"] != "succeeded":
            lost += 1
            continue
        listed = process.ask("GET", f"/artifacts/{job['job_id']}")[1]["artifacts"]
        files += len(listed)
        right = all(sha256((folder / entry["path"]).read_bytes()) == entry["sha256"] for entry in listed)
        once = not (folder / "TWO_AT_ONCE").exists() and (folder / "model.safetensors").is_file()
        wrong += not (right and once)
        if in_order:  # without a kill in between, a training also ends once
            wrong += (folder / "ends.txt").read_text() != "end\n"
    started = [job["started"] or "" for job in jobs]
    if in_order and started != sorted(started):
        wrong += 1
    return {"jobs": len(jobs), "lost": lost, "wrong": wrong, "files": files}


def milliseconds(seconds: Sequence[float]) -> dict[str, float]:
    """Median, 95th percentile and the longest."""
    cuts = statistics.quantiles(seconds, n=20, method="inclusive")
    figures = {"p50_ms": cuts[9], "p95_ms": cuts[18], "max_ms": max(seconds)}
    return {name: round(1000 * value, 2) for name, value in figures.items()}


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
