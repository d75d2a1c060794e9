"""Code for many tasks, or JSON of documents, written together: this checkout against another one, and against less.

    python bench/text_generation.py --model_dir Qwen/Qwen2.5-Coder-0.5B-Instruct --data sanitized-mbpp.json \\
        --baseline ../before
    python bench/text_generation.py --model_dir runs/sft_idp --data receipts.jsonl --schema receipt.json --no_lookup

The tasks are the first of --data in the order of the file, and answers end where eval_codegen.py ends them, at
--max_new_tokens at the latest; with --schema they are documents, and answers are held to it as eval_idp.py holds them.
Each contestant is a process of its own, in turn, with a warm-up that does not count.
Beside seconds, which other work on the machine lengthens, there are CPU seconds, which it hardly does, and the forward
passes that went on with each row and the tokens that they read, which it cannot change. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from harness.interleave import every_round
from harness.workers import found_with

from common import cli, run_record
from common.data import rows as records
from common.generation import json_schema
from common.models.batching import MAX_BATCH_TOKENS
from common.tasks.codegen import rows as code_rows

ROOT = Path(__file__).parents[1]


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__, prog="bench/text_generation.py")
    parser.add_argument("--model_dir", default="models/tiny_coder", help="a run, or a base model's folder or Hub id")
    parser.add_argument("--data", required=True, help="problems, as eval_codegen.py takes them, or documents")
    parser.add_argument("--schema", help="JSON Schema of the documents' fields")
    parser.add_argument("--confidence", action="store_true", help="with each field's, which takes log-probabilities")
    parser.add_argument("--tasks", type=cli.positive_int, default=24, help="how many of them")
    parser.add_argument("--max_new_tokens", type=cli.positive_int, default=512)
    parser.add_argument("--max_batch_tokens", type=cli.positive_int, default=MAX_BATCH_TOKENS)
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--baseline", metavar="DIR", help="another checkout of this repository, measured beside")
    parser.add_argument("--one_by_one", action="store_true", help="measure one row after another, too")
    parser.add_argument("--no_lookup", action="store_true", help="measure without prompt lookup, too")
    parser.add_argument("--rounds", type=cli.positive_int, default=1)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = cli.parse_args(build_parser(), argv)
    tasks = _tasks(args)
    settings = {
        "model_dir": str(Path(args.model_dir).resolve()) if Path(args.model_dir).is_dir() else args.model_dir,
        "dtype": args.dtype,
        "tasks": tasks,
        "schema": json_schema.load(args.schema) if args.schema else None,
        "confidence": args.confidence,
        "decoding": {},
        "max_new_tokens": args.max_new_tokens,
        "max_batch_tokens": args.max_batch_tokens,
    }
    runs_of: dict[str, list[dict[str, Any]]] = {}

    def contestant(name: str, root: str | Path, **changes: Any):
        def run() -> float:
            measured = written_by(root, settings | changes)
            runs_of.setdefault(name, []).append(measured)
            return measured["cpu_seconds"]

        return run

    contestants = {"ours": contestant("ours", ROOT)}
    if args.baseline:
        contestants["baseline"] = contestant("baseline", Path(args.baseline).resolve())
    if args.one_by_one:
        contestants["one by one"] = contestant("one by one", ROOT, max_batch_tokens=1)
    if args.no_lookup:
        contestants["no lookup"] = contestant("no lookup", ROOT, decoding={"prompt_lookup_num_tokens": 0})
    every_round(contestants, args.rounds, lambda seconds: f"{seconds:.1f} CPU seconds")
    rows = [figures(name, runs) for name, runs in runs_of.items()]
    for row in rows:
        print(
            f"{row['name']:10} {row['seconds']:>8.1f} s {row['cpu_seconds']:>8.1f} CPU s "
            f"({row['prompt_cpu_seconds']:.1f} of prompts) {row['steps']:>6} steps of "
            f"{row['rows_per_step']:.1f} rows and {row['tokens_per_step']:.1f} tokens, {row['prompt_passes']} passes "
            f"over prompts, {row['tokens']} tokens"
        )
    ours, texts = rows[0], runs_of["ours"][0]["texts"]
    ratios = {
        row["name"]: {name: round(row[name] / ours[name], 2) for name in ("seconds", "cpu_seconds", "steps")}
        | {"same_answers": sum(a == b for a, b in zip(texts, runs_of[row["name"]][0]["texts"], strict=True))}
        for row in rows[1:]
    }
    about = {"machine": run_record.machine(), "commit": run_record.git_commit(), "settings": vars(args)}
    print(json.dumps({"bench": "text_generation", **about, "n": len(tasks), "rows": rows, "ratios": ratios}))


def _tasks(args: argparse.Namespace) -> list[str]:
    if not args.schema:
        return [problem.prompt for problem in code_rows.read(args.data)[: args.tasks]]
    rows = records.read_rows(args.data, ["document"])
    return [row["document"] for row in rows][: args.tasks]


def written_by(root: str | Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What `harness/write_text.py` finds with a checkout.

    Raises:
        UserError: its process failed.
    """
    return found_with(root, "write_text", given=settings)


def figures(name: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of a contestant's rounds: medians of the seconds, and the counts, which are the same in all."""
    first = runs[0]
    return {
        "name": name,
        "seconds": round(median(run["seconds"] for run in runs), 3),
        "cpu_seconds": round(median(run["cpu_seconds"] for run in runs), 3),
        "prompt_cpu_seconds": round(median(run["prompt_cpu_seconds"] for run in runs), 3),
        "tokens": first["tokens"],
        "steps": first["steps"],
        "rows_per_step": round(first["rows"] / max(1, first["steps"]), 1),
        "tokens_per_step": round(first["step_tokens"] / max(1, first["steps"]), 1),
        "prompt_passes": first["prompt_passes"],
    }


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
