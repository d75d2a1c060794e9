"""A teacher writes training data: rows in, KD rows {"input", "teacher_output"} out, or preference pairs.

    python teacher_generate.py --teacher Qwen/Qwen2.5-7B-Instruct --data data/creditmix_sft.jsonl \\
        --out data/creditmix_teacher.jsonl --task creditmix
    python teacher_generate.py --endpoint http://localhost:8001/v1 --model qwen2.5-72b --data receipts.jsonl \\
        --out data/idp_teacher.jsonl --task idp --schema data/idp_schema.json
    python teacher_generate.py --endpoint https://api.openai.com/v1 --model gpt-4o --data problems.jsonl \\
        --out data/codegen_pairs.jsonl --task codegen --preferences --num_samples 6 --confirm_run_unsafe_code

The teacher is a local model (in 4 bits on a GPU), or anything that speaks OpenAI's chat API; its key comes from the
environment. Rows are {"input"[, "output"]} as the trainers take them, or what the task's *_prepare.py reads and writes;
"output" (or the raw row's own answer) counts as gold. An answer that cannot be used (no label of the set, JSON that the
schema refuses, code that does not compile or fails its tests) is asked for again with the reason, --max_tries times in
all. Writes OUT, OUT.rejects.jsonl (rows without a usable answer, and why), OUT.raw.jsonl (every raw answer as it came;
an interrupted run goes on from it and asks nothing twice) and OUT.run.json (settings, tokens, cost, agreement with
gold). Exit code 1: some rows got no answer, for a reason that may pass; the same command asks for those again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from common import cli, run_record
from common.cli import UserError
from common.files import write_json, write_jsonl
from common.generation import json_schema
from common.models import adapters
from common.models import loading as models
from common.models.flags import add_model_flags, parse_args, source_of
from common.sandbox import box as sandbox
from common.tasks.ranking.loading import load_task
from common.teachers import tasks as teacher_rows
from common.teachers.tasks import Code, Documents, Item, Labels
from common.vram import preflight as vram

if TYPE_CHECKING:
    from common.teachers.dataset import Written

SAMPLES, TEMPERATURE = 4, 0.8  # of each row with --preferences
ENDPOINT_ONLY = ("model", "api_key_env", "requests_per_minute", "extra_body", "top_logprobs")
TOP_LOGPROBS = 20  # the most that OpenAI gives
KEY_VARIABLE = "OPENAI_API_KEY"


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__, prog="teacher_generate.py")
    parser.add_argument("--data", required=True, help="rows to answer: JSONL, JSON list or CSV")
    parser.add_argument("--out", required=True, help="JSONL to write, for kd_train.py (or dpo_train.py)")
    parser.add_argument(
        "--task", default="creditmix", metavar="creditmix|idp|codegen|FILE.yaml", help="default: creditmix"
    )
    parser.add_argument("--schema", help="JSON Schema of --task idp")
    parser.add_argument("--max_tries", type=cli.positive_int, default=3, help="answers to a row until one is usable")
    parser.add_argument("--skip_bad_rows", action="store_true", help="name and count bad rows and go on without them")
    who = parser.add_argument_group("teacher: one of the first two")
    who.add_argument("--teacher", help="a local model: run folder, model folder or Hub id")
    who.add_argument("--endpoint", metavar="URL", help="an OpenAI-shaped API, up to /v1")
    who.add_argument("--model", help="the model's name at the endpoint")
    who.add_argument(
        "--api_key_env", metavar="NAME", help=f"environment variable with the key; default: {KEY_VARIABLE}"
    )
    who.add_argument("--concurrency", type=cli.positive_int, default=8, help="requests at the same time")
    who.add_argument("--requests_per_minute", type=above_zero, help="at most; default: no limit")
    who.add_argument("--timeout", type=above_zero, default=120.0, help="seconds for one attempt")
    who.add_argument("--max_attempts", type=cli.positive_int, default=6, help="of a request that fails, with backoff")
    who.add_argument("--extra_body", metavar="JSON", help="more for each request's body; null takes a field out")
    who.add_argument("--price_in", type=not_negative, default=0.0, help="per million tokens of prompts")
    who.add_argument("--price_out", type=not_negative, default=0.0, help="per million tokens of answers")
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
        help="label tasks: also each label's, from top_logprobs or a local label ranker",
    )
    parser.add_argument("--num_samples", type=cli.positive_int, help=f"with --preferences; default: {SAMPLES}")
    parser.add_argument(
        "--rank_by",
        choices=("task", "teacher"),
        help="with --preferences. task (default): gold, schema, tests; teacher: its own ranking of what is usable",
    )
    parser.add_argument("--top_logprobs", type=cli.positive_int, help=f"with --probabilities; default: {TOP_LOGPROBS}")
    decoding = parser.add_argument_group("decoding")
    decoding.add_argument("--max_new_tokens", type=cli.positive_int, default=512, help="of one answer")
    decoding.add_argument(
        "--temperature", type=not_negative, help=f"default: 0 (greedy), {TEMPERATURE} with --preferences"
    )
    decoding.add_argument("--top_p", type=float, default=1.0, help="probability that sampling stays within")
    decoding.add_argument("--seed", type=int, default=0)
    running = parser.add_argument_group("running code (--task codegen)")
    running.add_argument("--confirm_run_unsafe_code", action="store_true", help="yes, run the tests, in the sandbox")
    running.add_argument("--allow_no_sandbox", action="store_true", help="where no sandbox works, run it without one")
    add_model_flags(parser)
    return parser


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


def main(argv: Sequence[str] | None = None) -> int | None:
    args = parse_args(build_parser(), argv)
    check_flags(args)
    task = choose_task(args)
    items = teacher_rows.read_items(args.data, task, args.skip_bad_rows)
    check_items(args, task, items)

    from common.teachers import dataset as teacher_dataset
    from common.teachers.interview import Interview

    interview = Interview(build_teacher(args, task), f"{args.out}.raw.jsonl")
    if args.preferences:
        by_teacher = args.rank_by == "teacher"
        written = teacher_dataset.write_pairs(
            task, items, interview, samples=args.num_samples, by_teacher=by_teacher, max_tries=args.max_tries
        )
    else:
        written = teacher_dataset.write_answers(
            task,
            items,
            interview,
            max_tries=args.max_tries,
            reasons=args.reasons,
            probabilities=args.probabilities,
        )
    return finish(args, len(items), interview.totals(), written, argv)


# Before anything is asked.


def check_flags(args: argparse.Namespace) -> None:
    """Refuse what cannot work before anything is read."""
    for suffix in ("", ".raw.jsonl", ".rejects.jsonl", ".run.json"):
        if Path(args.out + suffix).resolve() == Path(args.data).resolve():
            raise UserError(f"--out {args.out} would replace --data; choose another name")
    if Path(args.out).is_dir():
        raise UserError(f"--out {args.out} is a folder; give the name of a file")
    if bool(args.teacher) == bool(args.endpoint):
        raise UserError("give either --teacher with a local model, or --endpoint with --model")
    if args.teacher:
        given = [name for name in ENDPOINT_ONLY if getattr(args, name) is not None]
        if given:
            raise UserError(f"--{given[0]} goes with --endpoint; leave it out, or give --endpoint for --teacher")
        models.check_model_dir(args.teacher, args.base)
    else:
        check_endpoint(args)
    if args.task == "idp" and not args.schema:
        raise UserError("--task idp needs --schema with the JSON Schema of its fields")
    if args.schema and args.task != "idp":
        raise UserError(f"--schema goes with --task idp, not {args.task}; leave it out")
    if args.task != "codegen" and (args.confirm_run_unsafe_code or args.allow_no_sandbox):
        raise UserError(f"--confirm_run_unsafe_code and --allow_no_sandbox go with --task codegen, not {args.task}")
    if args.probabilities and args.task in ("idp", "codegen"):
        raise UserError(f"--probabilities is for label tasks; --task {args.task} has no labels")
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


def check_endpoint(args: argparse.Namespace) -> None:
    """Refuse an address or a body that cannot be; reads --extra_body."""
    if not args.model:
        raise UserError("--endpoint needs --model with the model's name there")
    try:
        parts = urlsplit(args.endpoint)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # no such port
        good = False
    if not good:
        raise UserError(f"--endpoint {args.endpoint} is no address such as http://localhost:8001/v1")
    if "@" in parts.netloc or parts.query:
        raise UserError("--endpoint must not hold a key, which would be kept in the record; put it in the environment")
    try:
        args.extra_body = json.loads(args.extra_body or "{}")
    except ValueError as error:
        raise UserError(f"--extra_body is not JSON ({error}); give an object such as '{{\"top_k\": 20}}'") from error
    if not isinstance(args.extra_body, dict):
        raise UserError("--extra_body must be a JSON object, such as '{\"top_k\": 20}'")


def choose_task(args: argparse.Namespace) -> Labels | Documents | Code:
    """The task of --task."""
    if args.task == "idp":
        schema = json_schema.load(args.schema)
        json_schema.preflight(schema, best_effort=True)  # stops at a schema that no fields can satisfy
        return Documents(schema)
    if args.task == "codegen":
        if args.confirm_run_unsafe_code:
            cli.log(f"sandbox: {sandbox.level(args.allow_no_sandbox)}")
        return Code(args.confirm_run_unsafe_code, args.allow_no_sandbox)
    return Labels(load_task(args.task))


def check_items(args: argparse.Namespace, task: Labels | Documents | Code, items: Sequence[Item]) -> None:
    """Say what the rows lack, and which of them no student should be trained on."""
    if held_out := sum(1 for _ in teacher_rows.held_out(items)):
        cli.log(
            f"warning: {held_out} of {len(items)} rows belong to groups that are held out for dev and validation; a "
            "student that is trained on them cannot be judged on those"
        )
    if isinstance(task, Code) and any(item.tests for item in items) and not task.run_tests:
        cli.log("the rows' tests are not run, so code has only to compile; --confirm_run_unsafe_code runs them")
    if args.probabilities and args.teacher:
        instruction = task.task.prompt("")
        for item in items:
            if not item.prompt.startswith(instruction):
                raise UserError(
                    f"{args.data}, row {item.number}: the input does not begin with the instruction of {task.name}, "
                    "which the label ranker puts; give rows of that task"
                )


def build_teacher(args: argparse.Namespace, task: Labels | Documents | Code) -> Any:
    """The teacher of --teacher or --endpoint."""
    if args.endpoint:
        from common.teachers.chat_endpoint import ChatEndpoint

        return ChatEndpoint(
            args.endpoint,
            args.model,
            request_options(args),
            api_key=api_key(args.api_key_env),
            concurrency=args.concurrency,
            requests_per_minute=args.requests_per_minute,
            timeout=args.timeout,
            max_attempts=args.max_attempts,
        )
    source = source_of(args, args.teacher)
    loaded = vram.load_within_memory(source, args.max_batch_tokens, auto_fit=args.auto_fit)
    identity = [adapters.adapter_hash(args.teacher), str(loaded.model.dtype), models.use_4bit(args.load_in_4bit)]
    if args.probabilities:
        from common.tasks.ranking.classifier import Classifier
        from common.teachers.label_probabilities import RankingTeacher

        return RankingTeacher(Classifier.on(loaded, args.teacher, task.task), identity)
    from common.teachers.local_model import LocalTeacher

    return LocalTeacher(
        loaded.model,
        loaded.tokenizer,
        identity,
        loaded.max_batch_tokens,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
    )


def request_options(args: argparse.Namespace) -> dict[str, Any]:
    """What stands in each request's body besides model and messages."""
    options: dict[str, Any] = {"temperature": args.temperature, "max_tokens": args.max_new_tokens}
    if args.temperature > 0:
        options |= {"top_p": args.top_p, "seed": args.seed}
    if args.probabilities:
        options |= {"max_tokens": 1, "logprobs": True, "top_logprobs": args.top_logprobs or TOP_LOGPROBS}
    return {key: value for key, value in (options | args.extra_body).items() if value is not None}


