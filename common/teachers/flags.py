"""The command-line flags of teacher_generate.py, what cannot work among them, and the settings that they mean."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import cli
from common.cli import UserError
from common.data import tables
from common.generation import json_schema
from common.generation.decoding import Decoding
from common.generation.flags import add_lookup_flag
from common.models import loading as models
from common.models.batching import MAX_BATCH_TOKENS
from common.models.flags import CHOSEN_BATCH, add_engine_flag, add_model_flags, add_thinking_flag, source_of, thinks
from common.sandbox import box as sandbox
from common.tasks.idp.flags import add_form_flag
from common.tasks.ranking.loading import task_for
from common.teachers import build
from common.teachers.interview import Teacher
from common.teachers.settings import EndpointSettings, LocalSettings, address_fault, gives_decisions
from common.teachers.tasks import Code, Documents, Labels, TeacherTask

SAMPLES, TEMPERATURE = 4, 0.8  # of each row with --preferences
ENDPOINT_ONLY: dict[str, Any] = {  # flags, with their defaults
    **dict.fromkeys(("model", "api_key_env", "requests_per_minute", "extra_body", "top_logprobs")),
    **{name: getattr(EndpointSettings, name) for name in ("concurrency", "timeout", "max_attempts")},
}
TOP_LOGPROBS = 20  # the most that OpenAI gives


def add_teacher_flags(parser: argparse.ArgumentParser) -> None:
    """All flags of teacher_generate.py."""
    parser.add_argument("--data", required=True, help="rows to answer: JSONL, a JSON list, CSV or Parquet")
    parser.add_argument(
        "--out",
        type=cli.output_file,
        required=True,
        help="rows to write, for kd_train.py (or dpo_train.py): .jsonl, of label tasks also .csv or .parquet",
    )
    parser.add_argument(
        "--task", default="creditmix", metavar="creditmix|idp|codegen|FILE.yaml", help="default: creditmix"
    )
    parser.add_argument("--schema", help="JSON Schema of --task idp")
    add_form_flag(parser, meaning="written")
    parser.add_argument("--max_tries", type=cli.positive_int, default=3, help="answers to a row until one is usable")
    parser.add_argument("--skip_bad_rows", action="store_true", help="name and count bad rows and go on without them")
    _add_teacher_group(parser)
    _add_output_group(parser)
    decoding = parser.add_argument_group("decoding")
    decoding.add_argument("--max_new_tokens", type=cli.positive_int, default=512, help="of one answer")
    decoding.add_argument(
        "--temperature", type=not_negative, help=f"default: 0 (greedy), {TEMPERATURE} with --preferences"
    )
    decoding.add_argument("--top_p", type=float, default=1.0, help="probability that sampling stays within")
    decoding.add_argument("--seed", type=cli.seed, default=0)
    add_lookup_flag(decoding)
    add_thinking_flag(
        decoding, "let a local --teacher that reasons think first; its answer is read from behind the thinking"
    )
    running = parser.add_argument_group("running code (--task codegen)")
    running.add_argument("--confirm_run_unsafe_code", action="store_true", help="yes, run the tests, in the sandbox")
    running.add_argument("--allow_no_sandbox", action="store_true", help="where no sandbox works, run it without one")
    _add_local_flags(parser)


def _add_local_flags(parser: argparse.ArgumentParser) -> None:
    add_model_flags(parser, chosen_batch=f"{CHOSEN_BATCH}; with --probabilities {MAX_BATCH_TOKENS}")
    add_engine_flag(parser)


def _add_teacher_group(parser: argparse.ArgumentParser) -> None:
    who = parser.add_argument_group("teacher: one of the first two")
    who.add_argument("--teacher", help="a local model: run folder, model folder or Hub id")
    who.add_argument(
        "--endpoint",
        metavar="URL",
        help="an OpenAI-shaped API, up to /v1; with --probabilities also up to /v1/decisions or /v1/systemone",
    )
    who.add_argument("--model", help="the model's name at the endpoint")
    who.add_argument(
        "--api_key_env", metavar="NAME", help=f"environment variable with the key; default: {build.KEY_VARIABLE}"
    )
    who.add_argument(
        "--concurrency", type=cli.positive_int, default=ENDPOINT_ONLY["concurrency"], help="requests at the same time"
    )
    who.add_argument("--requests_per_minute", type=above_zero, help="at most; default: no limit")
    who.add_argument("--timeout", type=above_zero, default=ENDPOINT_ONLY["timeout"], help="seconds for one attempt")
    who.add_argument(
        "--max_attempts",
        type=cli.positive_int,
        default=ENDPOINT_ONLY["max_attempts"],
        help="of a request that fails, with backoff",
    )
    who.add_argument("--extra_body", metavar="JSON", help="more for each request's body; null takes a field out")
    who.add_argument("--price_in", type=not_negative, default=0.0, help="per million tokens of prompts")
    who.add_argument("--price_out", type=not_negative, default=0.0, help="per million tokens of answers")


def _add_output_group(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what is written, if not one answer a row").add_mutually_exclusive_group()
    what.add_argument(
        "--reasons",
        nargs="?",
        const="field",
        choices=("field", "rows"),
        help='the teacher explains, then answers: "reason" beside each answer; rows: also as a row of its own, so that '
        "kd_train.py learns both (distilling step by step, arXiv:2305.02301)",
    )
    what.add_argument("--preferences", action="store_true", help="DPO pairs: best and worst of --num_samples answers")
    what.add_argument(
        "--probabilities",
        action="store_true",
        help="label tasks: also each label's, from top_logprobs, a decisions endpoint or a local label ranker",
    )
    parser.add_argument("--num_samples", type=cli.positive_int, help=f"with --preferences; default: {SAMPLES}")
    parser.add_argument(
        "--rank_by",
        choices=("task", "teacher"),
        help="with --preferences. task (default): gold, schema, tests; teacher: its own ranking of what is usable",
    )
    parser.add_argument("--top_logprobs", type=cli.positive_int, help=f"with --probabilities; default: {TOP_LOGPROBS}")


def not_negative(text: str) -> float:
    """argparse type: a number, 0 or above."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return value


