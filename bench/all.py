"""Every comparison in turn, against peers and against its limit: one table, and one JSON line last.

    python bench/all.py
    python bench/all.py --quick --only label_ranking exports
    python bench/all.py --tokenizer QWEN_TOKENIZER_DIR --write docs/results.md
    python bench/all.py --student Qwen/Qwen2.5-3B-Instruct --teacher Qwen/Qwen2.5-7B-Instruct --dtype bfloat16 \\
        --unsloth_python .venv-gpu-peers/bin/python --vllm_python .venv-gpu-peers/bin/python

The defaults work after ./demo.sh. Each bench is a process of its own, warms its contestants up and gives medians of
rounds; what it needs and is not there is made first: the exports of the SFT run, and a larger model of random weights
for a teacher. A bench that fails is shown with its last line, the others still run, and the exit code is 1. --write
puts the result between the two marker comments of a Markdown file; publish what an otherwise idle machine gave, at a
commit without changes, and set OMP_NUM_THREADS as it is to be read.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import harness  # noqa: F401 (which finds the repository)

from common import cli, run_record
from common.files import atomic_write, read_text
from common.models import adapters
from common.models.source import looks_local

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- bench/all.py: begin -->", "<!-- bench/all.py: end -->"
EXPORTS = ("merged", "onnx", "int8")
ADAPTERS = ("creditmix_sft", "creditmix_kd", "creditmix_dpo")  # what ./demo.sh trains
PEERS = ("lm_eval", "xgrammar", "outlines_core", "llguidance", "onnxruntime", "unsloth", "vllm")


@dataclass(frozen=True)
class Bench:
    """How a bench is read.

    Attributes:
        ours: the contestant that the others are compared with; empty: the first.
        limit: the contestant that is the limit; empty: every entry has its own.
        what: the limit in words.
        sizes: flags of the published run, and of --quick.
    """

    title: str
    ours: str
    limit: str
    what: str
    sizes: tuple[str, str]


BENCHES = {
    "train_throughput": Bench(
        "Training throughput",
        "ours",
        "limit",
        "forward, backward and AdamW's step alone, on the same rows, sorted by length and collated beforehand",
        ("--steps 12 --rounds 3", "--steps 4 --rounds 1"),
    ),
    "label_ranking": Bench(
        "Label ranking",
        "ours",
        "limit",
        "a bare forward pass over the tokens in which rows differ, head at one position",
        ("--rows 1024 --rounds 3", "--rows 64 --naive_rows 4 --rounds 1"),
    ),
    "json_decoding": Bench(
        "JSON decoding",
        "ours",
        "limit",
        "writing -inf over one row of scores, which any mask has to do",
        ("--rounds 8", "--rounds 1"),
    ),
    "serve_load": Bench(
        "Server under load",
        "clients",
        "script",
        "the script's batched scorer on the same rows and adapters, without a server",
        ("--seconds 60 --rounds 3", "--seconds 2 --rounds 1 --rows 64 --clients 8"),
    ),
    "distill_cache": Bench(
        "Distillation from a cache",
        "cache_top64",
        "sft",
        "plain SFT of the same rows and steps, which distillation cannot do less than",
        ("--steps 40 --rounds 3", "--steps 10 --rounds 1"),
    ),
    "exports": Bench(
        "Exports",
        "",
        "",
        "of tokens/s one reading of the model's weights for each token, of rows/s a bare forward pass in torch",
        ("--rows 512 --rounds 5", "--rows 64 --rounds 1"),
    ),
}


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__, prog="bench/all.py")
    parser.add_argument("--only", nargs="+", choices=tuple(BENCHES), metavar="NAME", help=f"of {', '.join(BENCHES)}")
    parser.add_argument("--quick", action="store_true", help="few rows, one round: does it all run? No figures to keep")
    parser.add_argument("--write", metavar="FILE.md", help="replace the text between the markers in this file")
    parser.add_argument("--student", default="models/tiny_student", help="base model: a folder or a Hub id")
    parser.add_argument(
        "--teacher", help="of distill_cache; default: one is made, for the student that ./demo.sh makes"
    )
    parser.add_argument("--runs_dir", default="runs", help="folder of creditmix_sft and what else is served")
    parser.add_argument("--data_dir", default="data", help="folder of creditmix_sft.jsonl, _dev.jsonl and _val.jsonl")
    parser.add_argument("--tokenizer", help="of json_decoding, Qwen2.5's for published figures; default: the student's")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of label_ranking")
    parser.add_argument(
        "--work_dir", type=cli.folder, help="where exports and teacher are made; default: a folder that is removed"
    )
    parser.add_argument("--unsloth_python", metavar="PYTHON", help="see bench/train_throughput.py --help")
    parser.add_argument("--vllm_python", metavar="PYTHON", help="see bench/label_ranking.py --help")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = cli.parse_args(build_parser(), argv)
    if args.write and (args.only or args.quick):
        raise cli.UserError("--write publishes the whole comparison; leave --only and --quick out")
    if args.write:
        replace_section(read_text(args.write), "", args.write)  # now rather than after all the work
    check_inputs(args)
    outcome = {
        "bench": "all",
        "commit": run_record.git_commit(),
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions(),
        "results": [],
    }
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(args.work_dir or temporary)
        everything = commands(args, work)
        for name in args.only or BENCHES:
            outcome["results"].append(measure(name, everything[name], work))
    print(table(outcome["results"]))
    if args.write:
        section = render(outcome, shown([sys.executable, __file__, *(sys.argv[1:] if argv is None else argv)], Path()))
        text = replace_section(read_text(args.write), section, args.write)
        with atomic_write(args.write) as handle:
            handle.write(text)
    print(json.dumps(outcome))
    return cli.FAILED if any(map(failed, outcome["results"])) else cli.DONE


def check_inputs(args: argparse.Namespace) -> None:
    """Refuse to start without what ./demo.sh leaves behind."""
    parts = [Path(args.data_dir) / f"creditmix_{part}.jsonl" for part in ("sft", "dev", "val")]
    needed = [*parts, Path(args.runs_dir) / ADAPTERS[0]]
    needed += [Path(args.student)] if looks_local(args.student) else []
    for path in needed:
        if not path.exists():
            raise cli.UserError(f"{path} is not there; run ./demo.sh first, or see --help for where else it may be")


def commands(args: argparse.Namespace, work: Path) -> dict[str, list[list[str]]]:
    """The commands of each bench: those that make what it needs, and its own last."""
    sft, dev, val = (f"{args.data_dir}/creditmix_{part}.jsonl" for part in ("sft", "dev", "val"))
    run, teacher = f"{args.runs_dir}/{ADAPTERS[0]}", args.teacher or f"{work}/teacher"
    served = [name for name in ADAPTERS if adapters.is_adapter(Path(args.runs_dir) / name)]
    exports = [f"{work}/{form}" for form in EXPORTS]
    flags = {
        "train_throughput": ["--student", args.student, "--data", sft],
        "label_ranking": ["--model", args.student, "--data", val, "--dtype", args.dtype],
        "json_decoding": ["--tokenizer", args.tokenizer or args.student],
        "serve_load": ["--runs_dir", args.runs_dir, "--data", val, *(["--adapters", *served] if served else [])],
        "distill_cache": ["--student", args.student, "--teacher", teacher, "--data", sft],
        "exports": ["--model_dir", run, *exports, "--data", dev],
    }
    for name, peer in (("train_throughput", "unsloth_python"), ("label_ranking", "vllm_python")):
        if python := getattr(args, peer):
            flags[name] += [f"--{peer}", python]
    proof = ["--proof_data", dev, "--proof_rows", "200", "--overwrite"]
    made = {
        "exports": [
            ["export_model.py", "--model_dir", run, "--format", form, "--save_dir", folder, *proof]
            for form, folder in zip(EXPORTS, exports, strict=True)
        ]
    }
    if not args.teacher:
        making = ["tiny_student.py", "--size", "medium", "--steps", "1", "--prompts", sft, "--save_dir", teacher]
        made["distill_cache"] = [making]
    by_bench = {}
    for name, bench in BENCHES.items():
        own = [f"bench/{name}.py", *flags[name], *bench.sizes[args.quick].split()]
        by_bench[name] = [[sys.executable, str(ROOT / script), *rest] for script, *rest in [*made.get(name, []), own]]
    return by_bench


def measure(name: str, steps: Sequence[Sequence[str]], work: Path) -> dict[str, Any]:
    """Run a bench's commands up to the first that fails; the commands, and what became of the last of them."""
    record: dict[str, Any] = {"bench": name, "commands": [], "result": None}
    for words in steps:
        record["commands"].append(shown(words, work))
        cli.log(f"{name}: {record['commands'][-1]}")
        started = time.monotonic()
        code, output, last_line = run(words)
        record |= {"seconds": round(time.monotonic() - started, 1), "exit_code": code, "last_line": last_line}
        if code:
            cli.log(f"{name} failed with exit code {code}: {last_line}")
            return record
    lines = output.splitlines()
    try:
        record["result"] = json.loads(lines[-1])
    except (IndexError, ValueError):
        record |= {"exit_code": cli.FAILED, "last_line": "its last line is not JSON"}
    return record


