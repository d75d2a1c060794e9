"""Make up support tickets with a severity: the rows of recipes/ticket_severity.yaml.

    python recipes/make_tickets.py --rows 24000 --out data/tickets.jsonl
    python recipes/make_tickets.py --task recipes/ticket_urgency.yaml --out data/tickets.jsonl

Each row has a ticket, its severity and its customer (some three tickets each). Severity follows from the symptom, the
users affected, the hours open and whether there is a workaround, plus what no text tells: a customer's temper and
chance. So no model can be right on all rows, and severe ones are rare, as in life. --task gives the four labels, from
the mildest to the worst, and the key under which rows have theirs.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # run by its path

from common import cli
from common.files import write_jsonl
from common.tasks.ranking.task import LabelTask, from_yaml

PRODUCTS = ("Billing", "Search", "Reports", "Mail", "Mobile app", "Web shop", "Single sign-on", "Export")
SYMPTOMS = {  # how bad each is by itself
    "a label is misspelt": -1.5,
    "colours look odd in dark mode": -1.2,
    "the help page is out of date": -1.0,
    "sorting forgets its order": -0.4,
    "pages load slowly": 0.2,
    "numbers differ from last week": 0.6,
    "mails arrive an hour late": 0.6,
    "uploads fail now and then": 0.9,
    "nobody can log in": 2.0,
    "orders are charged twice": 2.3,
    "data of other customers is shown": 2.8,
}
CUTS = (2.2, 3.5, 4.8, math.inf)  # severity below which each label holds
TASK = Path(__file__).with_name("ticket_severity.yaml")


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__, prog="recipes/make_tickets.py")
    parser.add_argument("--rows", type=cli.positive_int, default=24_000)
    parser.add_argument("--out", default="data/tickets.jsonl")
    parser.add_argument("--task", metavar="FILE.yaml", default=str(TASK), help=f"default: recipes/{TASK.name}")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = cli.parse_args(build_parser(), argv)
    task = from_yaml(args.task)
    if len(task.labels) != len(CUTS):
        raise cli.UserError(f"--task {args.task} has {len(task.labels)} labels; give one of {len(CUTS)}")
    rng = random.Random(args.seed)
    tempers = [rng.gauss(0, 0.4) for _ in range(-(-args.rows // 3))]
    count = write_jsonl(args.out, (ticket(rng, tempers, task) for _ in range(args.rows)))
    print(f"{args.out}: {count:,} made-up tickets")


def ticket(rng: random.Random, tempers: Sequence[float], task: LabelTask) -> dict:
    """One row: its customer is drawn, so some have more tickets than others."""
    customer = rng.randrange(len(tempers))
    symptom = rng.choice(list(SYMPTOMS))
    users = max(1, round(10 ** rng.uniform(0, 4)))
    hours = max(1, round(rng.expovariate(1 / 20)))
    stuck = rng.random() < 0.5
    severity = SYMPTOMS[symptom] + 0.9 * math.log10(users) + hours / 40 + 0.8 * stuck
    severity += tempers[customer] + rng.gauss(0, 0.4)
    return {
        "ticket": f"{rng.choice(PRODUCTS)}. Users affected: {users}, Hours open: {hours}, {symptom}, "
        + ("no workaround" if stuck else "workaround known"),
        task.label_field: next(label for label, cut in zip(task.labels, CUTS, strict=True) if severity < cut),
        "customer": f"C{customer:05d}",
        "synthetic": True,
    }


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
