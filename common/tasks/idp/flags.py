"""The command-line flags of everything that extracts fields from documents, and the settings that they mean."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from common import cli
from common.cli import UserError
from common.data import task_record
from common.generation import json_schema
from common.generation.flags import add_lookup_flag
from common.models.flags import CHOSEN_BATCH, add_engine_flag, add_model_flags, add_thinking_flag, thinks
from common.tasks.idp import reading
from common.tasks.idp.answer_form import TYPED_FIELDS
from common.tasks.idp.extractor import ExtractionSettings
from common.tasks.idp.prompt import INSTRUCTION
from common.tasks.idp.readers import OFFSET, ReadingSettings


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of everything that extracts: the schema, the budget, long documents, the model."""
    parser.add_argument(
        "--schema", help="JSON Schema (draft 2020-12) of the fields; default: that of the run's training"
    )
    parser.add_argument("--best_effort", action="store_true", help="check afterwards what decoding cannot enforce")
    parser.add_argument("--max_new_tokens", type=cli.positive_int, default=512, help="budget of one answer")
    parser.add_argument(
        "--max_len", type=cli.positive_int, help="tokens of prompt and answer together; default: the model's context"
    )
    parser.add_argument(
        "--long",
        choices=("split", "refuse"),
        default="split",
        help="a document beyond --max_len: split at line ends and merge by confidence, or refuse (default: split)",
    )
    parser.add_argument(
        "--on_cut",
        choices=("retry", "flag"),
        default="retry",
        help="an answer that --max_new_tokens has cut: once more with twice of it, or only flag it (default: retry)",
    )
    add_lookup_flag(parser)
    add_thinking_flag(parser, "let a reasoning model think before its answer, within --max_new_tokens of its own")
    add_form_flag(parser)
    parser.add_argument(
        "--dates",
        choices=("day", "month", "year"),
        help="what comes first in 03/04/2019 or 18-01-05; default: as other dates, the language or currency show",
    )
    parser.add_argument(
        "--utc_offset", type=_offset, default="Z", help="of a time that is written without one: Z or e.g. +08:00"
    )
    add_model_flags(parser, chosen_batch=CHOSEN_BATCH)
    add_engine_flag(parser)


def add_form_flag(
    parser: argparse.ArgumentParser,
    *,
    default: str | None = None,
    meaning: str = "as the model was trained, else written",
) -> None:
    """--typed_fields, of everything that builds prompts of documents.

    Args:
        meaning: of the default, in words.
    """
    parser.add_argument(
        "--typed_fields",
        choices=TYPED_FIELDS,
        default=default,
        help="dates, times and numbers: written, copied from the document as text and read by code, or held, written "
        f"by the model in the schema's types (default: {meaning})",
    )


def add_ocr_flag(parser: argparse.ArgumentParser) -> None:
    """--ocr, of everything that reads documents from files."""
    parser.add_argument(
        "--ocr",
        choices=reading.OCR,
        help="text recognition of images and of PDF pages without text, of all pages, or of none (default: auto)",
    )


def recognise(args: argparse.Namespace, *sources: str | None) -> str:
    """What --ocr asks for. Raises UserError: it is given, and none of the files and folders can have a scan."""
    if args.ocr and not any(source and _may_be_scanned(Path(source)) for source in sources):
        raise UserError("--ocr is for a folder of documents, an image or a PDF, and there is none here; leave it out")
    return args.ocr or "auto"


def _may_be_scanned(path: Path) -> bool:
    return path.is_dir() or path.suffix.lower() in (".pdf", *reading.IMAGES)


def _offset(text: str) -> str:
    if not re.fullmatch(OFFSET, text):
        raise argparse.ArgumentTypeError(f"'{text}' is no offset from UTC; give Z or e.g. +08:00")
    return text


def extraction_settings(args: argparse.Namespace) -> ExtractionSettings:
    """How the flags of `add_flags` want documents to be read."""
    return ExtractionSettings(
        args.max_new_tokens,
        args.max_len,
        args.long,
        args.on_cut,
        thinks(args),
        ReadingSettings(args.dates, args.utc_offset),
        args.prompt_lookup_num_tokens,
    )


def schema_of(path: str | None, *model_dirs: str) -> json_schema.Schema:
    """The schema that models are asked for: that of a file, else the one that they were trained for.

    Raises:
        UserError: no file and no such record, a file that cannot be used, or a model that was trained for something
            else than extraction.
    """
    records = {
        model_dir: task_record.check(model_dir, task_record.IDP, INSTRUCTION, "extracting fields from documents")
        for model_dir in model_dirs
    }
    trained = {model_dir: record["schema"] for model_dir, record in records.items() if record and record.get("schema")}
    if path is None and not trained:
        raise UserError(
            f"--schema is missing, and {model_dirs[0]} does not say what it was trained for; give the schema"
        )
    schema = json_schema.load(path) if path else next(iter(trained.values()))
    for model_dir, other in trained.items():
        if other != schema:
            cli.log(f"{model_dir} was trained for another schema than {path or 'that of ' + next(iter(trained))}")
    return schema