def run(words: Sequence[str]) -> tuple[int, str, str]:
    """(exit code, stdout, last line of stderr) of a command whose stderr is passed on as it comes."""
    last_line = ""
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(words, stdout=output, stderr=subprocess.PIPE, text=True, errors="replace")
        for line in process.stderr:
            sys.stderr.write(line)
            last_line = line.strip() or last_line
        code = process.wait()
        output.seek(0)
        return code, output.read(), last_line


def shown(words: Sequence[str], work: Path) -> str:
    """A command as another machine would run it: no path of this one."""
    command, flag = ["python"], ""
    for word in words[1:]:
        flag = word if word.startswith("--") else flag
        path = Path(word)
        if work.parts and path.is_relative_to(work):
            word = str(Path("WORK_DIR") / path.relative_to(work))
        elif path.is_absolute():
            inside = path.is_relative_to(ROOT)
            word = str(path.relative_to(ROOT)) if inside else flag.removeprefix("--").upper()
        command.append(word)
    return shlex.join(command)


def machine() -> dict[str, Any]:
    """`run_record.machine`, asked in a process of its own: torch would keep a part of a card in this one."""
    asking = "import json; from common import run_record; print(json.dumps(run_record.machine()))"
    return json.loads(subprocess.run([sys.executable, "-c", asking], cwd=ROOT, capture_output=True, check=True).stdout)


