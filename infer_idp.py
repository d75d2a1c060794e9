# PYTHON_ARGCOMPLETE_OK
"""Extract the fields of documents as JSON that is valid by construction: one document, a file, or many of them.

    python infer_idp.py --model_dir runs/sft_idp --schema data/idp_schema.json \\
        --document "Invoice #INV1 date 2025-10-01 from Bar LLC total USD 50."
    python infer_idp.py --model_dir runs/sft_idp --schema data/idp_schema.json --document_file invoice.pdf
    python infer_idp.py --model_dir runs/sft_idp --schema data/idp_schema.json --input docs.jsonl --output out.jsonl
    python infer_idp.py --model_dir runs/sft_idp --schema data/idp_schema.json --input invoices --output out.jsonl
    python infer_idp.py --model_dir runs/sft_idp --schema data/idp_schema.json --input invoices --output out.jsonl \\
        --cascade https://api.openai.com/v1 --cascade_model gpt-4o --accept_above 0.9

Prints the JSON object alone, or under "fields" beside what --confidence, --written and --evidence add. Rows of --input
have their text under "document", or it is a folder of documents; each answer has "fields", the row's "id" or the file's
name, "notes" on values that are not sure, and "error" and "text" where there is no valid answer. An answer that the
token budget ended, or in which a value ran on, has "cut": true. Answers keep their order; an interrupted run goes on
where it stopped. With --cascade a teacher is asked about documents without a whole, valid answer, and about those that
--accept_above does not accept or that are less sure than --cascade_below; "answered_by" says who answered.
Exit code 1: a document got no valid answer; 4: all did, but one is cut.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import cli
from common.data import rows as records
from common.generation import json_schema
from common.models import adapters
from common.models import loading as models
from common.models.flags import parse_args, source_of
from common.tasks.idp import calibration as calibrations
from common.tasks.idp import documents, reading
from common.tasks.idp import flags as idp_flags
from common.tasks.idp.answer_form import form_of
from common.tasks.idp.answers import Shown, write_split
from common.tasks.idp.extractor import Extractor
from common.teachers.cascade.flags import add_cascade_flags, cascade_settings
from common.vram import preflight as vram

if TYPE_CHECKING:
    from common.teachers.cascade.documents import DocumentCascade

NOT_DECIDING = (  # flags that do not decide the answers, or only by what the rows and the model then are
    "output", "max_batch_tokens", "prompt_lookup_num_tokens", "cascade_per_hour", "cascade_timeout", "cascade_keep",
    "skip_bad_rows", "ocr", "auto_fit", "load_in_4bit",
)  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__, prog="infer_idp.py")
    parser.add_argument("--model_dir", required=True, help="run folder, or a base model's folder or Hub id")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--document", help="the text of one document")
    source.add_argument("--document_file", help="a .txt, .pdf or image")
    source.add_argument("--input", help='JSONL rows {"document"[, "id", "lines"]}, or a folder of documents')
    parser.add_argument("--output", type=cli.output_file, help="JSONL answers, one per row or file of --input")
    idp_flags.add_ocr_flag(parser)
    parser.add_argument("--confidence", action="store_true", help="add each field's: the probability of its characters")
    parser.add_argument(
        "--accept_above",
        type=cli.fraction,
        metavar="PRECISION",
        help="say of each answer whether it needs no review, so that this share of those is right in every field",
    )
    parser.add_argument("--evidence", action="store_true", help="add where each field stands in the document")
    parser.add_argument("--written", action="store_true", help="add each field's characters as the model copied them")
    parser.add_argument("--no_constraint", action="store_true", help="let the model write freely, for comparison")
    parser.add_argument("--skip_bad_rows", action="store_true", help="name and count bad rows and go on without them")
    idp_flags.add_flags(parser)
    add_cascade_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int | None:
    args = parse_args(build_parser(), argv)
    if (args.input is None) != (args.output is None):
        raise cli.UserError("--input and --output go together")
    records.check_output(args.output, args.input)
    models.check_model_dir(args.model_dir, args.base, onnx=False)
    schema = idp_flags.schema_of(args.schema, args.model_dir)
    preflight = json_schema.preflight(schema, args.best_effort or args.no_constraint)
    recognise = idp_flags.recognise(args, args.document_file, args.input)
    if unenforced := [] if args.no_constraint else preflight.of("checked") + preflight.of("unsupported"):
        cli.log(f"checked after decoding, not enforced by it: {', '.join(keyword.path for keyword in unenforced)}")
    if args.input:
        # read through before a model loads: a bad row is found now, not in the middle of a night's work
        checked, document = read_input(args, recognise), None
    elif args.document_file:
        document = reading.read_document(args.document_file, recognise)
    else:
        document = documents.Document(documents.clean(args.document))
        if not document.text.strip():
            raise cli.UserError("--document is empty; give the text of a document")

    source, settings = source_of(args, args.model_dir), idp_flags.extraction_settings(args)
    form = form_of(args.model_dir, args.typed_fields)
    way = {"typed_fields": form.typed_fields, "thinking": settings.thinking, "engine": source.engine}
    calibration = None if args.no_constraint else calibrations.ConfidenceCalibration.load(args.model_dir, schema, way)
    # before a model loads, so that a calibration that is missing is said now
    threshold = calibrations.acceptance(calibration, args.accept_above, args.model_dir)
    handing = cascade_settings(args)

    from common.teachers.cascade.documents import answers, document_cascade  # which --help can spare

    loaded = vram.load_within_memory(source, args.max_batch_tokens, auto_fit=args.auto_fit, text_only=True)
    if calibration and not calibration.is_of(calibrations.way_of(loaded.model, form, settings.thinking)):
        calibration, threshold = None, calibrations.acceptance(None, args.accept_above, args.model_dir)
    shown = Shown(args.confidence, args.written, threshold, args.evidence)
    extractor = Extractor(loaded, schema, None if args.no_constraint else preflight, settings, form, calibration)
    cascade = document_cascade(handing, extractor, args.model_dir, threshold) if handing else None
    if document is None:
        return extract_rows(args, checked, extractor, shown, cascade)
    ((_, extraction, answer),) = answers(extractor, shown, cascade, [document])
    if extraction.pieces > 1:
        cli.log(f"the document was read in {extraction.pieces} pieces, merged by confidence")
    if extraction.cut:
        cli.log(extraction.cut)
    if extraction.error:
        cli.log(f"error: no valid answer: {extraction.error}\nwhat the model wrote: {extraction.text}")
        return cli.FAILED
    for note in extraction.notes:
        cli.log(note)
    answer = answer if shown.more_than_fields or cascade else extraction.value
    print(json.dumps(answer, indent=2, ensure_ascii=False))
    return cli.CUT if extraction.cut else None


def read_input(args: argparse.Namespace, recognise: str) -> records.CheckedRows:
    """The documents of a folder, by file, or the rows of a file, by line."""
    if Path(args.input).is_dir():
        kept = reading.kept_beside(args.output)
        found = reading.file_rows(reading.document_files(args.input), recognise, kept)
        rows, unit = ((path.name, row) for path, row in found), "file"
    else:
        rows, unit = records.iter_jsonl(args.input), "line"
    return records.check_rows(args.input, rows, ("document",), args.skip_bad_rows, unit, documents.row_fault)


def deciding(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that decide the answers."""
    return {key: value for key, value in vars(args).items() if key not in NOT_DECIDING}


