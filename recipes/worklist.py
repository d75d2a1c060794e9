"""The two joints of recipes/underwriting_worklist.sh: letters read -> lines of features, and answers -> a work list.

    python recipes/worklist.py features --read runs/underwriting/read.jsonl --out runs/underwriting/features.jsonl
    python recipes/worklist.py list --read runs/underwriting/read.jsonl --answers runs/underwriting/answers.jsonl \\
        --out runs/underwriting/worklist.csv
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # run by its path

from common import cli
from common.data import rows as records
from common.files import atomic_write, write_jsonl
from common.tasks.ranking import creditmix
from common.tasks.ranking.creditmix import CREDITMIX

COLUMNS = ("id", "prediction", "top2_margin", "probability_of_bad", "least_confidence", "note")


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__, prog="recipes/worklist.py")
    parser.add_argument("what", choices=("features", "list"))
    parser.add_argument("--read", required=True, help="what infer_idp.py --confidence made of the letters")
    parser.add_argument("--answers", help="for list: what infer_creditmix.py made of the features")
    parser.add_argument("--out", required=True)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = cli.parse_args(build_parser(), argv)
    letters = [row for _, row in records.iter_jsonl(args.read)]
    if args.what == "features":
        write_jsonl(args.out, ({"features": features(row["fields"])} for row in letters if "fields" in row))
        return
    if args.answers is None:
        raise cli.UserError("list needs --answers")
    answers = (row for _, row in records.iter_jsonl(args.answers))
    entries = [entry(row, next(answers) if "fields" in row else None) for row in letters]
    entries.sort(key=urgency)
    with atomic_write(args.out) as handle:
        writer = csv.DictWriter(handle, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(entries)
    print(f"{args.out}: {len(entries):,} applications")


def features(fields: dict) -> str:
    """The fields of a letter as the line that the classifier was trained on: age -> Age, annual_income -> ..."""
    values = fields | {"occupation": fields["occupation"].replace(" ", "_")}
    pairs = ((key.replace("_", " ").title(), str(value)) for key, value in values.items())
    return creditmix.clean_features(creditmix.join_features(pairs))


def entry(letter: dict, answer: dict | None) -> dict:
    """One line of the work list."""
    if answer is None:
        return {"id": letter.get("id"), "note": f"to be read by a person: {letter['error']}"}
    return {
        "id": letter.get("id"),
        "prediction": answer["prediction"],
        "top2_margin": f"{answer['top2_margin']:.3f}",
        "probability_of_bad": f"{answer['probabilities']['Bad']:.3f}",
        "least_confidence": f"{min(letter['confidence'].values()):.3f}",
        "note": "read in part: the answer is cut" if letter.get("cut") else "",
    }


def urgency(entry: dict) -> tuple:
    """Sort key: unread letters and abstentions, then the riskier class first, and in a class the smallest margin."""
    if not entry.get("prediction"):
        return (-len(CREDITMIX.labels), 0.0)
    return (-CREDITMIX.labels.index(entry["prediction"]), float(entry["top2_margin"]))


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
