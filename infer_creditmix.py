# PYTHON_ARGCOMPLETE_OK
"""Classify rows by calibrated label ranking: one line of features, or a file of them.

    python infer_creditmix.py --model_dir runs/creditmix_sft --features "Age: 23.0, Occupation: Scientist, \\
        Annual Income: 19114.12, Outstanding Debt: 809.98, Credit Utilization Ratio: 35.03, \\
        Payment Behaviour: Low_spent_Small_value_payments"
    python infer_creditmix.py --model_dir runs/creditmix_sft --input rows.jsonl --output answers.jsonl
    python infer_creditmix.py --model_dir runs/ticket_sft --input tickets.csv --output answers.parquet
    python infer_creditmix.py --model_dir runs/creditmix_sft --engine ray --input 'rows/*.parquet' --output answers
    python infer_creditmix.py --model_dir runs/creditmix_sft --input rows.jsonl --output answers.jsonl \\
        --cascade https://api.openai.com/v1 --cascade_model gpt-4o --cascade_per_hour 500
    python infer_creditmix.py --model_dir runs/ticket_sft --task recipes/ticket_severity.yaml \\
        --features "Mail. Users affected: 3, Hours open: 2, mails arrive an hour late"

Rows of --input (JSONL, a JSON list, CSV or Parquet) have the features under "features" or "question", with --task under
the task's text field. Answers keep their order; an interrupted run goes on where it stopped. Each answer has
model_name, prediction, scores, raw_scores, prior, probabilities and top2_margin; --output NAME.csv or NAME.parquet has
a column for each, and for every label one such as scores.Good. With --engine ray, --input is also a folder, a pattern
or an address such as s3://bucket/rows, --output is a folder of part files in JSONL, and each answer has an id too. With
--cascade, rows that the model abstains from, or that are less sure than --cascade_below, are answered by a teacher;
"answered_by" says who did.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from common import cli
from common.data import rows as records
from common.data import tables
from common.models import loading as models
from common.models.flags import parse_args, source_of
from common.models.source import LLAMA_CPP
from common.tasks.ranking.flags import add_scoring_flags, scoring_settings
from common.tasks.ranking.loading import task_for
from common.tasks.ranking.task import hinted
from common.teachers.cascade.flags import add_cascade_flags, cascade_settings


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__, prog="infer_creditmix.py")
    parser.add_argument("--model_dir", required=True, help="run folder, ONNX export, or a base (folder or Hub id)")
    parser.add_argument("--features", help="one line of features, or the text of another task")
    parser.add_argument("--input", help="rows to classify: JSONL, a JSON list, CSV or Parquet")
    parser.add_argument(
        "--output", type=cli.output_path, help="answers, one per row of --input: .jsonl, .csv or .parquet"
    )
    parser.add_argument("--skip_bad_rows", action="store_true", help="list bad rows in OUTPUT.rejects.jsonl and go on")
    parser.add_argument(
        "--strict_input", action="store_true", help="CreditMix: refuse a line that is none, instead of a warning"
    )
    parser.add_argument(
        "--engine",
        choices=("local", LLAMA_CPP, "ray"),
        default="local",
        help=f"{LLAMA_CPP}: a GGUF as it is, packed, on the CPU; ray: many files, many machines",
    )
    parser.add_argument(
        "--workers", type=cli.positive_int, help="models at work under --engine ray; default: one per GPU, else machine"
    )
    add_scoring_flags(parser)
    add_cascade_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(build_parser(), argv)
    if (args.features is None) == (args.input is None) or (args.input is None) != (args.output is None):
        raise cli.UserError("give either --features, or --input and --output together")
    if args.features is not None and not args.features.strip():
        raise cli.UserError('--features is empty; give a line such as "Age: 23.0, Occupation: Scientist, ..."')
    if args.engine == "ray" and args.input is None:
        raise cli.UserError("--engine ray is for --input and --output; leave it out with --features")
    if args.engine == "ray" and args.strict_input:
        raise cli.UserError("--strict_input is for one machine; leave it out with --engine ray: answers have a warning")
    if args.engine != "ray" and args.workers:
        raise cli.UserError("--workers goes with --engine ray; add it, or leave --workers out")
    if args.engine == "ray" and args.cascade:
        raise cli.UserError("--cascade is for one machine; leave it out with --engine ray")
    records.check_output(args.output, args.input, ("jsonl",) if args.engine == "ray" else tables.FORMATS)
    models.check_model_dir(args.model_dir, args.base)
    task = task_for(args.task, args.model_dir)
    settings, source = scoring_settings(args, task), source_of(args, args.model_dir)
    if args.strict_input and args.features is not None and (fault := task.warning(task.clean(args.features))):
        raise cli.UserError(f"--features: {fault}, or leave --strict_input out")

    cascade = cascade_settings(args)

    # after the checks, so that a mistyped flag answers before numpy and scipy are imported
    from common.tasks.ranking import file_scoring
    from common.tasks.ranking.classifier import Classifier

    hand_on = None
    if cascade:
        from common.teachers.cascade.labels import label_cascade

        hand_on = label_cascade(cascade, task, args.model_dir, settings.calibration)
    if args.input is None:
        classifier, texts = Classifier.load(source, task, settings), [task.clean(args.features)]
        calibration = classifier.calibration(settings.calibration, label_bias=settings.label_bias)
        answers = classifier.answers(texts, calibration)
        (answer,) = hand_on(texts, answers) if hand_on else answers
        print(json.dumps(hinted(task, texts[0], answer), indent=2, ensure_ascii=False))
        return
    handed_on = [cascade.name, cascade.below] if cascade else None
    scoring = file_scoring.FileScoring(
        source, task, settings, args.input, args.output, args.skip_bad_rows, args.strict_input, handed_on
    )
    if args.engine == "ray":
        from common.tasks.ranking import ray_scoring

        ray_scoring.score(scoring, args.workers)
        return
    file_scoring.check_input(args.input, scoring.check, args.skip_bad_rows)
    file_scoring.classify_file(scoring, Classifier.load(source, task, settings), hand_on)


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
