"""The inference server under load: clients at once over several adapters, against the script's scorer and one client.

    python bench/serve_load.py --runs_dir runs --data data/creditmix_val.jsonl --seconds 60
    python bench/serve_load.py --data rows.jsonl --adapters creditmix_sft creditmix_kd --clients 16 --seconds 10
    python bench/serve_load.py --data rows.jsonl --base models/smollm2-135m --seconds 600

With --base the adapters are four of random weights on that model, which need no training.

Starts serve_creditmix.py itself, twice: first to weigh what further adapters add to its resident memory, then for the
load, where every answer is compared with the script's for the same row and adapter. Contestants take turns on the same
rows and adapters: the script's batched scorer (`script`, the limit), one request at a time (`one`), and the clients
together (`clients`). Give the environment the same OMP_NUM_THREADS for both; the server takes all of it over. The last
line is JSON. Exit code 1: a wrong answer or a server error.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from harness.interleave import print_table, take_turns
from harness.serving import ServerProcess, running_server

from common import cli
from common.data import rows as records
from common.models import adapters

TOLERANCE = 1e-4  # of a score, in nats
WARM_ROWS = 64  # requests to each adapter before memory is weighed


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__, prog="bench/serve_load.py")
    parser.add_argument("--runs_dir", default="runs", help="folder of the runs")
    parser.add_argument("--base", help="a model; four adapters of random weights on it take the place of --runs_dir")
    parser.add_argument("--adapters", nargs="+", help="runs to ask; default: the first four adapters there")
    parser.add_argument("--data", required=True, help='JSONL rows with their features under "features" or "question"')
    parser.add_argument("--rows", type=cli.positive_int, default=512, help="rows of it that are asked about")
    parser.add_argument("--clients", type=cli.positive_int, default=64)
    parser.add_argument("--seconds", type=cli.positive_int, default=60, help="of load, over all rounds")
    parser.add_argument("--rounds", type=cli.positive_int, default=3)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = cli.parse_args(build_parser(), argv)
    with contextlib.ExitStack() as until_done:
        if args.base:
            args.runs_dir = until_done.enter_context(tempfile.TemporaryDirectory())
            make_adapters(args.base, Path(args.runs_dir))
        return measure(args)


def measure(args: argparse.Namespace) -> int:
    """Prints the table and the JSON line. Returns the exit code."""
    names = args.adapters or adapters_in(args.runs_dir)
    texts = read_texts(args.data)[: args.rows]
    memory = weigh_adapters(args, names, texts)

    scorer = Script(args, names, texts)
    with running_server(args.runs_dir, PRELOAD="1") as second:
        before = prior_times(args.runs_dir, names)
        started = time.perf_counter()
        second.post(names[0], texts[0])
        first_answer = time.perf_counter() - started
        load = Load(second, names, texts, scorer.expected)
        for name in names:
            second.post(name, texts[0])
        contestants: dict[str, Callable[[], float]] = {
            "script": scorer.speed,
            "one": lambda: load.run(1, max(1.0, args.seconds / args.rounds / 4)),
            "clients": lambda: load.run(args.clients, args.seconds / args.rounds),
        }
        table = take_turns(contestants, args.rounds, "rows")
        priors_kept = prior_times(args.runs_dir, names) == before
        resident = second.resident()
    table["one"] |= load.latency(1)
    table["clients"] |= load.latency(args.clients)
    print_table(table, "rows")
    print(f"{load.answers:,} answers, {load.wrong} wrong, {load.refused} refused, {load.failed} server errors")
    print(f"{len(names) - 1} more adapters add {memory['added']:,} bytes to the memory held, their files have "
          f"{memory['files']:,}; {resident >> 20} MiB held after the load")  # fmt: skip
    speeds = {name: entry["rows_per_s"] for name, entry in table.items()}
    ratios = {
        "of_script": round(speeds["clients"] / speeds["script"], 3),
        "of_limit": round(speeds["clients"] / speeds["script"], 3),
        "vs_one": round(speeds["clients"] / speeds["one"], 2),
        "p95_to_p50": round(table["clients"]["p95_ms"] / table["clients"]["p50_ms"], 2),
        "memory_to_files": round(memory["added"] / memory["files"], 2) if memory["files"] else None,
    }
    counts = {"answers": load.answers, "wrong": load.wrong, "refused": load.refused, "server_errors": load.failed}
    second_start = {"first_answer_ms": round(1000 * first_answer, 1), "priors_computed": not priors_kept}
    machine = {"cpus": os.cpu_count(), "threads": os.environ.get("OMP_NUM_THREADS"), "load": os.getloadavg()[0]}
    rows = [{"name": name, **entry} for name, entry in table.items()]
    result = {"bench": "serve_load", "settings": vars(args) | {"adapters": names}, "machine": machine, "rows": rows,
              "ratios": ratios, "counts": counts, "memory": memory, "second_start": second_start}  # fmt: skip
    print(json.dumps(result))
    return cli.FAILED if load.wrong or load.failed else cli.DONE


def make_adapters(base: str, runs_dir: Path) -> None:
    """Four adapters of a rank that people train, far enough from one another for a mix-up to show."""
    from support.served import make_run

    for number in range(4):
        make_run(runs_dir / f"adapter_{number}", base, seed=number, r=16, spread=0.02)


def adapters_in(runs_dir: str) -> list[str]:
    """The first four adapters of a folder."""
    folder = Path(runs_dir)
    names = sorted(run.name for run in folder.iterdir() if adapters.is_adapter(run)) if folder.is_dir() else []
    if not names:
        raise cli.UserError(f"--runs_dir {runs_dir} has no adapter; train one first, e.g. with ./demo.sh")
    return names[:4]


def read_texts(path: str) -> list[str]:
    rows = records.check_rows(path, records.iter_jsonl(path), ()).rows
    texts = [row.get("features") or row.get("question") for row in rows]
    if not all(isinstance(text, str) for text in texts):
        raise cli.UserError(f"{path}: every row needs its text under 'features' or 'question'")
    return texts


def weigh_adapters(args: argparse.Namespace, names: Sequence[str], texts: Sequence[str]) -> dict[str, int]:
    """Bytes that all adapters but the first add to the memory of a server that has answered for the first."""
    with running_server(args.runs_dir) as fresh:
        for name in ("base", names[0]):
            for text in texts[:WARM_ROWS]:
                fresh.post(name, text)
        before = fresh.resident()
        for name in names[1:]:
            for text in texts[:WARM_ROWS]:
                fresh.post(name, text)
        added = fresh.resident() - before
    files = [Path(args.runs_dir) / name / adapters.ADAPTER_WEIGHTS for name in names[1:]]
    return {"added": added, "files": sum(file.stat().st_size for file in files)}


def prior_times(runs_dir: str, names: Sequence[str]) -> list[int]:
    """When each cached prior was written."""
    files = [Path(runs_dir) / name / "prior.json" for name in names]
    return [file.stat().st_mtime_ns if file.is_file() else 0 for file in files]


class Script:
    """infer_creditmix.py's scorer, in this process."""

    def __init__(self, args: argparse.Namespace, names: Sequence[str], texts: Sequence[str]) -> None:
        from common.models.source import ModelSource
        from common.tasks.ranking import creditmix
        from common.tasks.ranking.classifier import Classifier
        from common.tasks.ranking.creditmix import CREDITMIX

        self.texts = [creditmix.clean_features(text) for text in texts]
        self.classifiers = [Classifier.load(ModelSource(str(Path(args.runs_dir) / name)), CREDITMIX) for name in names]
        self.calibrations = [classifier.calibration(None) for classifier in self.classifiers]
        self.expected = self._answers()

    def _answers(self) -> list[list[dict]]:
        pairs = zip(self.classifiers, self.calibrations, strict=True)
        return [classifier.answers(self.texts, calibration) for classifier, calibration in pairs]

    def speed(self) -> float:
        """Rows a second over all adapters."""
        started = time.perf_counter()
        self._answers()
        return len(self.texts) * len(self.classifiers) / (time.perf_counter() - started)