def above_zero(text: str) -> float:
    """argparse type: a number above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


# Before anything is asked.


def check_flags(args: argparse.Namespace) -> None:
    """Refuse what cannot work before anything is read; fills in the defaults that depend on other flags."""
    for suffix in ("", ".raw.jsonl", ".rejects.jsonl", ".run.json"):
        if Path(args.out + suffix).resolve() == Path(args.data).resolve():
            raise UserError(f"--out {args.out} would replace --data; choose another name")
    if tables.form_of(args.out) != "jsonl" and args.task in ("idp", "codegen"):
        raise UserError(f"--out {args.out}: rows of --task {args.task} are written as JSONL; name it .jsonl")
    _check_teacher(args)
    _check_task(args)
    if args.top_logprobs and not args.probabilities:
        raise UserError("--top_logprobs goes with --probabilities")
    if (args.num_samples or args.rank_by) and not args.preferences:
        raise UserError("--num_samples and --rank_by go with --preferences")
    args.num_samples = (args.num_samples or SAMPLES) if args.preferences else 1
    if args.preferences and args.num_samples < 2:
        raise UserError("--num_samples must be at least 2: a pair has two sides")
    if args.temperature is None:
        args.temperature = TEMPERATURE if args.preferences else 0.0
    if args.preferences and args.temperature == 0:
        raise UserError("--preferences with --temperature 0 gives the same answer each time; give one above 0")
    if not 0 < args.top_p <= 1:
        raise UserError(f"--top_p {args.top_p} is not in (0, 1]")


def _check_teacher(args: argparse.Namespace) -> None:
    if bool(args.teacher) == bool(args.endpoint):
        raise UserError("give either --teacher with a local model, or --endpoint with --model")
    if args.teacher:
        if given := _changed(args, ENDPOINT_ONLY):
            raise UserError(f"--{given[0]} goes with --endpoint; leave it out, or give --endpoint for --teacher")
        if thinks(args) and args.probabilities:
            raise UserError("--thinking on is for answers that are written; leave it out with --probabilities")
        models.check_model_dir(args.teacher, args.base)
    else:
        _check_endpoint(args)


def _changed(args: argparse.Namespace, defaults: Mapping[str, Any]) -> list[str]:
    """The flags of `defaults` that have another value."""
    return [name for name, default in defaults.items() if getattr(args, name) != default]


def _local_only() -> dict[str, Any]:
    """Flags of a model that runs here, with their defaults."""
    parser = argparse.ArgumentParser(add_help=False)
    for add in (_add_local_flags, add_lookup_flag):
        add(parser)
    return vars(parser.parse_args([]))


def _check_endpoint(args: argparse.Namespace) -> None:
    """Refuse an address or a body that cannot be; reads --extra_body."""
    if thinks(args):
        raise UserError(
            "--thinking on goes with a local --teacher; an endpoint is told by --extra_body, such as "
            '\'{"chat_template_kwargs": {"enable_thinking": true}}\''
        )
    if given := _changed(args, _local_only()):
        raise UserError(f"--{given[0]} goes with a local --teacher; leave it out with --endpoint")
    if not args.model:
        raise UserError("--endpoint needs --model with the model's name there")
    if fault := address_fault(args.endpoint):
        raise UserError(f"--endpoint {fault}")
    if gives_decisions(args.endpoint):
        if not args.probabilities:
            raise UserError(
                f"--endpoint {args.endpoint} writes no text; add --probabilities, or give a chat API up to /v1"
            )
        if args.top_logprobs:
            raise UserError("--top_logprobs is for a chat API; leave it out with a decisions endpoint")
    try:
        args.extra_body = json.loads(args.extra_body or "{}")
    except ValueError as error:
        raise UserError(f"--extra_body is not JSON ({error}); give an object such as '{{\"top_k\": 20}}'") from error
    if not isinstance(args.extra_body, dict):
        raise UserError("--extra_body must be a JSON object, such as '{\"top_k\": 20}'")


def _check_task(args: argparse.Namespace) -> None:
    if args.task == "idp" and not args.schema:
        raise UserError("--task idp needs --schema with the JSON Schema of its fields")
    if args.schema and args.task != "idp":
        raise UserError(f"--schema goes with --task idp, not {args.task}; leave it out")
    if args.typed_fields and args.task != "idp":
        raise UserError(f"--typed_fields goes with --task idp, not {args.task}; leave it out")
    if args.task != "codegen" and (args.confirm_run_unsafe_code or args.allow_no_sandbox):
        raise UserError(f"--confirm_run_unsafe_code and --allow_no_sandbox go with --task codegen, not {args.task}")
    if args.probabilities and args.task in ("idp", "codegen"):
        raise UserError(f"--probabilities is for label tasks; --task {args.task} has no labels")


# What the flags mean.


def task_of(args: argparse.Namespace) -> TeacherTask:
    """The task of --task.

    Raises:
        UserError: a schema that no fields can satisfy, a label set that cannot be read, or no sandbox.
    """
    if args.task == "idp":
        schema = json_schema.load(args.schema)
        json_schema.preflight(schema, best_effort=True)
        return Documents(schema, args.typed_fields or "written")
    if args.task == "codegen":
        if args.confirm_run_unsafe_code:
            cli.log(f"sandbox: {sandbox.level(args.allow_no_sandbox)}")
        return Code(args.confirm_run_unsafe_code, args.allow_no_sandbox)
    return Labels(task_for(args.task, *([args.teacher] if args.teacher else [])))


def teacher_of(args: argparse.Namespace, task: TeacherTask) -> Teacher:
    """The teacher of --teacher or --endpoint, ready to be asked.

    Raises:
        UserError: it cannot be had.
    """
    decoding = Decoding(
        args.max_new_tokens,
        args.temperature,
        args.top_p,
        seed=args.seed,
        thinking=thinks(args),
        prompt_lookup_num_tokens=args.prompt_lookup_num_tokens,
    )
    if args.endpoint:
        endpoint = EndpointSettings(
            args.endpoint,
            args.model,
            args.api_key_env,
            args.concurrency,
            args.requests_per_minute,
            args.timeout,
            args.max_attempts,
            args.extra_body,
        )
        if gives_decisions(args.endpoint):
            return build.decisions_teacher(endpoint, task.task)
        top_logprobs = (args.top_logprobs or TOP_LOGPROBS) if args.probabilities else None
        return build.endpoint_teacher(endpoint, decoding, top_logprobs)
    local = LocalSettings(source_of(args, args.teacher), args.max_batch_tokens, args.auto_fit)
    return build.local_teacher(local, decoding, task.task if args.probabilities else None)
