# PYTHON_ARGCOMPLETE_OK
"""Judge document extraction on held-out documents, field by field, every figure with its interval.

    python eval_idp.py --model_dir runs/sft_idp --data data/idp_val.jsonl --schema data/idp_schema.json \\
        --report_dir runs/sft_idp/report
    python eval_idp.py --model_dir runs/sft_idp --fit_calibration data/idp_dev.jsonl --schema data/idp_schema.json
    python eval_idp.py --model_dir models/tiny_student runs/sft_idp runs/dpo_idp --data receipts.jsonl \\
        --schema data/idp_schema.json --report_dir runs/report

Every model answers twice, held to the schema and freely. Prints tables and, last, one JSON line; --report_dir adds
metrics.json, a plot and report.html with the commonest errors, and keeps answers in answers.jsonl, so that a run that
was interrupted goes on. The split is by document, the same that idp_prepare.py
made, and documents that were trained on are counted.
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
from common.files import sha256_file
from common.generation import json_schema
from common.models import adapters
from common.models import loading as models
from common.models.flags import parse_args, source_of
from common.tasks.idp import flags as idp_flags
from common.tasks.idp import reading
from common.vram import preflight as vram

if TYPE_CHECKING:
    from common.tasks.idp.evaluate import Evaluation
    from common.tasks.idp.extractor import Extractor
    from common.tasks.idp.metrics import JudgedDocument


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__, prog="eval_idp.py")
    parser.add_argument("--model_dir", required=True, nargs="+", help="run folders, or base models (folder or Hub id)")
    parser.add_argument("--data", help="labelled documents: JSONL, a JSON list, or a folder of documents")
    idp_flags.add_ocr_flag(parser)
    parser.add_argument("--split", choices=("validation", "dev", "all"), default="validation")
    parser.add_argument("--val_frac", type=cli.fraction, help="a draw of this share of the split's documents")
    parser.add_argument(
        "--decoding",
        choices=("both", "constrained", "unconstrained"),
        default="both",
        help="answers held to the schema, free ones, or both, compared (default)",
    )
    parser.add_argument(
        "--evidence", action="store_true", help='judge where the values stand, on rows that have "lines" with boxes'
    )
    parser.add_argument("--seed", type=cli.seed, default=0, help="of the draw and the bootstrap")
    parser.add_argument("--skip_bad_rows", action="store_true", help="go on without bad rows, and count them")
    parser.add_argument("--fit_calibration", metavar="DEV", help="fit confidences on these labelled dev documents")
    parser.add_argument(
        "--report_dir", type=cli.folder, help="write metrics.json, a plot, report.html and answers.jsonl here"
    )
    idp_flags.add_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(build_parser(), argv)
    _check_flags(args)
    schema = idp_flags.schema_of(args.schema, *args.model_dir)
    preflight = json_schema.preflight(schema, args.best_effort or args.decoding == "unconstrained")

    from common.tasks.idp import metrics, report

    evaluation = _evaluation(args, schema, preflight) if args.data else None  # before the minutes of a fit
    if args.fit_calibration:
        _fit_calibration(args, schema, preflight)
    if evaluation is None:
        return
    groups = [row["group"] for row in evaluation.rows]
    entries, judged = [], []
    for model_dir in args.model_dir:
        entry, answers = _measured(args, evaluation, model_dir)
        entries.append({"model_dir": model_dir, "contamination": run_record.contamination(model_dir, groups)} | entry)
        judged.append(answers)
    result = {
        "evaluator": "idp",
        "version": 1,
        "data": args.data,
        "data_sha256": None if Path(args.data).is_dir() else sha256_file(args.data),
        "split": args.split,
        "n": len(evaluation.rows),
        "group_name": "document",
        "contamination": run_record.worst_contamination([entry["contamination"] for entry in entries]),
        "models": entries,
        **({"grounding_f1_of_gold": evaluation.grounding_of_gold()} if args.evidence else {}),
        "differences": [
            {"a": args.model_dir[later], "b": args.model_dir[earlier]}
            | metrics.differences(judged[later], judged[earlier], groups, args.seed)
            for later in range(len(judged))
            for earlier in range(later)
        ],
        **run_record.provenance("eval_idp.py", argv),
    }
    print(report.format_tables(result))
    run_figures.keep(result)
    if args.report_dir:
        cli.log(f"report: {report.write_report(args.report_dir, result)}")
    model_card.refresh(args.model_dir)
    print(report.json_line(result))


def _evaluation(args: argparse.Namespace, schema: json_schema.Schema, preflight: json_schema.Preflight) -> Evaluation:
    """What the models are judged by, on the documents of --data. Raises UserError: one of them is bad."""
    from common.tasks.idp import evaluate

    settings = idp_flags.extraction_settings(args)
    answers_file = Path(args.report_dir, "answers.jsonl") if args.report_dir else None
    recognise = idp_flags.recognise(args, args.data, args.fit_calibration)
    kept = answers_file and reading.kept_beside(answers_file)
    selection = evaluate.Selection(args.data, args.split, args.val_frac, args.seed, args.skip_bad_rows, recognise, kept)
    rows = evaluate.choose_rows(selection, schema)
    decodings = ("constrained", "unconstrained") if args.decoding == "both" else (args.decoding,)
    store = AnswerStore(answers_file)
    return evaluate.Evaluation(rows, schema, preflight, settings, decodings, args.seed, args.evidence, store)


def _measured(args: argparse.Namespace, evaluation: Evaluation, model_dir: str) -> tuple[dict, list[JudgedDocument]]:
    """`Evaluation.measure` of a model, which is gone before the next one is loaded."""
    from common.tasks.idp.answer_form import form_of

    source, form = source_of(args, model_dir), form_of(model_dir, args.typed_fields)
    loaded = vram.load_within_memory(source, args.max_batch_tokens, auto_fit=args.auto_fit, text_only=True)
    return evaluation.measure(model_dir, loaded, form, adapters.identity(source))


def _check_flags(args: argparse.Namespace) -> None:
    """Raises UserError where the flags do not go together."""
    if len(set(args.model_dir)) < len(args.model_dir):
        raise cli.UserError("--model_dir names the same model twice; name each once")
    if not args.data and not args.fit_calibration:
        raise cli.UserError("give --data with the documents to judge on, or --fit_calibration with dev ones, or both")
    if args.report_dir and not args.data:
        raise cli.UserError("--report_dir needs --data with the documents to judge on")
    for model_dir in args.model_dir:
        models.check_model_dir(model_dir, args.base, onnx=False)
        if args.fit_calibration and not Path(model_dir).is_dir():
            raise cli.UserError(f"--fit_calibration writes into the model's folder, and {model_dir} is not one")


def _fit_calibration(args: argparse.Namespace, schema: json_schema.Schema, preflight: json_schema.Preflight) -> None:
    """Fit the confidences of every model on the dev documents. Raises UserError: a model was trained on them."""
    from common.tasks.idp import evaluate
    from common.tasks.idp import rows as idp_rows

    recognise = idp_flags.recognise(args, args.data, args.fit_calibration)
    dev = idp_rows.read(args.fit_calibration, schema, args.skip_bad_rows, recognise)
    for model_dir in args.model_dir:
        evaluate.check_unseen(model_dir, dev, args.fit_calibration)
    for model_dir in args.model_dir:
        evaluate.fit_calibration(model_dir, dev, args.fit_calibration, _extractor(args, schema, preflight, model_dir))
    model_card.refresh(args.model_dir)


def _extractor(
    args: argparse.Namespace, schema: json_schema.Schema, preflight: json_schema.Preflight, model_dir: str
) -> Extractor:
    from common.tasks.idp.answer_form import form_of
    from common.tasks.idp.extractor import Extractor

    source, settings = source_of(args, model_dir), idp_flags.extraction_settings(args)
    loaded = vram.load_within_memory(source, args.max_batch_tokens, auto_fit=args.auto_fit, text_only=True)
    return Extractor(loaded, schema, preflight, settings, form_of(model_dir, args.typed_fields))


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
