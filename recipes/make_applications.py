"""Make up letters in which people apply for a credit, with the fields of recipes/application_schema.json.

    python recipes/make_applications.py --rows 3000 --out data/applications.jsonl

Each row has the letter as "document", its "fields" and an "id". The people are those of CreditMix's synthetic rows.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # run by its path

from common import cli
from common.files import write_jsonl
from common.tasks.ranking import creditmix

OPENINGS = ("Dear Sir or Madam,", "Hello,", "Dear credit team,", "To whom it may concern,")
CLOSINGS = ("Kind regards", "Yours faithfully", "Thank you", "Best wishes")
NAMES = ("A. Novak", "B. Silva", "C. Haddad", "D. Meyer", "E. Okafor", "F. Rossi", "G. Tanaka", "H. Virtanen")
LINES = {  # a line of a letter for each field, in one wording or another
    "age": ("I am {} years old.", "My age is {}."),
    "occupation": ("I work as a {}.", "Occupation: {}.", "My profession is {}."),
    "annual_income": ("I earn {} a year.", "My annual income is {}."),
    "outstanding_debt": ("I still owe {}.", "My outstanding debt is {}."),
    "credit_utilization_ratio": ("I use {} % of my credit limit.", "Credit utilization: {} %."),
    "payment_behaviour": ("I spend {}.", "My spending is {}."),
}
SPENDING = {"Low": "little", "High": "a lot"}


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__, prog="recipes/make_applications.py")
    parser.add_argument("--rows", type=cli.positive_int, default=3000)
    parser.add_argument("--out", default="data/applications.jsonl")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = cli.parse_args(build_parser(), argv)
    rng = random.Random(args.seed)
    made_up = creditmix.synthesize(4 * args.rows, args.seed)  # at most 4 a person
    lines = [creditmix.clean_features(row["question"]) for row in made_up]
    people = list({creditmix.group_of(line): line for line in lines}.values())[: args.rows]
    rows = (letter(rng, number, line) for number, line in enumerate(people, start=1))
    count = write_jsonl(args.out, rows)
    print(f"{args.out}: {count:,} made-up letters")


def letter(rng: random.Random, number: int, line: str) -> dict:
    """One row, of the person that a CreditMix line of features tells of."""
    features = dict(creditmix.split_features(line))
    fields = {
        "age": int(float(features["Age"])),
        "occupation": features["Occupation"].replace("_", " "),
        "annual_income": float(features["Annual Income"]),
        "outstanding_debt": float(features["Outstanding Debt"]),
        "credit_utilization_ratio": float(features["Credit Utilization Ratio"]),
        "payment_behaviour": features["Payment Behaviour"],
    }
    level, _, size = features["Payment Behaviour"].split("_")[:3]
    said = fields | {"payment_behaviour": f"{SPENDING[level]}, in {size.lower()} payments"}
    lines = [rng.choice(LINES[field]).format(value) for field, value in said.items()]
    rng.shuffle(lines)
    document = "\n".join([rng.choice(OPENINGS), *lines, f"{rng.choice(CLOSINGS)}, {rng.choice(NAMES)}"])
    return {"document": document, "fields": fields, "id": f"A{number:05d}"}


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
