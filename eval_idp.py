"""Judge document extraction on held-out documents, field by field, every figure with its interval.

    python eval_idp.py --model_dir runs/sft_idp --data data/idp_val.jsonl --schema data/idp_schema.json \\
        --report_dir runs/sft_idp/report
    python eval_idp.py --model_dir models/tiny_student runs/sft_idp runs/dpo_idp --data receipts.jsonl \\
        --schema data/idp_schema.json --report_dir runs/report

Every model answers twice, held to the schema and freely. Prints tables and, last, one JSON line; --report_dir adds
metrics.json, a plot and report.html with the commonest errors. The split is by document, the same that idp_prepare.py
made, and documents that were trained on are counted.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from pathlib import Path

from common import cli, run_record
from common.data import splits
from common.files import sha256_file
from common.generation import json_schema
from common.models import loading as models
from common.models.flags import source_of
from common.tasks.idp import extractor as idp
from common.tasks.idp import rows as idp_rows
from common.vram import preflight as vram

WINDOW = 64  # documents at a time


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__, prog="eval_idp.py")
    parser.add_argument("--model_dir", required=True, nargs="+", help="run folders, or base models (folder or Hub id)")
    parser.add_argument("--data", required=True, help="labelled documents: JSONL, a JSON list, or a folder")
    parser.add_argument("--split", choices=("validation", "dev", "all"), default="validation")
    parser.add_argument("--val_frac", type=cli.fraction, help="a draw of this share of the split's documents")
    parser.add_argument(
        "--decoding",
        choices=("both", "constrained", "unconstrained"),
        default="both",
        help="answers held to the schema, free ones, or both, compared (default)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draw and the bootstrap")
    parser.add_argument("--skip_bad_rows", action="store_true", help="go on without bad rows, and count them")
    parser.add_argument("--report_dir", help="write metrics.json, a plot and report.html here")
    idp.add_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = cli.parse_args(build_parser(), argv)
    if len(set(args.model_dir)) < len(args.model_dir):
        raise cli.UserError("--model_dir names the same model twice; name each once")
    for model_dir in args.model_dir:
        models.check_model_dir(model_dir, args.base)
    schema = json_schema.load(args.schema)
    found = json_schema.preflight(schema, args.best_effort or args.decoding == "unconstrained")
    rows = choose_rows(args, schema)

    from common.tasks.idp import metrics as idp_metrics
    from common.tasks.idp import report as idp_report

    groups = [row["group"] for row in rows]
    entries, judged = [], []
    for model_dir in args.model_dir:
        entry, leaves = judge(args, model_dir, rows, schema, found)
        entries.append({"model_dir": model_dir, "contamination": run_record.contamination(model_dir, groups)} | entry)
        judged.append(leaves)
    result = {
        "evaluator": "idp",
        "version": 1,
        "data": args.data,
        "data_sha256": None if Path(args.data).is_dir() else sha256_file(args.data),
        "split": args.split,
        "n": len(rows),
        "group_name": "document",
        "contamination": run_record.worst_contamination([entry["contamination"] for entry in entries]),
        "models": entries,
        "differences": [
            {"a": args.model_dir[later], "b": args.model_dir[earlier]}
            | idp_metrics.differences(judged[later], judged[earlier], groups, args.seed)
            for later in range(len(judged))
            for earlier in range(later)
        ],
        **run_record.provenance("eval_idp.py", argv),
    }
    print(idp_report.format_tables(result))
    if args.report_dir:
        cli.log(f"report: {idp_report.write_report(args.report_dir, result)}")
    print(idp_report.json_line(result))


def choose_rows(args: argparse.Namespace, schema: json_schema.Schema) -> list[dict]:
    """The documents that are judged on."""
    rows = idp_rows.read(args.data, schema, args.skip_bad_rows)
    if args.split != "all":
        rows = [row for row in rows if splits.part_of(row["group"]) == args.split]
        if not rows:
            raise cli.UserError(
                f"{args.data} has no document of the {args.split} part; for a new file pass --split all"
            )
    if args.val_frac:
        rows = random.Random(args.seed).sample(rows, max(1, round(args.val_frac * len(rows))))
    return rows


def judge(args: argparse.Namespace, model_dir: str, rows: list[dict], schema: json_schema.Schema, found):
    """(entry for the result, what `idp_metrics.differences` compares) of one model."""
    from common.tasks.idp import metrics as idp_metrics

    loaded = vram.load_within_memory(source_of(args, model_dir), args.max_batch_tokens, auto_fit=args.auto_fit)
    groups = [row["group"] for row in rows]
    entries, judged = {}, {}
    for decoding in ("constrained", "unconstrained") if args.decoding == "both" else (args.decoding,):
        cli.log(f"{model_dir}: reading {len(rows):,} documents, {decoding}")
        extractor = idp.Extractor.from_flags(args, loaded, schema, found if decoding == "constrained" else None)
        extractions, seconds = extract(extractor, [row["document"] for row in rows])
        judged[decoding] = [idp_metrics.judge(row["fields"], each) for row, each in zip(rows, extractions, strict=True)]
        entries[decoding] = idp_metrics.evaluate(judged[decoding], groups, args.seed)
        entries[decoding] |= {
            "errors": idp_metrics.commonest_errors(rows, judged[decoding]),
            "documents_in_pieces": sum(each.pieces > 1 for each in extractions),
            "tokens_per_s": round(sum(each.tokens for each in extractions) / seconds, 1),
        }
    first, *rest = entries
    entry = {"decoding": first} | entries[first]
    if rest:
        entry["unconstrained"] = entries["unconstrained"]
        entry["constraint_difference"] = idp_metrics.differences(
            judged["constrained"], judged["unconstrained"], groups, args.seed
        )
    return entry, judged[first]


def extract(extractor: idp.Extractor, texts: list[str]) -> tuple[list[idp.Extraction], float]:
    """(an extraction per text, seconds)."""
    from tqdm import tqdm

    started = time.perf_counter()
    extractions: list[idp.Extraction] = []
    with tqdm(total=len(texts), unit=" documents") as progress:
        for start in range(0, len(texts), WINDOW):
            extractions += extractor.extract(texts[start : start + WINDOW])
            progress.update(len(extractions) - progress.n)
    return extractions, time.perf_counter() - started


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
