"""The services under fire and under load: nothing lost, nothing frozen, no answer changed, memory flat.

    python bench/reliability.py
    python bench/reliability.py --kills 100 --schemas 10000 --bodies 10000 --minutes 10
    python bench/reliability.py --only schemas --schemas 2500 --seed 3       # the fourth 2,500 of them

Four parts, each of the size that its flag names. `kills`: kill -9 of the job service, its workers and its trainings
(stand-ins, as in bench/job_service.py), and of serve_creditmix.py and its models' processes while clients ask.
`schemas` and `bodies`: hostile requests (tests/support/hostile.py). `soak`: mixed traffic, with the memory of the
server and its models' processes watched. All through, another client asks for /healthz. The models are miniatures of
random weights. The last line is JSON. Exit code 1: an answer was wrong or lost, a server error, a /healthz that took a
second or more (99th percentile), or more growth than --max_growth_mib.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import harness  # noqa: F401 (which finds the repository)
from harness.serving import ServerProcess, running_server

from common import cli, run_record

PARTS = ("kills", "schemas", "bodies", "soak")
RUNS = ("creditmix_sft", "creditmix_kd", "creditmix_dpo")
CLIENTS = 4
POLL = 0.02  # seconds between two questions to /healthz
FROZEN = 1.0  # seconds; a 99th percentile beyond is a failure
SETTLED = 0.25  # share of a soak after which memory is to stay where it is
TOLERANCE = 1e-4  # of a score, in nats: another batch differs in the last digits


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__, prog="bench/reliability.py")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to do; default: all")
    parser.add_argument("--kills", type=cli.positive_int, default=10)
    parser.add_argument("--schemas", type=cli.positive_int, default=200)
    parser.add_argument("--bodies", type=cli.positive_int, default=500)
    parser.add_argument("--minutes", type=float, default=1.0, help="of the soak")
    parser.add_argument("--max_growth_mib", type=float, default=32.0, help="from a quarter of the soak to its end")
    parser.add_argument("--seed", type=cli.seed, default=0, help="another one asks for other things")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = cli.parse_args(build_parser(), argv)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for row in measured(args, make_runs(Path(folder))):
            rows.append(row)
            print(", ".join(f"{name} {value}" for name, value in row.items()), file=sys.stderr)
    about = {"machine": run_record.machine(), "commit": run_record.git_commit()}
    print(json.dumps({"bench": "reliability", "settings": vars(args), **about, "rows": rows}))
    return cli.FAILED if any(row["faults"] for row in rows) else cli.DONE


def measured(args: argparse.Namespace, runs: str) -> Iterator[dict[str, Any]]:
    """The parts that were asked for, one after the other; all but the kills at one server."""
    if "kills" in args.only:
        yield from kills(args, runs)
    if others := [part for part in args.only if part in DO]:
        with running_server(runs, quiet=True) as server:
            for part in others:
                yield DO[part](args, server)


def make_runs(folder: Path) -> str:
    """Three adapters of random weights on a miniature, as the tests have them."""
    from support.inputs import CORPUS
    from support.models import build_base
    from support.served import make_runs as make

    from common.models import tokenizers
    from common.training import miniature

    tokenizer = tokenizers.align(miniature.build_tokenizer(CORPUS, vocab_size=420))
    return str(make(folder / "runs", build_base(folder / "base", tokenizer, embeddings=0.3)))


class Watch:
    """A client that asks for /healthz all through.

    Attributes:
        seconds: that each answer took.
        faults: answers that were none, while the server was meant to be there.
    """

    def __init__(self, server: ServerProcess) -> None:
        self.server = server
        self.seconds: list[float] = []
        self.faults = 0
        self.away = False  # the server has been killed on purpose

    def ask(self, stop: threading.Event) -> None:
        """Until it is told to stop."""
        while not stop.is_set():
            was_away, started = self.away, time.perf_counter()
            up = self.server.is_up("/healthz")
            if up:
                self.seconds.append(time.perf_counter() - started)
            elif not (was_away or self.away):
                self.faults += 1
            time.sleep(POLL)

    def figures(self) -> dict[str, Any]:
        """How often it asked, and how long that took in ms."""
        ordered = sorted(self.seconds)
        at = {
            name: ordered[int(share * (len(ordered) - 1))] for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1))
        }
        return {"healthz": len(ordered)} | {f"healthz_{name}_ms": round(1000 * value, 1) for name, value in at.items()}

    @property
    def frozen(self) -> bool:
        """The 99th percentile was a second or more."""
        return sorted(self.seconds)[int(0.99 * (len(self.seconds) - 1))] >= FROZEN


@contextlib.contextmanager
def watched(server: ServerProcess) -> Iterator[Watch]:
    """A `Watch` at work."""
    watch, stop = Watch(server), threading.Event()
    thread = threading.Thread(target=watch.ask, args=(stop,))
    thread.start()
    try:
        yield watch
    finally:
        stop.set()
        thread.join()


class Asker:
    """Clients of an inference server that know what the answers are.

    Attributes:
        statuses: how often each status came; 0 where there was no answer at all.
        wrong: answers that were other than before.
    """

    def __init__(self, server: ServerProcess) -> None:
        from support.http_server import Client
        from support.served import ROWS

        self.client, self.texts = Client(server.port), ROWS
        self.statuses: Counter[int] = Counter()
        self.wrong = 0
        self.expected = {(run, row): self.row(run, row) for run in (*RUNS, "base") for row in range(len(ROWS))}

    def row(self, run: str, row: int) -> dict[str, Any]:
        """The answer to a row, which must come."""
        return self.client.post(f"/infer/{run}", {"features": self.texts[row]})

    def ask(self, path: str, body: Any) -> tuple[int, Any]:
        """(status, answer), counted; (0, None) where the server is not there."""
        try:
            status, answer, _ = self.client.ask("POST", path, body)
        except (OSError, ValueError, http.client.HTTPException):
            status, answer = 0, None
        self.statuses[status] += 1
        return status, answer

    def ask_row(self, rng: random.Random) -> None:
        """A row by a run, compared with what it was before."""
        run, row = rng.choice(list(self.expected))
        status, answer = self.ask(f"/infer/{run}", {"features": self.texts[row]})
        if status == 200:
            self.wrong += not same(answer, self.expected[run, row])

    @property
    def server_errors(self) -> int:
        """Answers of the kind that no client may get: 5xx but for 503 and 504, which say when to come again."""
        return sum(count for status, count in self.statuses.items() if status >= 500 and status not in (503, 504))


def same(answer: dict, expected: dict) -> bool:
    """Whether two answers to a row are equal but for the last digits."""
    scores = zip(answer["raw_scores"].values(), expected["raw_scores"].values(), strict=True)
    return answer["model_name"] == expected["model_name"] and all(abs(a - b) <= TOLERANCE for a, b in scores)


# The parts.


def kills(args: argparse.Namespace, runs: str) -> Iterator[dict[str, Any]]:
    """Half of them of the job service and what it has started, half of the inference server and its model."""
    import job_service
    from support.jobs_served import Process, make_place

    of_jobs = args.kills // 2
    if of_jobs:
        with tempfile.TemporaryDirectory() as folder:
            process = Process(make_place(Path(folder)))
            process.start()
            try:
                settings = argparse.Namespace(kills=of_jobs, steps=10, seed=args.seed)
                row = job_service.under_fire(process, settings)
            finally:
                process.kill()
                for job in process.jobs.iterdir():
                    job_service.local_backend.kill_marked(job.name)
        yield row | {"name": "kills of the job service", "faults": row["lost"] + row["wrong"]}
    yield kill_serving(args.kills - of_jobs, args.seed, runs)


def kill_serving(count: int, seed: int, runs: str) -> dict[str, Any]:
    """Kill the server and its model's process in turns while clients ask; each time wait for an answer."""
    rng, recoveries, orphans = random.Random(seed), [], 0
    killed = {"server": 0, "model": 0}
    with running_server(runs, quiet=True) as server:
        asker = Asker(server)
        with watched(server) as watch, asking(asker, seed):
            for number in range(count):
                time.sleep(rng.random())
                victim = list(killed)[number % 2]
                (model,) = server.models()
                started = time.perf_counter()
                if victim == "server":
                    watch.away = True
                    server.kill()
                    orphans += not is_gone(model)
                    server.start()
                    watch.away = False
                else:
                    os.kill(model, signal.SIGKILL)
                while asker.ask("/infer/base", {"features": asker.texts[0]})[0] != 200:
                    time.sleep(0.1)
                recoveries.append(time.perf_counter() - started)
                killed[victim] += 1
        again = sum(not same(asker.row(*key), answer) for key, answer in asker.expected.items())
    faults = asker.wrong + again + orphans + asker.server_errors
    return {"name": "kills of the inference server", "killed": killed, "statuses": dict(asker.statuses),
            "wrong": asker.wrong + again, "orphans": orphans, "longest_recovery_s": round(max(recoveries), 1),
            **watch.figures(), "faults": faults}  # fmt: skip


