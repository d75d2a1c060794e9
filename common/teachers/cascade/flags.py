"""The command-line flags of a cascade, and the settings that they mean."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from common import cli
from common.cli import UserError
from common.models import gguf_import
from common.models import loading as models
from common.models.flags import source_of
from common.models.source import LLAMA_CPP, TORCH, ModelSource
from common.teachers.cascade.kept_rows import check_folder
from common.teachers.cascade.settings import TIMEOUT, CascadeSettings, JudgedCascade, endpoint, is_address
from common.teachers.settings import EndpointSettings, LocalSettings

EVALUATION_TIMEOUT, EVALUATION_ATTEMPTS = 120.0, 6  # seconds, and tries, of a row: here nobody waits for it
NEEDS = ("cascade_model", "cascade_below", "cascade_per_hour", "cascade_timeout")


def add_cascade_flags(parser: argparse.ArgumentParser) -> None:
    """Those of infer_*.py."""
    group = parser.add_argument_group("cascade: unsure rows go to a teacher")
    add_teacher_flags(group)
    group.add_argument(
        "--cascade_below",
        type=cli.fraction,
        metavar="P",
        help="hand on what is less probable than this, beside what the calibration abstains from",
    )
    group.add_argument(
        "--cascade_per_hour", type=cli.positive_int, metavar="N", help="rows in an hour, at most; default: all"
    )
    group.add_argument(
        "--cascade_timeout", type=float, metavar="SECONDS", help=f"for a row at the URL; default: {TIMEOUT:g}"
    )
    group.add_argument(
        "--cascade_keep",
        action="store_true",
        help="yes, keep the teacher's answers and their texts as training rows, in cascade.jsonl of the run",
    )


def add_teacher_flags(group: argparse._ArgumentGroup) -> None:
    """Who the teacher is."""
    group.add_argument("--cascade", metavar="URL|MODEL", help="an OpenAI-shaped API, up to /v1, or a model here")
    group.add_argument("--cascade_model", metavar="NAME", help="the model's name at the URL")


def add_judged_flags(parser: argparse.ArgumentParser) -> None:
    """Those of an evaluation."""
    group = parser.add_argument_group("cascade: what handing unsure rows on to a teacher brings and costs")
    add_teacher_flags(group)
    group.add_argument("--cascade_price", type=float, metavar="PRICE", help="of one row that is handed on")


def judged_cascade(args: argparse.Namespace) -> JudgedCascade | None:
    """What the flags of `add_judged_flags` ask for; None without --cascade.

    Raises:
        UserError: what cannot work.
    """
    if not args.cascade:
        given = [name for name in ("cascade_model", "cascade_price") if getattr(args, name) is not None]
        if given:
            raise UserError(f"--{given[0]} goes with --cascade; add it, or leave --{given[0]} out")
        return None
    if args.cascade_price is not None and not 0 <= args.cascade_price < float("inf"):
        raise UserError(f"--cascade_price {args.cascade_price:g} must be 0 or above")
    if is_address(args.cascade):
        kept = str(Path(args.report_dir, "cascade_answers.jsonl")) if args.report_dir else None
        teacher = endpoint(args.cascade, args.cascade_model, EVALUATION_TIMEOUT, attempts=EVALUATION_ATTEMPTS)
        return JudgedCascade(teacher, args.cascade_price, kept)
    if args.cascade_model:
        raise UserError("--cascade_model is of a URL; leave it out with a local model")
    source = local_source(args)
    if args.model_dir == [source.model_dir]:
        raise UserError("--cascade names the model that is judged; give another one as the teacher")
    return JudgedCascade(source, args.cascade_price)


def local_source(args: argparse.Namespace) -> ModelSource:
    """The model of --cascade: a GGUF is run as it is, by llama.cpp, whatever runs the others; the rest is torch's.

    Raises:
        UserError: there is none.
    """
    folder = gguf_import.packed_folder(args.cascade)
    if gguf_import.file_of(folder):
        return ModelSource(folder, engine=LLAMA_CPP)
    models.check_model_dir(args.cascade)
    return replace(source_of(args, args.cascade), engine=TORCH, dtype="auto")


def cascade_settings(args: argparse.Namespace) -> CascadeSettings | None:
    """What the flags ask for; None without --cascade.

    Raises:
        UserError: what cannot work.
    """
    if not args.cascade:
        given = [name for name in NEEDS if getattr(args, name) is not None] + ["cascade_keep"] * args.cascade_keep
        if given:
            raise UserError(f"--{given[0]} goes with --cascade; add it, or leave --{given[0]} out")
        return None
    timeout = TIMEOUT if args.cascade_timeout is None else args.cascade_timeout
    if not 0 < timeout < float("inf"):
        raise UserError(f"--cascade_timeout {timeout:g} must be above 0")
    teacher: EndpointSettings | LocalSettings
    if is_address(args.cascade):
        teacher = endpoint(args.cascade, args.cascade_model, timeout)
    else:
        if args.cascade_model or args.cascade_timeout:
            raise UserError("--cascade_model and --cascade_timeout are of a URL; leave them out with a local model")
        teacher = LocalSettings(replace(local_source(args), base=None), args.max_batch_tokens, args.auto_fit)
    if args.cascade_keep:
        check_folder(args.model_dir)
    return CascadeSettings(teacher, args.cascade_below, args.cascade_per_hour, timeout, args.cascade_keep)
