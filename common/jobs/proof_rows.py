"""Rows for the proof of an export: some of those that a job trained on, or is judged by, as input and output.

    python -m common.jobs.proof_rows --data runs/jobs/rows.jsonl --output proof.jsonl
    python -m common.jobs.proof_rows --dataset wikitext --subset wikitext-2-raw-v1 --output proof.jsonl

Running text, row after row, is cut into pieces of 64 words, the last 16 of which follow the others.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from common import cli
from common.data import rows as records
from common.data import shapes, squad, training_files, turns
from common.distillation import rows as distill_rows
from common.files import write_jsonl
from common.models import chats

INPUT_WORDS, OUTPUT_WORDS = 48, 16
PIECE = INPUT_WORDS + OUTPUT_WORDS
ANSWERED = (shapes.PREFERENCE, *shapes.TAKES[shapes.DISTILL])  # kinds of rows that tell what is to be answered


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__, prog="python -m common.jobs.proof_rows")
    parser.add_argument("--data", help="a file as the trainers take it")
    parser.add_argument("--dataset", help="a data set as distill_train.py takes it")
    parser.add_argument("--subset", help="of --dataset")
    parser.add_argument("--split", default="train", help="of --dataset")
    parser.add_argument("--text_column", default="text", help="of --dataset")
    parser.add_argument("--rows", type=cli.positive_int, default=64)
    parser.add_argument("--output", type=cli.output_file, required=True, help="JSONL")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = cli.parse_args(build_parser(), argv)
    if (args.data is None) == (args.dataset is None):
        raise cli.UserError("give either --data FILE or --dataset NAME")
    if args.dataset:
        rows = distill_rows.read_dataset(args.dataset, args.subset, args.split, args.text_column)
    else:
        rows = read(args.data)
    pairs = list(as_pairs(rows))
    if not pairs:
        raise cli.UserError(f"{args.data or args.dataset} has fewer than {PIECE} words; give more, or set no_proof")
    step = max(1, len(pairs) // args.rows)
    kept = write_jsonl(args.output, pairs[::step][: args.rows])
    cli.log(f"{kept} rows for the proof of an export")


def read(path: str) -> list[dict]:
    """Rows of a file of any of the trainers; of preferences, the chosen answer.

    Raises:
        UserError: it cannot be read, or its rows have no answers.
    """
    text = path.endswith(".txt") or squad.is_squad(path)
    numbered = () if text else records.iter_rows(path)[1]
    shape = next((shape for _, row in numbered if (shape := shapes.shape_of(row, ANSWERED))), None)
    if shape is None and not text:
        raise cli.UserError(
            f"{path} has no rows with answers, which an export is compared on; set no_proof to export without a proof"
        )
    if shape and shape.kind == shapes.PREFERENCE:
        pairs = training_files.read(path, shapes.DPO, skip_bad_rows=True)
        return [{"input": row["prompt"], "output": row["chosen"]} for row in pairs]
    return distill_rows.read(path, "train", skip_bad_rows=True)


def as_pairs(rows: Iterable[dict]) -> Iterator[dict[str, Any]]:
    """{"input", "output"}, or {"messages"} of chats; of running text, cut across the ends of rows."""
    words: list[str] = []
    for row in rows:
        if "text" not in row:
            yield _pair(row["input"], row["output"])
            continue
        words += row["text"].split()
        for start in range(0, len(words) - PIECE + 1, PIECE):
            middle = start + INPUT_WORDS
            yield {"input": " ".join(words[start:middle]), "output": " ".join(words[middle : start + PIECE])}
        words = words[len(words) - len(words) % PIECE :]


def _pair(prompt: chats.Prompt, answer: str) -> dict[str, Any]:
    if isinstance(prompt, str):
        return {"input": prompt, "output": answer}
    return {"messages": [*prompt, {"role": turns.ASSISTANT, "content": answer}]}


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