def is_gone(pid: int) -> bool:
    """Whether a process ends within five seconds."""
    until = time.monotonic() + 5
    while time.monotonic() < until:
        with contextlib.suppress(OSError):
            if "zombie" not in Path(f"/proc/{pid}/status").read_text():
                time.sleep(0.05)
                continue
        return True
    return False


@contextlib.contextmanager
def asking(asker: Asker, seed: int) -> Iterator[None]:
    """Clients that ask for rows all through."""
    stop = threading.Event()

    def client(number: int) -> None:
        rng = random.Random(1000 * seed + number)
        while not stop.is_set():
            asker.ask_row(rng)
            time.sleep(0.01)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def hostile(
    name: str, count: int, first: int, request: Callable[[int], tuple[str, Any]], server: ServerProcess
) -> dict[str, Any]:
    """So many hostile requests, from number `first` on, by clients that know no pause."""
    asker = Asker(server)
    with watched(server) as watch, ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(lambda number: asker.ask(*request(number)), range(first, first + count)))
    again = sum(not same(asker.row(*key), answer) for key, answer in asker.expected.items())
    five = sum(count for status, count in asker.statuses.items() if status >= 500 or status == 0)
    faults = five + again + watch.faults + watch.frozen
    return {"name": name, "requests": count, "first": first, "statuses": dict(sorted(asker.statuses.items())),
            "wrong_afterwards": again, "healthz_missed": watch.faults, **watch.figures(), "faults": faults}  # fmt: skip


