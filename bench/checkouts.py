"""Training steps and label ranking of a real base on this machine: this checkout against another one, in turn.

    python bench/checkouts.py --student SMOLLM2_135M_DIR --data_dir data --baseline ../before
    python bench/checkouts.py --student SMOLLM2_135M_DIR --documents data/idp_sft.jsonl --baseline ../before

Each contestant is the script that a user calls, a process of its own on the same rows: SFT of 16 rows a step, DPO of 8
pairs, with --documents SFT of 4 of them, and the ranking of --rows rows by the adapter that SFT has just trained, which
is the difference between a call with --rows more and one with few, so that loading does not count. Steps are forward
and backward passes; the first is left out. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from harness.workers import found_with

from common import cli, run_record
from common.files import read_text

ROOT = Path(__file__).parents[1]
FEW = 32  # rows of the call that is taken off


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__, prog="bench/checkouts.py")
    parser.add_argument("--student", required=True, help="base model: a folder or a Hub id")
    parser.add_argument("--data_dir", type=Path, default=Path("data"), help="folder of creditmix_{sft,dpo,val}.jsonl")
    parser.add_argument("--documents", metavar="FILE", help="training rows of documents, as idp_prepare.py writes them")
    parser.add_argument("--baseline", metavar="DIR", required=True, help="another checkout, measured beside")
    parser.add_argument("--steps", type=cli.positive_int, default=4, help="of each training, after the first")
    parser.add_argument("--rows", type=cli.positive_int, default=256, help="to rank")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = cli.parse_args(build_parser(), argv)
    checkouts = {"baseline": Path(args.baseline).resolve(), "ours": ROOT}
    student = str(Path(args.student).resolve()) if Path(args.student).exists() else args.student
    found: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        trainings = {
            "sft": ("sft_train", args.data_dir / "creditmix_sft.jsonl", 16, 256),
            "dpo": ("dpo_train", args.data_dir / "creditmix_dpo.jsonl", 8, 256),
        }
        if args.documents:
            trainings["sft of documents"] = ("sft_train", Path(args.documents), 4, 1024)
        for what, (script, data, batch, max_len) in trainings.items():
            rows = first_rows(data, batch * (args.steps + 1), place / f"{script}_{batch}.jsonl")
            for name, root in checkouts.items():
                run = place / f"{name}_{what.replace(' ', '_')}"
                flags = [
                    *("--student", student, "--data", str(rows), "--save_dir", str(run), "--max_len", str(max_len)),
                    *("--max_steps", str(args.steps + 1), "--per_device_train_batch_size", str(batch)),
                    *("--gradient_accumulation_steps", "1"),
                ]
                note(found, what, name, step_of(measured(root, script, flags)))
        rows = {count: first_rows(args.data_dir / "creditmix_val.jsonl", count, place / f"{count}.jsonl")
                for count in (FEW, FEW + args.rows)}  # fmt: skip
        for name, root in checkouts.items():
            few, many = (
                measured(root, "infer_creditmix", [
                    *("--model_dir", str(place / f"{name}_sft"), "--calibration", "none"),
                    *("--input", str(data), "--output", str(place / f"{name}_{count}_answers.jsonl")),
                ])
                for count, data in rows.items()
            )  # fmt: skip
            seconds = {unit: many[unit] - few[unit] for unit in ("seconds", "cpu_seconds")}
            note(found, f"ranking of {args.rows} rows", name, seconds | {"peak_bytes": many["peak_bytes"]})
    for what, entries in found.items():
        ratio = entries["baseline"]["seconds"] / entries["ours"]["seconds"]
        print(f"{what:24}", *(f"{name} {words(entry)}" for name, entry in entries.items()), f"{ratio:.2f}x", sep="   ")
    about = {"machine": run_record.machine(), "commit": run_record.git_commit(), "settings": vars(args)}
    print(json.dumps({"bench": "checkouts", **about, "found": found}, default=str))


def first_rows(data: Path, count: int, copy: Path) -> Path:
    """The first rows of a JSONL file, in one of their own."""
    lines = read_text(data).splitlines(keepends=True)[:count]
    if len(lines) < count:
        raise cli.UserError(f"{data} has {len(lines)} rows, {count} are needed; take fewer --steps or --rows")
    copy.write_text("".join(lines))
    return copy


def measured(root: Path, script: str, argv: Sequence[str]) -> dict[str, Any]:
    """What `harness/run_script.py` finds with a checkout.

    Raises:
        UserError: its process failed.
    """
    return found_with(root, "run_script", [script, *argv], what=f"{script}.py of ")


def step_of(run: dict[str, Any]) -> dict[str, float]:
    """Medians of the steps after the first, and the peak."""
    seconds, cpu_seconds = zip(*run["steps"][1:], strict=True)
    return {"seconds": median(seconds), "cpu_seconds": median(cpu_seconds), "peak_bytes": run["peak_bytes"]}


def note(found: dict[str, dict[str, dict[str, float]]], what: str, name: str, entry: dict[str, float]) -> None:
    cli.log(f"{what}: {name} {words(entry)}")
    found.setdefault(what, {})[name] = {key: round(value, 3) for key, value in entry.items()}


def words(entry: dict[str, float]) -> str:
    return f"{entry['seconds']:.2f} s {entry['cpu_seconds']:.2f} CPU s {entry['peak_bytes'] / 1e9:.2f} GB"


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
