# PYTHON_ARGCOMPLETE_OK
"""Judge models on held-out rows by calibrated label ranking, of CreditMix or another task: figures with intervals.

    python eval_creditmix.py --model_dir runs/creditmix_sft --data data/creditmix_dataset.json --val_per_class 1500
    python eval_creditmix.py --model_dir models/tiny_student runs/creditmix_sft runs/creditmix_dpo \\
        --data data/creditmix_dataset.json --report_dir runs/report
    python eval_creditmix.py --model_dir runs/creditmix_sft --fit_calibration data/creditmix_dev.jsonl
    python eval_creditmix.py --model_dir runs/creditmix_sft --data data/creditmix_val.jsonl --report_dir runs/report \\
        --cascade https://api.openai.com/v1 --cascade_model gpt-4o --cascade_price 0.0004

Prints a table and, last, one JSON line; --report_dir adds metrics.json, plots and report.html, keeps scores in
answers.jsonl, so that a run that was interrupted goes on, and writes what was made of each row to predictions.jsonl.
The split is by customer (with --task by its group key), the same that creditmix_prepare.py made, and rows whose
customer was trained on are counted. A bag of words (TF-IDF with logistic regression) stands beside the models, trained
on the rows that a run's record names; --controls FILE names them, and adds gradient boosting. --fit_calibration fits
bias and temperature on dev rows into runs/<name>/calibration.json (calibration.TASK.json of another label set).
--cascade asks a teacher about all rows and shows what handing the least sure ones on to it brings and costs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common import cli, run_record
from common.data.resumable import AnswerStore
from common.evaluation import run_figures
from common.export import model_card
from common.files import read_json, sha256_file
from common.models import loading as models
from common.models.flags import add_engine_flag, parse_args, source_of
from common.tasks.ranking.flags import add_scoring_flags, decision_goal, scoring_settings
from common.tasks.ranking.loading import check as check_task
from common.tasks.ranking.loading import task_for
from common.tasks.ranking.task import LabelTask
from common.teachers.cascade.flags import add_judged_flags, judged_cascade

if TYPE_CHECKING:
    from common.models.source import ModelSource
    from common.tasks.ranking.calibration import Scores

DRIFTED = 3  # exit code of --fail_on_drift


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__, prog="eval_creditmix.py")
    parser.add_argument("--model_dir", required=True, nargs="+", help="run folders, or base models (folder or Hub id)")
    parser.add_argument("--data", help="labelled rows: a JSON list, JSONL, CSV (.gz is fine) or Parquet")
    parser.add_argument("--features", choices=("six", "all"), default="six", help="columns to read from a raw CSV")
    parser.add_argument("--split", choices=("validation", "dev", "all"), default="validation")
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--val_per_class", type=cli.positive_int, help="rows of each class; default: all of the rarest")
    amount.add_argument("--val_frac", type=cli.fraction, help="this share of the split's rows of the rarest class")
    parser.add_argument("--seed", type=cli.seed, default=0, help="of the balanced draw and the bootstrap")
    parser.add_argument("--skip_bad_rows", action="store_true", help="go on without bad rows, and count them")
    parser.add_argument(
        "--controls",
        metavar="TRAIN",
        help="rows that classic classifiers learn from, or none (default: a bag of words, from those of a run)",
    )
    parser.add_argument(
        "--report_dir", type=cli.folder, help="write metrics.json, plots, report.html and answers.jsonl here"
    )
    parser.add_argument("--fit_calibration", metavar="DEV", help="fit bias and temperature on these dev rows")
    parser.add_argument(
        "--decision_json", action="store_true", help='with --fit_calibration: also what pipeline("decision") reads'
    )
    decision = parser.add_argument_group("decisions, fitted with --fit_calibration")
    decision.add_argument("--optimize", choices=("accuracy", "macro_f1", "cost"), help="what labels are chosen for")
    decision.add_argument("--costs", help='JSON file: {"true label": {"predicted label": cost}}')
    decision.add_argument("--abstain_below", type=cli.fraction, help="no answer under this probability")
    decision.add_argument("--target_precision", type=cli.fraction, help="abstain until answers are this precise")
    decision.add_argument(
        "--guarantee", type=cli.fraction, help="the probability with which --target_precision holds (default: 0.95)"
    )
    add_judged_flags(parser)
    drift = parser.add_argument_group("drift")
    drift.add_argument("--baseline", metavar="metrics.json", help="a stored result to compare this one with")
    drift.add_argument("--fail_on_drift", action="store_true", help=f"exit {DRIFTED} on a significant drop")
    add_scoring_flags(parser)
    add_engine_flag(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int | None:
    args = parse_args(build_parser(), argv)
    for model_dir in args.model_dir:
        if args.fit_calibration and not Path(model_dir).is_dir():
            raise cli.UserError(f"--fit_calibration writes into the model's folder, and {model_dir} is not one")
        models.check_model_dir(model_dir, args.base)
    task = task_for(args.task, *args.model_dir)
    check_flags(args, task)
    # after the checks, so that a mistyped flag answers before numpy and scipy are imported
    from common.tasks.ranking import baseline, evaluate
    from common.tasks.ranking.row_check import PromptRoom, RowCheck, fits_all

    settings = scoring_settings(args, task)
    sources = [source_of(args, model_dir) for model_dir in args.model_dir]

    def check_of(source: ModelSource) -> RowCheck:
        return RowCheck(task, PromptRoom.of(source, task, settings.max_batch_tokens))

    checks = [check_of(source) for source in sources]
    cascade = judged_cascade(args)
    teacher = [cascade.local_teacher] if cascade and cascade.local_teacher else []
    teacher = [source for source in teacher if source.model_dir not in args.model_dir]
    if args.data:  # which is read before the minutes of a fit
        read_by = [*checks, *map(check_of, teacher)]
        labelled, _ = task.read(args.data, args.features, args.skip_bad_rows, fits_all(read_by))
        draw = evaluate.Draw(args.split, args.val_per_class, args.val_frac, args.seed)
        rows, class_counts = draw.rows(task, labelled, args.data)
        training = baseline.training_rows(args.controls, args.model_dir, task)
    if args.fit_calibration:
        goal = decision_goal(args, task)
        dev, _ = task.read(args.fit_calibration, args.features, args.skip_bad_rows, fits_all(checks))
        for source in sources:
            evaluate.fit_calibration(source, task, settings, dev, args.fit_calibration, goal, args.decision_json)
        model_card.refresh(args.model_dir)
        if not args.data:
            return None
    sources += teacher
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
        "rows": evaluate.row_facts(task, rows),
        **run_record.provenance("eval_creditmix.py", argv),
    }
    store = AnswerStore(Path(args.report_dir, "answers.jsonl") if args.report_dir else None)
    entries, differences, scores = evaluate.evaluate_models(sources, task, settings, rows, args.seed, training, store)
    result["baseline"] = baseline.facts(training)
    if cascade:
        from common.teachers.cascade.evaluation import judged

        named = {entry["model_dir"]: score for entry, score in zip(entries, scores, strict=True)}
        truth = result["rows"]
        result["cascade"] = judged(cascade, args.model_dir, task, rows, named, truth["y"], truth["groups"], args.seed)
    contamination = run_record.worst_contamination([entry["contamination"] for entry in entries])
    result |= {"contamination": contamination, "models": entries, "differences": differences}
    return publish(args, result, [row[task.text_field] for row in rows], scores)


def check_flags(args: argparse.Namespace, task: LabelTask) -> None:
    """Refuse what cannot work before anything is loaded."""
    if not args.data and not args.fit_calibration:
        raise cli.UserError("give --data with the rows to judge on, or --fit_calibration with dev rows, or both")
    if len(set(args.model_dir)) < len(args.model_dir):
        raise cli.UserError("--model_dir names the same model twice; name each once")
    for name in ("optimize", "costs", "abstain_below", "target_precision", "decision_json"):
        if not args.fit_calibration and getattr(args, name) not in (None, False):
            raise cli.UserError(f"--{name} goes with --fit_calibration")
    if args.guarantee and not args.target_precision:
        raise cli.UserError("--guarantee goes with --target_precision")
    if args.fail_on_drift and not args.baseline:
        raise cli.UserError("--fail_on_drift needs --baseline with a stored metrics.json")
    if (args.baseline or args.report_dir or args.controls or args.cascade) and not args.data:
        raise cli.UserError("--baseline, --controls, --cascade and --report_dir need --data with the rows to judge on")
    cascade = judged_cascade(args)
    teacher = [cascade.local_teacher.model_dir] if cascade and cascade.local_teacher else []
    for model_dir in teacher:
        check_task(task, model_dir)
    # what is read later is read once now: a mistake is found before an hour of scoring, not after it
    cli.parse_label_bias(args.label_bias, task.labels)
    if args.baseline:
        from common.tasks.ranking.drift import check_baseline

        check_baseline(read_json(args.baseline), task.labels, list(dict.fromkeys(args.model_dir + teacher)))
    if args.calibration in (None, "fitted") and not args.fit_calibration:
        from common.tasks.ranking.calibration import Calibration

        for model_dir in args.model_dir:
            if (file := task.kept_file(model_dir, "calibration")).is_file():
                Calibration.load(file, task.labels)
            elif args.calibration:
                raise cli.UserError(f"{model_dir} has no fitted calibration; fit one with --fit_calibration DEV.jsonl")


def publish(args: argparse.Namespace, result: dict, texts: list[str], scores: list[Scores]) -> int | None:
    """Table, report, drift and, last, the JSON line."""
    from common.tasks.ranking import report, row_table
    from common.tasks.ranking.drift import drift

    if args.baseline:
        result["drift"] = drift(read_json(args.baseline), result, args.seed)
    print(report.format_table(result))
    run_figures.keep(result)
    if args.report_dir:
        predictions = row_table.predictions(result, texts, scores)
        cli.log(f"report: {report.write_report(args.report_dir, result, predictions)}")
    model_card.refresh(args.model_dir)
    print(report.json_line(result))
    if args.fail_on_drift and result["drift"]["drifted"]:
        cli.log(f"quality dropped significantly against {args.baseline}")
        return DRIFTED
    return None


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
