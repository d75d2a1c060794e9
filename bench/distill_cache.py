"""Distillation from a cache against a live teacher and against plain SFT: step time, peak memory, losses, in turn.

    python bench/distill_cache.py --student models/tiny_student --teacher models/tiny_teacher \\
        --data data/creditmix_sft.jsonl --steps 40

Every contestant is the command that a person would run, in a process of its own, with the same rows, order, seed and
steps: sft_train.py, and distill_train.py (forward_kl and ce, half each) with a live teacher, with a cache of the top
64, and with a cache of everything. The caches are written before the turns. Speed is optimizer steps a second after a
warm-up, the median of the rounds; plain SFT is the limit, as distillation cannot do less, and `of_limit` is the share
of its speed that the cache of 64 has. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from harness.interleave import print_table, take_turns

from common import cli
from common.data import rows as records
from common.files import write_jsonl
from common.models import loading as models

ROOT = Path(__file__).parents[1]
WARM_UP = 4  # optimizer steps that are not timed
EVERYTHING = "1000000"  # --cache_k: as many as there are
LAST = 0.25  # share of the steps whose mean loss is compared


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__, prog="bench/distill_cache.py")
    parser.add_argument("--student", required=True, help="a folder or a Hub id")
    parser.add_argument("--teacher", required=True, help="a folder or a Hub id, of the student's vocabulary")
    parser.add_argument("--data", required=True, help="SFT rows, JSONL")
    parser.add_argument("--steps", type=cli.positive_int, default=40, help="optimizer steps a round")
    parser.add_argument("--rounds", type=cli.positive_int, default=3)
    parser.add_argument("--batch", type=cli.positive_int, default=16, help="rows an optimizer step")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=cli.seed, default=0)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = cli.parse_args(build_parser(), argv)
    if args.steps <= 2 * WARM_UP:
        raise cli.UserError(f"--steps must be above {2 * WARM_UP}; the first {WARM_UP} are not timed")
    for model in (args.student, args.teacher):
        models.check_model_dir(model)
    rows = records.read_rows(args.data, records.SFT_KEYS)[: args.steps * args.batch]
    if len(rows) < args.steps * args.batch:
        raise cli.UserError(f"{args.data} has {len(rows)} rows, {args.steps * args.batch} are needed; lower --steps")
    with tempfile.TemporaryDirectory() as folder:
        compare(args, rows, Path(folder))


def compare(args: argparse.Namespace, rows: list[dict], folder: Path) -> None:
    """Write the caches, let the contestants take turns, print the table and the JSON line."""
    write_jsonl(folder / "rows.jsonl", rows)
    distill = ["distill_train.py", "--teacher", args.teacher]
    contestants = {
        "sft": ["sft_train.py"],
        "live": distill,
        "cache_top64": [*distill, "--teacher_cache", str(folder / "top64"), "--cache_k", "64"],
        "cache_all": [*distill, "--teacher_cache", str(folder / "all"), "--cache_k", EVERYTHING],
    }
    for name in ("cache_top64", "cache_all"):
        run(args, contestants[name], folder, steps=1)
    results: dict[str, dict] = {}

    def turn(name: str) -> float:
        speed, results[name] = run(args, contestants[name], folder, args.steps)
        return speed

    names = {name: (lambda name=name: turn(name)) for name in contestants}
    table = take_turns(names, args.rounds, "steps")
    for name, entry in table.items():
        entry |= results[name]
    print_table(table, "steps")
    speed = {name: entry["steps_per_s"] for name, entry in table.items()}
    ratios = {
        "cached_step_time_of_sft": round(speed["sft"] / speed["cache_top64"], 3),
        "of_limit": round(speed["cache_top64"] / speed["sft"], 3),
        "cached_vs_live": round(speed["cache_top64"] / speed["live"], 2),
        "cached_peak_memory_of_sft": round(table["cache_top64"]["peak_mb"] / table["sft"]["peak_mb"], 3),
        "loss_of_cache_all_less_live": round(table["cache_all"]["last_loss"] - table["live"]["last_loss"], 6),
        "loss_of_cache_top64_less_live": round(table["cache_top64"]["last_loss"] - table["live"]["last_loss"], 6),
    }
    rows = [{"name": name, **entry} for name, entry in table.items()]
    print(json.dumps({"bench": "distill_cache", "settings": vars(args), "rows": rows, "ratios": ratios}))


def run(args: argparse.Namespace, command: Sequence[str], folder: Path, steps: int) -> tuple[float, dict[str, float]]:
    """One contestant's training: steps a second, and its peak memory and losses.

    Raises:
        UserError: the command failed; with its last words.
    """
    save_dir = folder / "run"
    settings = {
        "--student": args.student,
        "--data": folder / "rows.jsonl",
        "--save_dir": save_dir,
        "--max_steps": steps,
        "--per_device_train_batch_size": args.batch,
        "--gradient_accumulation_steps": 1,
        "--learning_rate": args.learning_rate,
        "--seed": args.seed,
        "--logging_steps": 1,
    }
    words = [str(word) for pair in settings.items() for word in pair]
    done = subprocess.run(
        [sys.executable, ROOT / command[0], *command[1:], *words, "--overwrite"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    if done.returncode:
        raise cli.UserError(f"{command[0]} failed: {done.stderr.strip().splitlines()[-1]}")
    log = [json.loads(line) for line in (save_dir / "progress.jsonl").read_text().splitlines()]
    losses = [line for line in log if "loss" in line]
    record = json.loads((save_dir / "run.json").read_text())
    last = losses[-max(1, round(LAST * steps)) :]
    facts = {
        "last_loss": round(statistics.mean(line["loss"] for line in last), 6),
        "peak_mb": round(max(record["peak_memory_bytes"].values()) / 1e6, 1),
    }
    warm = losses[min(WARM_UP, steps) - 1]
    seconds = losses[-1]["time"] - warm["time"]
    return ((losses[-1]["step"] - warm["step"]) / seconds if seconds else 0.0), facts


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
