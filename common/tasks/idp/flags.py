"""The command-line flags of everything that extracts fields from documents, and the settings that they mean."""

from __future__ import annotations

import argparse

from common import cli
from common.models.flags import add_model_flags
from common.tasks.idp.extractor import ExtractionSettings


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of everything that extracts: the schema, the budget, long documents, the model."""
    parser.add_argument("--schema", required=True, help="JSON Schema (draft 2020-12) of the fields")
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
    parser.add_argument(
        "--thinking",
        choices=("on", "off"),
        default="off",
        help="on: let a reasoning model think before its answer, within --max_new_tokens of its own",
    )
    add_model_flags(parser)


def extraction_settings(args: argparse.Namespace) -> ExtractionSettings:
    """How the flags of `add_flags` want documents to be read."""
    return ExtractionSettings(args.max_new_tokens, args.max_len, args.long, args.on_cut, args.thinking == "on")