def extract_rows(
    args: argparse.Namespace,
    checked: records.CheckedRows,
    extractor: Extractor,
    shown: Shown,
    cascade: DocumentCascade | None,
) -> int | None:
    """Write an answer to each row; says how many documents were long, and how many got no valid answer."""
    from common.data.resumable import content_key, write_each
    from common.teachers.cascade.documents import answers

    def answer(rows: list[dict]) -> Iterator[tuple[int, dict]]:
        for number, _, shown_answer in answers(extractor, shown, cascade, [documents.of_row(row) for row in rows]):
            named = {"id": rows[number]["id"]} if "id" in rows[number] else {}
            yield number, named | shown_answer

    numbers, rows = checked
    settings = deciding(args) | {"load_in_4bit": getattr(extractor.model, "is_loaded_in_4bit", False)}
    model = [adapters.adapter_hash(args.model_dir), shown.accept_from, extractor.calibration]
    decided_by = [settings, content_key(rows), extractor.schema, *model]
    counts = Counter()
    for row in write_each(args.output, rows, answer, decided_by=decided_by, what="documents"):
        counts.update({"documents"} | ({"pieces", "error", "cut", "notes"} & row.keys()))
    if Path(args.input).is_dir():
        reading.kept_beside(args.output).unlink(missing_ok=True)
    if shown.accept_from is not None:
        accepted, others = write_split(args.output, numbers)
        cli.log(f"{accepted:,} answers are accepted, {others:,} are to be reviewed; they lie beside {args.output}")
    if counts["pieces"]:
        cli.log(f"{counts['pieces']} of {counts['documents']} documents were read in pieces, merged by confidence")
    if counts["notes"]:
        cli.log(f"{counts['notes']} of {counts['documents']} documents have values that are not sure; see their notes")
    if counts["cut"]:
        cli.log(f"{counts['cut']} of {counts['documents']} answers are cut; raise --max_new_tokens for these")
    if counts["error"]:
        cli.log(f"error: {counts['error']} of {counts['documents']} documents have no valid answer; see {args.output}")
        return cli.FAILED
    return cli.CUT if counts["cut"] else None


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