@dataclass
class Load:
    """Clients that each send a request, wait for its answer, and send the next; plain HTTP on kept connections.

    The two cores are the server's, too: a full HTTP client would take a good part of them.
    """

    server: ServerProcess
    names: Sequence[str]
    texts: Sequence[str]
    expected: Sequence[Sequence[dict]]
    answers: int = 0
    wrong: int = 0
    refused: int = 0
    failed: int = 0
    seconds: dict[int, list[float]] = field(default_factory=dict)

    def run(self, clients: int, seconds: float) -> float:
        """Answers a second."""
        answers: list[tuple[int, int, int, bytes]] = []
        started = time.perf_counter()
        asyncio.run(self._clients(clients, started + seconds, answers))
        took = time.perf_counter() - started
        for adapter, row, status, body in answers:
            self._check(adapter, row, status, body)
        return len(answers) / took

    def latency(self, clients: int) -> dict[str, float]:
        """Median and 95th percentile, in ms."""
        cuts = statistics.quantiles(self.seconds[clients], n=20, method="inclusive")
        return {"p50_ms": round(1000 * cuts[9], 2), "p95_ms": round(1000 * cuts[18], 2)}

    async def _clients(self, clients: int, until: float, answers: list) -> None:
        await asyncio.gather(*(self._client(number, clients, until, answers) for number in range(clients)))

    async def _client(self, number: int, clients: int, until: float, answers: list) -> None:
        rng = random.Random(number)
        reader, writer = await asyncio.open_connection("127.0.0.1", self.server.port)
        times = self.seconds.setdefault(clients, [])
        while (started := time.perf_counter()) < until:
            adapter, row = rng.randrange(len(self.names)), rng.randrange(len(self.texts))
            body = json.dumps({"features": self.texts[row]}).encode()
            writer.write(
                f"POST /infer/{self.names[adapter]} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n".encode()
                + body
            )
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(head.partition(b"content-length:")[2].split(b"\r\n")[0])
            answer = await reader.readexactly(length)
            times.append(time.perf_counter() - started)
            answers.append((adapter, row, int(head[9:12]), answer))
        writer.close()

    def _check(self, adapter: int, row: int, status: int, body: bytes) -> None:
        self.answers += 1
        if status >= 500 and status != 503:
            self.failed += 1
        elif status != 200:
            self.refused += 1
            self.failed += status >= 500
        elif not same(json.loads(body), self.expected[adapter][row]):
            self.wrong += 1


def same(answer: dict, expected: dict) -> bool:
    """Whether an answer is the script's, to the tolerance of its scores."""
    if answer["model_name"] != expected["model_name"] or answer.keys() != expected.keys():
        return False
    groups = ("scores", "raw_scores", "prior", "probabilities")
    if any(abs(answer[key][label] - value) > TOLERANCE for key in groups for label, value in expected[key].items()):
        return False
    return answer["prediction"] == expected["prediction"] or expected["top2_margin"] < TOLERANCE


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
