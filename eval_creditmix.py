"""Judge models on held-out rows by calibrated label ranking, of CreditMix or another task: figures with intervals.

    python eval_creditmix.py --model_dir runs/creditmix_sft --data data/creditmix_dataset.json --val_per_class 1500
    python eval_creditmix.py --model_dir models/tiny_student runs/creditmix_sft runs/creditmix_dpo \\
        --data data/creditmix_dataset.json --report_dir runs/report
    python eval_creditmix.py --model_dir runs/creditmix_sft --fit_calibration data/creditmix_dev.jsonl

Prints a table and, last, one JSON line; --report_dir adds metrics.json, plots and report.html. The split is by
customer (with --task by its group key), the same that creditmix_prepare.py made, and rows whose customer was trained
on are counted. With
--fit_calibration, a per-class bias and a temperature are fitted on dev rows into runs/<name>/calibration.json.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from common import cli, run_record
from common.data import splits
from common.files import read_json, sha256_file
from common.models import adapters
from common.models import loading as models
from common.tasks.ranking import rows as labelled
from common.tasks.ranking import task as tasks
from common.tasks.ranking.flags import add_scoring_flags
from common.tasks.ranking.task import LabelTask

DRIFTED = 3  # exit code of --fail_on_drift


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__, prog="eval_creditmix.py")
    parser.add_argument("--model_dir", required=True, nargs="+", help="run folders, or base models (folder or Hub id)")
    parser.add_argument("--data", help="labelled rows: JSON, JSONL, or the raw CSV (.csv, .csv.gz)")
    parser.add_argument("--features", choices=("six", "all"), default="six", help="columns to read from a raw CSV")
    parser.add_argument("--split", choices=("validation", "dev", "all"), default="validation")
    draw = parser.add_mutually_exclusive_group()
    draw.add_argument("--val_per_class", type=cli.positive_int, help="rows of each class; default: all of the rarest")
    draw.add_argument("--val_frac", type=cli.fraction, help="this share of the split's rows of the rarest class")
    parser.add_argument("--seed", type=int, default=0, help="of the balanced draw and the bootstrap")
    parser.add_argument("--skip_bad_rows", action="store_true", help="go on without bad rows, and count them")
    parser.add_argument("--report_dir", help="write metrics.json, plots and report.html here")
    parser.add_argument("--fit_calibration", metavar="DEV.jsonl", help="fit bias and temperature on these dev rows")
    decision = parser.add_argument_group("decisions, fitted with --fit_calibration")
    decision.add_argument("--optimize", choices=("accuracy", "macro_f1", "cost"), help="what labels are chosen for")
    decision.add_argument("--costs", help='JSON file: {"true label": {"predicted label": cost}}')
    decision.add_argument("--abstain_below", type=cli.fraction, help="no answer under this probability")
    decision.add_argument("--target_precision", type=cli.fraction, help="abstain so that dev answers are this precise")
    drift = parser.add_argument_group("drift")
    drift.add_argument("--baseline", metavar="metrics.json", help="a stored result to compare this one with")
    drift.add_argument("--fail_on_drift", action="store_true", help=f"exit {DRIFTED} on a significant drop")
    add_scoring_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int | None:
    args = cli.parse_args(build_parser(), argv)
    task = tasks.load(args.task)
    check_flags(args, task)
    if args.fit_calibration:
        dev, _ = labelled.read(args.fit_calibration, task, args.features, args.skip_bad_rows)
        for model_dir in args.model_dir:
            fit(args, model_dir, task, dev)
        if not args.data:
            return None
    rows, class_counts = choose_rows(args, task)
    result = {
        "evaluator": task.name,
        "version": 1,
        "data": args.data,
        "data_sha256": sha256_file(args.data),
        "split": args.split,
        "n": len(rows),
        "labels": list(task.labels),
        "group_name": task.group_name,
        "class_counts": class_counts,
        "rows": {
            "ids": [splits.group_hash(row[task.text_field]) for row in rows],
            "y": true_labels(task, rows),
            "groups": [row["group"] for row in rows],
        },
        **run_record.provenance("eval_creditmix.py", argv),
    }
    entries, differences = judge(args, task, rows)
    contamination = run_record.worst_contamination([entry["contamination"] for entry in entries])
    result |= {"contamination": contamination, "models": entries, "differences": differences}
    return publish(args, result)


def check_flags(args: argparse.Namespace, task: LabelTask) -> None:
    """Refuse what cannot work before anything is loaded."""
    if not args.data and not args.fit_calibration:
        raise cli.UserError("give --data with the rows to judge on, or --fit_calibration with dev rows, or both")
    for model_dir in args.model_dir:
        models.check_model_dir(model_dir, args.base)
        if args.fit_calibration and not Path(model_dir).is_dir():
            raise cli.UserError(f"--fit_calibration writes into the model's folder, and {model_dir} is not one")
    if len(set(args.model_dir)) < len(args.model_dir):
        raise cli.UserError("--model_dir names the same model twice; name each once")
    fitting = (args.optimize, args.costs, args.abstain_below, args.target_precision)
    if not args.fit_calibration and any(value is not None for value in fitting):
        raise cli.UserError("--optimize, --costs, --abstain_below and --target_precision go with --fit_calibration")
    if args.fail_on_drift and not args.baseline:
        raise cli.UserError("--fail_on_drift needs --baseline with a stored metrics.json")
    if (args.baseline or args.report_dir) and not args.data:
        raise cli.UserError("--baseline and --report_dir need --data with the rows to judge on")
    # what is read later is read once now: a mistake is found before an hour of scoring, not after it
    cli.parse_label_bias(args.label_bias, task.labels)
    if args.baseline:
        read_json(args.baseline)
    if args.costs:
        cost_matrix(args.costs, task.labels)
    if args.calibration == "fitted" and not args.fit_calibration:
        for model_dir in args.model_dir:
            if not (Path(model_dir) / "calibration.json").is_file():
                raise cli.UserError(f"{model_dir} has no fitted calibration; fit one with --fit_calibration DEV.jsonl")


def choose_rows(args: argparse.Namespace, task: LabelTask) -> tuple[list[dict], dict[str, int]]:
    """The balanced draw that is judged on, and the class counts of the part that it was drawn from."""
    rows, _ = labelled.read(args.data, task, args.features, args.skip_bad_rows)
    what = args.data
    if args.split != "all":
        rows = [row for row in rows if splits.part_of(row["group"]) == args.split]
        what = f"the {args.split} part of {args.data}"
    counts = splits.class_counts(rows, lambda row: row[task.label_field], task.labels)
    per_class = args.val_per_class
    if args.val_frac:
        per_class = max(1, round(args.val_frac * min(counts.values())))
    return splits.balanced(rows, lambda row: row[task.label_field], task.labels, per_class, args.seed, what), counts


def true_labels(task: LabelTask, rows: Sequence[dict]) -> list[int]:
    """Label indices of rows."""
    return [task.labels.index(row[task.label_field]) for row in rows]


def fit(args: argparse.Namespace, model_dir: str, task: LabelTask, dev: list[dict]) -> None:
    """Fit bias, temperature and decision on dev rows, and keep them beside the adapter."""
    import dataclasses

    from common.tasks.ranking import calibration
    from common.tasks.ranking.classifier import CALIBRATION_FILE, Classifier

    trained = run_record.read_groups(model_dir) or set()
    seen, of = splits.overlap((row["group"] for row in dev), trained)
    if seen:
        raise cli.UserError(
            f"{seen} of {of} rows of {args.fit_calibration} are of {task.group_name}s that {model_dir} was trained on; "
            "a calibration needs unseen ones: give the dev rows that creditmix_prepare.py wrote"
        )
    classifier = Classifier.from_flags(args, model_dir, task)
    raw, y = classifier.raw_scores([row[task.text_field] for row in dev]), true_labels(task, dev)
    source = {
        "file": args.fit_calibration,
        "sha256": sha256_file(args.fit_calibration),
        "adapter_sha256": adapters.adapter_hash(model_dir),
    }
    fitted = calibration.fit_vector_scaling(raw, y, task.labels, prior=classifier.prior, fitted_on=source)
    decision = calibration.fit_decision(
        fitted.apply(raw).probabilities,
        y,
        task.labels,
        args.optimize,
        cost_matrix(args.costs, task.labels) if args.costs else None,
        args.abstain_below,
        args.target_precision,
    )
    dataclasses.replace(fitted, decision=decision).save(Path(model_dir) / CALIBRATION_FILE)
    facts = fitted.fitted_on or {}
    cli.log(
        f"{model_dir}: fitted on {len(dev):,} dev rows, temperature {fitted.temperature:.3f}, "
        f"NLL {facts['nll_before']:.4f} -> {facts['nll_after']:.4f}"
    )


def cost_matrix(path: str, labels: Sequence[str]) -> list[list[float]]:
    """costs[true][predicted] from a JSON file of named labels; a pair that is left out costs 0."""
    named = read_json(path)
    if not isinstance(named, dict) or not all(isinstance(row, dict) for row in named.values()):
        raise cli.UserError(f'{path} must be {{"true label": {{"predicted label": cost, ...}}, ...}}')
    unknown = sorted(({*named} | {label for row in named.values() for label in row}) - {*labels})
    if unknown:
        raise cli.UserError(f"{path}: unknown label '{unknown[0]}'; the labels are {', '.join(labels)}")
    return [[named.get(true, {}).get(label, 0.0) for label in labels] for true in labels]


def judge(args: argparse.Namespace, task: LabelTask, rows: list[dict]) -> tuple[list[dict], list[dict]]:
    """One entry per model, and the paired differences of every later model to the earlier ones."""
    from common.tasks.ranking import metrics

    entries, scores = [], []
    for model_dir in args.model_dir:
        cli.log(f"{model_dir}: scoring {len(rows):,} rows")
        entry, calibrated = judge_one(args, model_dir, task, rows)
        entries.append(entry)
        scores.append(calibrated)
    y, groups = true_labels(task, rows), [row["group"] for row in rows]
    differences = [
        {
            "a": args.model_dir[later],
            "b": args.model_dir[earlier],
            **metrics.compare(scores[later], scores[earlier], y, groups, args.seed),
        }
        for later in range(len(scores))
        for earlier in range(later)
    ]
    return entries, differences


def judge_one(args: argparse.Namespace, model_dir: str, task: LabelTask, rows: list[dict]):
    """(entry for the result, calibrated scores) of one model."""
    import dataclasses

    from common.tasks.ranking import metrics
    from common.tasks.ranking.classifier import Classifier

    classifier = Classifier.from_flags(args, model_dir, task)
    started = time.perf_counter()
    raw = classifier.raw_scores([row[task.text_field] for row in rows])
    seconds = time.perf_counter() - started
    calibration = classifier.calibration(args.calibration, raw, cli.parse_label_bias(args.label_bias, task.labels))
    calibrated = calibration.apply(raw)
    y, groups = true_labels(task, rows), [row["group"] for row in rows]

    def measured(scores) -> dict:
        return metrics.evaluate(
            scores.probabilities,
            y,
            task.labels,
            predictions=scores.predictions,
            margins=scores.top2_margin,
            answered=scores.answered,
            groups=groups,
            costs=calibration.decision.costs,
            seed=args.seed,
        )

    entry = {
        "model_dir": model_dir,
        "calibration": calibration.method,
        "contamination": run_record.contamination(model_dir, groups),
        **measured(calibrated),
        "uncalibrated": {"calibration": "prior", **measured(classifier.calibration("prior").apply(raw))},
        "decision": dataclasses.asdict(calibration.decision),
        "predictions": calibrated.predictions.tolist(),
        "rows_per_s": round(len(rows) / seconds, 1),
    }
    return entry, calibrated


def publish(args: argparse.Namespace, result: dict) -> int | None:
    """Table, report, drift and, last, the JSON line."""
    from common.tasks.ranking import metrics, report

    if args.baseline:
        result["drift"] = metrics.drift(read_json(args.baseline), result, args.seed)
    print(report.format_table(result))
    if args.report_dir:
        cli.log(f"report: {report.write_report(args.report_dir, result)}")
    print(report.json_line(result))
    if args.fail_on_drift and result["drift"]["drifted"]:
        cli.log(f"quality dropped significantly against {args.baseline}")
        return DRIFTED
    return None


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