def schemas(args: argparse.Namespace, server: ServerProcess) -> dict[str, Any]:
    """Requests with schemas of every kind."""
    from support.hostile import schema_request

    return hostile("hostile schemas", args.schemas, args.seed * args.schemas, schema_request, server)


def bodies(args: argparse.Namespace, server: ServerProcess) -> dict[str, Any]:
    """Requests with bodies of every kind."""
    from support.hostile import PATHS, hostile_body

    def request(number: int) -> tuple[str, bytes]:
        rng = random.Random(number)
        return rng.choice(PATHS), hostile_body(rng)

    return hostile("hostile bodies", args.bodies, args.seed * args.bodies, request, server)


def soak(args: argparse.Namespace, server: ServerProcess) -> dict[str, Any]:
    """Mixed traffic for a while."""
    from support.served import ROWS

    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "additionalProperties": False}
    turns = [{"role": "user", "content": ROWS[0]}]
    kinds: list[Callable[[Asker, random.Random], Any]] = [
        *[lambda asker, rng: asker.ask_row(rng)] * 6,
        lambda asker, rng: asker.ask(f"/infer/{rng.choice(RUNS)}/batch", [{"features": row} for row in ROWS]),
        lambda asker, rng: asker.ask("/infer/idp", {"document": ROWS[0], "schema": schema, "run": RUNS[0]}),
        lambda asker, rng: asker.ask("/infer/codegen", {"prompt": "a", "max_new_tokens": 4, "run": rng.choice(RUNS)}),
        lambda asker, rng: asker.ask("/v1/chat/completions", {"model": "kd", "messages": turns, "max_tokens": 4}),
        lambda asker, rng: asker.ask("/infer/nope", {"features": "a"}),
        lambda asker, rng: asker.ask("/infer/sft", b"{"),
    ]
    held: list[tuple[float, int]] = []
    asker, began = Asker(server), time.monotonic()
    until = began + 60 * args.minutes

    def client(number: int) -> None:
        rng = random.Random(1000 * args.seed + number)
        while time.monotonic() < until:
            rng.choice(kinds)(asker, rng)

    with watched(server) as watch, ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(client, number) for number in range(CLIENTS)]
        while time.monotonic() < until:
            time.sleep(min(2.0, 6 * args.minutes))
            held.append((time.monotonic() - began, server.resident()))
        for done in clients:
            done.result()
    settled = [size for seconds, size in held if seconds >= SETTLED * 60 * args.minutes]
    growth = (settled[-1] - settled[0]) / 2**20
    faults = asker.wrong + asker.server_errors + asker.statuses[0] + watch.faults + watch.frozen
    return {"name": "soak", "minutes": args.minutes, "requests": asker.statuses.total(),
            "statuses": dict(sorted(asker.statuses.items())), "wrong": asker.wrong,
            "held_mib": [round(size / 2**20) for size in (settled[0], max(settled), settled[-1])],
            "growth_mib": round(growth, 1), "healthz_missed": watch.faults, **watch.figures(),
            "faults": faults + (growth > args.max_growth_mib)}  # fmt: skip


DO = {"schemas": schemas, "bodies": bodies, "soak": soak}

if __name__ == "__main__":
    raise SystemExit(cli.run(main))