def versions() -> dict[str, str]:
    """Of what decides a result, and of the peers that are installed beside it."""
    installed = run_record.versions()
    for name in PEERS:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return installed


class Figure(NamedTuple):
    """One contestant's speed, and what else is known of it."""

    contestant: str
    unit: str
    median: float
    low: float
    high: float
    of_ours: float
    of_limit: float | None
    others: dict[str, float]

    def speed(self) -> str:
        return f"{self.median:,.1f} [{self.low:,.1f}, {self.high:,.1f}]"

    def limit(self) -> str:
        return "-" if self.of_limit is None else f"{self.of_limit:.3f}"


def entries(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """{unit: {contestant: entry}} of a bench's rows, which have one unit, or several with an entry each."""
    grouped: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        several = {key: value for key, value in row.items() if isinstance(value, dict)}
        unit = next((key.removesuffix("_per_s") for key in row if key.endswith("_per_s")), "")
        for key, entry in (several or {unit: row}).items():
            grouped.setdefault(key, {})[row["name"]] = entry
    return grouped


def figures(name: str, result: dict[str, Any]) -> Iterator[Figure]:
    """All speeds of a bench."""
    bench = BENCHES[name]
    for unit, of_unit in entries(result["rows"]).items():
        speeds = {contestant: entry[f"{unit}_per_s"] for contestant, entry in of_unit.items()}
        ours = speeds[bench.ours or next(iter(speeds))]
        for contestant, entry in of_unit.items():
            limit = entry.get("limit_per_s", speeds.get(bench.limit))
            known = {f"{unit}_per_s", "name", "min", "max", "limit_per_s", "of_limit"}
            yield Figure(
                Path(contestant).name,
                unit,
                speeds[contestant],
                entry["min"],
                entry["max"],
                speeds[contestant] / ours,
                speeds[contestant] / limit if limit else None,
                {key: value for key, value in entry.items() if key not in known},
            )


def table(results: Sequence[dict[str, Any]]) -> str:
    """All benches for reading in a terminal."""
    lines = [("bench", "contestant", "median [min, max]", "", "of ours", "of limit", "the limit")]
    for record in results:
        name = record["bench"]
        if failed(record):
            lines.append((name, "failed", record["last_line"], *[""] * 4))
            continue
        names = name, BENCHES[name].what  # in its first line alone
        for figure in figures(name, record["result"]):
            ratio = f"{figure.of_ours:.2f}"
            cells = (figure.contestant, figure.speed(), f"{figure.unit}/s", ratio, figure.limit())
            lines.append((names[0], *cells, names[1]))
            names = "", ""
    widths = [max(len(line[column]) for line in lines if line[1] != "failed") for column in range(7)]
    padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join("  ".join(cells).rstrip() for cells in padded)


def failed(record: dict[str, Any]) -> bool:
    return record["exit_code"] != 0 or not record["result"]


def render(outcome: dict[str, Any], command: str) -> str:
    """The section of a Markdown file."""
    commit, _, changes = (outcome["commit"] or "unknown").partition("+")
    machine = outcome["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in outcome["versions"].items())
    memory = f", {machine['memory_gib']} GiB" if machine["memory_gib"] else ""
    lines = [
        f"By `{command}`, {outcome['date']}, commit {commit[:7]}{' with changes in the tree' if changes else ''}; "
        f"{machine['cpu']}, {machine['cores']} cores{memory}, {machine['gpu'] or 'no GPU'}, "
        f"OMP_NUM_THREADS {machine['threads'] or 'not set'}, load {machine['load']} at the start; {packages}.",
        "",
        "Medians of rounds in turn, after a warm-up, with the least and the most; each speed also as a share of this "
        "toolkit's (in Exports of the first model's) and of the limit's.",
    ]
    for record in outcome["results"]:
        bench = BENCHES[record["bench"]]
        lines += ["", f"### {bench.title}", "", *(f"    {command}" for command in record["commands"]), ""]
        if failed(record):
            lines += [f"**Failed** with exit code {record['exit_code']}: {record['last_line']}"]
            continue
        lines += [f"The limit: {bench.what}. {record['seconds']:,.0f} s.", ""]
        lines += ["| contestant | speed | of ours | of the limit | besides |", "| --- | --- | --- | --- | --- |"]
        for figure in figures(record["bench"], record["result"]):
            besides = ", ".join(f"{key} {value:g}" for key, value in figure.others.items())
            speed = f"{figure.speed()} {figure.unit}/s"
            lines.append(f"| {figure.contestant} | {speed} | {figure.of_ours:.2f} | {figure.limit()} | {besides} |")
    return "\n".join(lines)


def replace_section(text: str, section: str, path: str) -> str:
    """`text` with `section` between the markers.

    Raises:
        UserError: they are not both there once, the beginning first.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in before + after:
        raise cli.UserError(f"{path} needs the lines {BEGIN} and {END} once each, around the place of the result")
    return f"{before}{BEGIN}\n{section}\n{END}{after}"


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