def api_key(variable: str | None) -> str | None:
    """The key in the environment; none where the default variable is not set, as for a server of one's own."""
    key = os.environ.get(variable or KEY_VARIABLE, "").strip()
    if variable and not key:
        raise UserError(f"--api_key_env {variable}: there is no such environment variable; export it with the key")
    if not key.isascii():
        raise UserError(f"the API key in {variable or KEY_VARIABLE} has characters that no key has; export it again")
    return key or None


# Afterwards.


def finish(
    args: argparse.Namespace, asked: int, totals: dict[str, int], written: Written, argv: Sequence[str] | None
) -> int | None:
    """Write OUT, its rejects and its record, and say what is in them; FAILED where rows got no answer at all."""
    from common.teachers import report as teacher_report

    write_jsonl(args.out, written.rows)
    rejects = Path(f"{args.out}.rejects.jsonl")
    rejects.unlink(missing_ok=True)
    if written.rejects:
        write_jsonl(rejects, written.rejects)
    record = {
        "task": args.task,
        "teacher": args.teacher or {"endpoint": args.endpoint, "model": args.model},
        "settings": vars(args),
        "data": run_record.describe_data(args.data, asked),
        **teacher_report.figures(asked, totals, written, args.price_in, args.price_out),
        **run_record.provenance("teacher_generate.py", argv),
    }
    write_json(f"{args.out}.run.json", record)
    print(teacher_report.summary(record))
    for path in (args.out, *([rejects] if written.rejects else []), f"{args.out}.raw.jsonl", f"{args.out}.run.json"):
        print(path)
    for warning in teacher_report.warnings(record):
        cli.log(f"warning: {warning}")
    if unanswered := record["rows"]["unanswered"]:
        cli.log(f"error: {unanswered} of {asked} rows got no answer; the same command asks for them again")
        return cli.FAILED
    return None


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
