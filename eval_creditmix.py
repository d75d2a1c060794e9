"""Judge models on held-out CreditMix rows: calibrated label ranking, every figure with its interval.

    python eval_creditmix.py --model_dir runs/creditmix_sft --data data/creditmix_dataset.json --val_per_class 1500
    python eval_creditmix.py --model_dir models/tiny_student runs/creditmix_sft runs/creditmix_dpo \\
        --data data/creditmix_dataset.json --report_dir runs/report
    python eval_creditmix.py --model_dir runs/creditmix_sft --fit_calibration data/creditmix_dev.jsonl

Prints a table and, last, one JSON line; --report_dir adds metrics.json, plots and report.html. The split is by
customer, the same that creditmix_prepare.py made, and rows whose customer was trained on are counted. With
--fit_calibration, a per-class bias and a temperature are fitted on dev rows into runs/<name>/calibration.json.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from common import cli, creditmix, models, records, run_record, splits
from common.tasks import CREDITMIX

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
    cli.add_scoring_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int | None:
    args = cli.parse_args(build_parser(), argv)
    check_flags(args)
    if args.fit_calibration:
        dev, _ = creditmix.read_labelled(args.fit_calibration, CREDITMIX, args.features, args.skip_bad_rows)
        for model_dir in args.model_dir:
            fit(args, model_dir, dev)
        if not args.data:
            return None
    rows, class_counts = choose_rows(args)
    result = {
        "evaluator": "creditmix",
        "version": 1,
        "data": args.data,
        "data_sha256": records.sha256_file(args.data),
        "split": args.split,
        "n": len(rows),
        "labels": list(CREDITMIX.labels),
        "group_name": "customer",
        "class_counts": class_counts,
        "rows": {
            "ids": [splits.group_hash(row["question"]) for row in rows],
            "y": true_labels(rows),
            "groups": [row["group"] for row in rows],
        },
        "command": shlex.join(["python", "eval_creditmix.py", *(sys.argv[1:] if argv is None else argv)]),
        "versions": run_record.versions() | {"distill-slm": run_record.git_commit() or "unknown"},
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    entries, differences = judge(args, rows)
    result |= {"contamination": worst([entry["contamination"] for entry in entries]), "models": entries}
    result["differences"] = differences
    return publish(args, result)


def check_flags(args: argparse.Namespace) -> None:
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
    cli.parse_label_bias(args.label_bias, CREDITMIX.labels)
    if args.baseline:
        records.read_json(args.baseline)
    if args.costs:
        cost_matrix(args.costs)
    if args.calibration == "fitted" and not args.fit_calibration:
        for model_dir in args.model_dir:
            if not (Path(model_dir) / "calibration.json").is_file():
                raise cli.UserError(f"{model_dir} has no fitted calibration; fit one with --fit_calibration DEV.jsonl")


def choose_rows(args: argparse.Namespace) -> tuple[list[dict], dict[str, int]]:
    """The balanced draw that is judged on, and the class counts of the part that it was drawn from."""
    rows, _ = creditmix.read_labelled(args.data, CREDITMIX, args.features, args.skip_bad_rows)
    what = args.data
    if args.split != "all":
        rows = [row for row in rows if splits.part_of(row["group"]) == args.split]
        what = f"the {args.split} part of {args.data}"
    counts = splits.class_counts(rows, lambda row: row["answer"], CREDITMIX.labels)
    per_class = args.val_per_class
    if args.val_frac:
        per_class = max(1, round(args.val_frac * min(counts.values())))
    return splits.balanced(rows, lambda row: row["answer"], CREDITMIX.labels, per_class, args.seed, what), counts


def true_labels(rows: Sequence[dict]) -> list[int]:
    """Label indices of rows."""
    return [CREDITMIX.labels.index(row["answer"]) for row in rows]


def fit(args: argparse.Namespace, model_dir: str, dev: list[dict]) -> None:
    """Fit bias, temperature and decision on dev rows, and keep them beside the adapter."""
    import dataclasses

    from common import calibration
    from common.classifier import CALIBRATION_FILE, Classifier

    trained = run_record.read_groups(model_dir) or set()
    seen, of = splits.overlap((row["group"] for row in dev), trained)
    if seen:
        raise cli.UserError(
            f"{seen} of {of} rows of {args.fit_calibration} are of customers that {model_dir} was trained on; "
            "a calibration needs unseen ones: give the dev rows that creditmix_prepare.py wrote"
        )
    classifier = Classifier.from_flags(args, model_dir, CREDITMIX)
    raw, y = classifier.raw_scores([row["question"] for row in dev]), true_labels(dev)
    source = {
        "file": args.fit_calibration,
        "sha256": records.sha256_file(args.fit_calibration),
        "adapter_sha256": models.adapter_hash(model_dir),
    }
    fitted = calibration.fit_vector_scaling(raw, y, CREDITMIX.labels, prior=classifier.prior, fitted_on=source)
    decision = calibration.fit_decision(
        fitted.apply(raw).probabilities,
        y,
        CREDITMIX.labels,
        args.optimize,
        cost_matrix(args.costs) if args.costs else None,
        args.abstain_below,
        args.target_precision,
    )
    dataclasses.replace(fitted, decision=decision).save(Path(model_dir) / CALIBRATION_FILE)
    facts = fitted.fitted_on or {}
    cli.log(
        f"{model_dir}: fitted on {len(dev):,} dev rows, temperature {fitted.temperature:.3f}, "
        f"NLL {facts['nll_before']:.4f} -> {facts['nll_after']:.4f}"
    )


def cost_matrix(path: str) -> list[list[float]]:
    """costs[true][predicted] from a JSON file of named labels; a pair that is left out costs 0."""
    named = records.read_json(path)
    if not isinstance(named, dict) or not all(isinstance(row, dict) for row in named.values()):
        raise cli.UserError(f'{path} must be {{"true label": {{"predicted label": cost, ...}}, ...}}')
    unknown = sorted(({*named} | {label for row in named.values() for label in row}) - {*CREDITMIX.labels})
    if unknown:
        raise cli.UserError(f"{path}: unknown label '{unknown[0]}'; the labels are {', '.join(CREDITMIX.labels)}")
    return [[named.get(true, {}).get(label, 0.0) for label in CREDITMIX.labels] for true in CREDITMIX.labels]


def judge(args: argparse.Namespace, rows: list[dict]) -> tuple[list[dict], list[dict]]:
    """One entry per model, and the paired differences of every later model to the earlier ones."""
    from common import metrics

    entries, scores = [], []
    for model_dir in args.model_dir:
        cli.log(f"{model_dir}: scoring {len(rows):,} rows")
        entry, calibrated = judge_one(args, model_dir, rows)
        entries.append(entry)
        scores.append(calibrated)
    y, groups = true_labels(rows), [row["group"] for row in rows]
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


def judge_one(args: argparse.Namespace, model_dir: str, rows: list[dict]):
    """(entry for the result, calibrated scores) of one model."""
    import dataclasses

    from common import metrics
    from common.classifier import Classifier

    classifier = Classifier.from_flags(args, model_dir, CREDITMIX)
    started = time.perf_counter()
    raw = classifier.raw_scores([row["question"] for row in rows])
    seconds = time.perf_counter() - started
    calibration = classifier.calibration(args.calibration, raw, cli.parse_label_bias(args.label_bias, CREDITMIX.labels))
    calibrated = calibration.apply(raw)
    y, groups = true_labels(rows), [row["group"] for row in rows]

    def measured(scores) -> dict:
        return metrics.evaluate(
            scores.probabilities,
            y,
            CREDITMIX.labels,
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
        "contamination": contamination(model_dir, groups),
        **measured(calibrated),
        "uncalibrated": {"calibration": "prior", **measured(classifier.calibration("prior").apply(raw))},
        "decision": dataclasses.asdict(calibration.decision),
        "predictions": calibrated.predictions.tolist(),
        "rows_per_s": round(len(rows) / seconds, 1),
    }
    return entry, calibrated


def contamination(model_dir: str, groups: Sequence[str]) -> dict[str, int] | None:
    """Rows whose customer the run was trained on; None where an adapter keeps no record of that."""
    trained = run_record.read_groups(model_dir)
    if trained is None:
        if models.is_adapter(model_dir):
            return None
        trained = set()  # a base model was trained on no labelled row of ours
    seen, of = splits.overlap(groups, trained)
    return {"rows": seen, "of": of}


def worst(counts: Sequence[dict[str, int] | None]) -> dict[str, int] | None:
    """The contamination of the model with the most; None where one is unknown and none is known to have any."""
    known = [count for count in counts if count]
    most = max(known, key=lambda count: count["rows"], default=None)
    return None if most and not most["rows"] and len(known) < len(counts) else most


def publish(args: argparse.Namespace, result: dict) -> int | None:
    """Table, report, drift and, last, the JSON line."""
    from common import metrics, report

    if args.baseline:
        result["drift"] = metrics.drift(records.read_json(args.baseline), result, args.seed)
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
