"""Which calibration: none, prior, batch or fitted, on several label sets, untrained and trained, by one scoring each.

    python bench/calibration.py --model_dir models/tiny_student runs/creditmix_sft
    python bench/calibration.py --model_dir BASE runs/tweet_sentiment_sft runs/squad_topic_sft \\
        --task creditmix recipes/tweet_sentiment.yaml recipes/squad_topic.yaml --keep runs/calibration

A run is judged on the label set that it was trained for, a base on each --task. The rows are those of
creditmix_prepare.py in --data_dir: fits see dev rows, figures are of validation rows, which share no group with
training. Every row is scored once; the four methods differ in what is done with its raw scores. Rows are drawn
--per_class of each label; "as in the file" are those of them that leave the labels as frequent as the file has them.
Prints accuracy, macro-F1, ECE and NLL with 95 % bootstrap intervals over groups, the paired differences to `none`, and
on how many sets each method is better or worse; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import harness  # noqa: F401 (which finds the repository)

from common import cli, run_record
from common.cli import UserError
from common.data.resumable import AnswerStore
from common.models import adapters
from common.models import loading as models
from common.models.source import ModelSource
from common.tasks.ranking.loading import load_task, trained_for

if TYPE_CHECKING:
    import numpy as np

    from common.tasks.ranking.calibration import Calibration
    from common.tasks.ranking.task import LabelTask

MEASURES = {"accuracy": 1, "macro_f1": 1, "ece": -1, "nll": -1}  # and which way is better
TITLES = {"accuracy": "accuracy", "macro_f1": "macro-F1", "ece": "ECE", "nll": "NLL"}
AT_ONCE = 64  # rows whose scores are kept together


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__, prog="bench/calibration.py")
    parser.add_argument("--model_dir", nargs="+", required=True, help="runs of label tasks, and bases")
    parser.add_argument("--task", nargs="+", default=["creditmix"], metavar="FILE.yaml", help="what bases are asked")
    parser.add_argument("--data_dir", default="data", help="folder of TASK_dev.jsonl and TASK_val.jsonl")
    parser.add_argument("--per_class", type=cli.positive_int, default=120, help="validation rows of a label, at most")
    parser.add_argument("--dev_per_class", type=cli.positive_int, default=60, help="dev rows of a label, at most")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--seed", type=cli.seed, default=0, help="of the draw and the bootstrap")
    parser.add_argument("--keep", metavar="FOLDER", help="scores that lie here are not computed again")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = cli.parse_args(build_parser(), argv)
    for model_dir in args.model_dir:
        models.check_model_dir(model_dir)
    entries = []
    for model_dir, task in asked(args.model_dir, args.task):
        entries += judged(scored(args, model_dir, task), args.seed)
    print(tables(entries))
    print(json.dumps({"bench": "calibration", "settings": vars(args), **about(), "rows": entries}))


def about() -> dict[str, Any]:
    """Where and with what it ran."""
    return {"machine": run_record.machine(), "commit": run_record.git_commit()}


def asked(model_dirs: Sequence[str], tasks: Sequence[str]) -> Iterator[tuple[str, LabelTask]]:
    """Each model with its label sets."""
    for model_dir in model_dirs:
        own = trained_for(model_dir)
        for task in [own] if own else map(load_task, tasks):
            yield model_dir, task


@dataclass(frozen=True)
class Scored:
    """Rows with the raw scores of a model: validation rows, dev rows to fit on, and the prior [labels].

    Attributes:
        raw, dev_raw: [n, labels], in nats a token.
        y, dev_y: [n] label indices.
        groups: [n] of the validation rows.
        shares: [labels] how frequent each label is in the validation part of the file.
    """

    model_dir: str
    trained: bool
    task: LabelTask
    raw: np.ndarray
    y: np.ndarray
    groups: list[str]
    shares: np.ndarray
    dev_raw: np.ndarray
    dev_y: np.ndarray
    prior: np.ndarray


def scored(args: argparse.Namespace, model_dir: str, task: LabelTask) -> Scored:
    """The only place where the model runs.

    Raises:
        UserError: the run has been trained on a group of the rows; see also `Draw.rows`.
    """
    import numpy as np

    from common.tasks.ranking.classifier import Classifier
    from common.tasks.ranking.evaluate import true_labels

    source = ModelSource(model_dir, load_in_4bit="off", dtype=args.dtype)
    rows, counts = drawn(task, f"{args.data_dir}/{task.name}_val.jsonl", args.per_class, args.seed)
    dev, _ = drawn(task, f"{args.data_dir}/{task.name}_dev.jsonl", args.dev_per_class, args.seed)
    groups = [row["group"] for row in rows]
    seen = run_record.contamination(model_dir, groups + [row["group"] for row in dev])
    if seen and seen["rows"]:
        raise UserError(f"{model_dir} was trained on groups of {seen['rows']} rows of {args.data_dir}; give other rows")
    cli.log(f"{model_dir}: scoring {len(rows)} validation and {len(dev)} dev rows of {task.name}")
    classifier = Classifier.load(source, task)
    store = AnswerStore(Path(args.keep, "scores.jsonl") if args.keep else None)
    decided_by = [*adapters.identity(source), args.dtype, task.record()]

    def raw(of: Sequence[dict]) -> np.ndarray:
        texts = [row[task.text_field] for row in of]
        windows = store.windows(texts, AT_ONCE, decided_by, lambda batch: classifier.raw_scores(batch).tolist())
        return np.array([row for window, _ in windows for row in window])

    shares = np.array([counts[label] for label in task.labels]) / sum(counts.values())
    return Scored(model_dir, trained_for(model_dir) is not None, task, raw(rows), np.array(true_labels(task, rows)),
                  groups, shares, raw(dev), np.array(true_labels(task, dev)), classifier.prior)  # fmt: skip


def drawn(task: LabelTask, path: str, per_class: int, seed: int) -> tuple[list[dict], dict[str, int]]:
    """So many rows of each label, or as many as the rarest has; and how many of each the file has."""
    from common.data import splits
    from common.tasks.ranking.evaluate import Draw

    rows, _ = task.read(path)
    counts = splits.class_counts(rows, lambda row: row[task.label_field], task.labels)
    return Draw("all", min(per_class, *counts.values()), seed=seed).rows(task, rows, path)


def calibrations(of: Scored, raw: np.ndarray) -> dict[str, Calibration]:
    """The four, for rows with these raw scores."""
    from common.tasks.ranking.calibration import (
        Calibration,
        batch_calibration,
        default_method,
        fit_vector_scaling,
    )

    labels = of.task.labels
    return {
        "none": Calibration(labels, "none"),
        "prior": Calibration(labels, "prior", tuple(of.prior)),
        "batch": batch_calibration(raw, labels),
        "fitted": fit_vector_scaling(of.dev_raw, of.dev_y, labels, prior=of.prior, before=default_method(of.trained)),
    }


def judged(of: Scored, seed: int) -> Iterator[dict[str, Any]]:
    """An entry for each method on each draw: figures, and differences to `none`."""
    import numpy as np

    from common.tasks.ranking import metrics

    for draw, kept in (("balanced", np.arange(len(of.y))), ("as in the file", as_frequent(of.y, of.shares, seed))):
        raw, y, groups = of.raw[kept], of.y[kept], [of.groups[row] for row in kept]
        scores = {name: calibration.apply(raw) for name, calibration in calibrations(of, raw).items()}
        for method, result in scores.items():
            figures = metrics.evaluate(result, y, of.task.labels, groups=groups, seed=seed)
            less_none = metrics.compare(result, scores["none"], y, groups, seed)
            yield {
                "model_dir": of.model_dir,
                "trained": of.trained,
                "task": of.task.name,
                "labels": len(of.task.labels),
                "draw": draw,
                "n": len(y),
                "groups": figures["groups"],
                "dev_rows": len(of.dev_y),
                "method": method,
                **{name: figures[name] for name in MEASURES},
                "minus_none": {name: less_none[name] for name in MEASURES},
            }


def as_frequent(y: np.ndarray, shares: np.ndarray, seed: int) -> np.ndarray:
    """Rows of a balanced draw, as many as can be, such that each label has its share of them; in order."""
    import numpy as np

    rng = np.random.default_rng(seed)
    of_each = [np.flatnonzero(y == label) for label in range(len(shares))]
    most = min(len(rows) / share for rows, share in zip(of_each, shares, strict=True) if share)
    counts = [round(most * share) for share in shares]
    return np.sort(np.concatenate([rng.permutation(rows)[:n] for rows, n in zip(of_each, counts, strict=True)]))


def verdict(entry: dict[str, Any], measure: str) -> int:
    """1 where a method is better than `none`, -1 where it is worse, 0 where the interval of the difference holds 0."""
    difference = entry["minus_none"][measure]
    if difference["low"] <= 0 <= difference["high"]:
        return 0
    return MEASURES[measure] if difference["value"] > 0 else -MEASURES[measure]


def tables(entries: Sequence[dict[str, Any]]) -> str:
    """Figures and differences for each draw, untrained models first, and the count of what is better."""
    lines = []
    for trained in sorted({entry["trained"] for entry in entries}):
        for draw in dict.fromkeys(entry["draw"] for entry in entries):
            those = [entry for entry in entries if (entry["trained"], entry["draw"]) == (trained, draw)]
            lines += [f"### {'Trained' if trained else 'Untrained'}, labels {draw}", "", *figures(those), ""]
            lines += [*counted(those), ""]
    return "\n".join(lines)


def figures(entries: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A row for each model, set and method; a difference whose interval holds no 0 is bold."""
    yield "| model | labels | rows | method | " + " | ".join(f"{name}; less none's" for name in TITLES.values()) + " |"
    yield "| --- | --- | --- | --- |" + " --- |" * len(TITLES)
    for entry in entries:
        cells = [
            Path(entry["model_dir"]).name,
            f"{entry['task']} ({entry['labels']})",
            f"{entry['n']}",
            entry["method"],
        ]
        for measure in MEASURES:
            value, difference = entry[measure], entry["minus_none"][measure]
            cell = f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
            if entry["method"] != "none":
                text = f"{difference['value']:+.3f} [{difference['low']:+.3f}, {difference['high']:+.3f}]"
                cell += f"; **{text}**" if verdict(entry, measure) else f"; {text}"
            cells.append(cell)
        yield f"| {' | '.join(cells)} |"


def counted(entries: Sequence[dict[str, Any]]) -> Iterator[str]:
    """On how many sets each method is better and worse than none."""
    yield "| against none: better, worse, undecided | " + " | ".join(TITLES.values()) + " |"
    yield "| --- |" + " --- |" * len(TITLES)
    for method in dict.fromkeys(entry["method"] for entry in entries if entry["method"] != "none"):
        found = [entry for entry in entries if entry["method"] == method]
        counts = []
        for measure in MEASURES:
            signs = [verdict(entry, measure) for entry in found]
            counts.append(f"{signs.count(1)}, {signs.count(-1)}, {signs.count(0)}")
        yield f"| {method} | {' | '.join(counts)} |"


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
