# PYTHON_ARGCOMPLETE_OK
"""Judge code that models write by running tests on it: pass@k, what compiles, lints and passes, with intervals.

    python eval_codegen.py --model_dir runs/sft_code --data data/codegen_val.jsonl --num_samples 10 --k 1,5 \\
        --confirm_run_unsafe_code
    python eval_codegen.py --model_dir models/tiny_coder runs/sft_code runs/dpo_code --data data/codegen_val.jsonl \\
        --plan_then_code --report_dir runs/code_report --confirm_run_unsafe_code
    python eval_codegen.py --data sanitized-mbpp.json --check_tests --confirm_run_unsafe_code

Code runs in the sandbox only, and only with --confirm_run_unsafe_code: definitions, imports and constants, without the
calls and tests that an answer has at its top level (--keep_main keeps them). Prints tables and, last, one JSON line;
--report_dir adds metrics.json, plots and report.html, and keeps answers and verdicts in answers.jsonl, so that a run
that was interrupted goes on. --plan_then_code judges plan-then-code beside direct answers, paired; --max_tries what
`infer_codegen.py --test` brings: answers that fail the first test of their problem are asked for again, and judged on
all of them. Problems that share their group with training rows are counted. --check_tests judges the tests instead of
models: reference solutions must pass, solutions that do nothing or return a constant must fail.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from common import cli, run_record
from common.data import resumable
from common.evaluation import run_figures
from common.export import model_card
from common.files import sha256_file
from common.generation.decoding import Decoding
from common.models import loading as models
from common.models.flags import parse_args, source_of
from common.sandbox import box as sandbox
from common.tasks.codegen import flags as codegen_flags


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__, prog="eval_codegen.py")
    parser.add_argument("--model_dir", nargs="+", default=[], help="run folders, or base models (folder or Hub id)")
    parser.add_argument("--data", required=True, help="problems: codegen_val.jsonl, MBPP, HumanEval, or own rows")
    parser.add_argument("--split", choices=("validation", "dev", "all"), default="validation")
    parser.add_argument("--max_problems", type=cli.positive_int, help="judge a draw of this many problems")
    parser.add_argument("--k", default="1", help="the k of pass@k, e.g. 1,5; at most --num_samples")
    parser.add_argument("--plan_then_code", action="store_true", help="also judge code written after a plan, paired")
    parser.add_argument(
        "--max_tries",
        type=cli.positive_int,
        default=1,
        help="above 1: also judge code that is asked for again while it fails its problem's first test, paired",
    )
    parser.add_argument("--check_tests", action="store_true", help="judge the problems' tests, not models")
    parser.add_argument("--skip_bad_rows", action="store_true", help="name and count bad rows and go on without them")
    parser.add_argument(
        "--report_dir", type=cli.folder, help="write metrics.json, plots, report.html and answers.jsonl here"
    )
    running = parser.add_argument_group("running code")
    running.add_argument("--confirm_run_unsafe_code", action="store_true", help="yes, run it, in the sandbox")
    running.add_argument("--keep_main", action="store_true", help="run what answers do at their top level too")
    running.add_argument("--allow_no_sandbox", action="store_true", help="where no sandbox works, run it without one")
    codegen_flags.add_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(build_parser(), argv)
    ks, decoding = check_flags(args)

    from common.tasks.codegen import evaluate

    split = "all" if args.check_tests else args.split
    selection = evaluate.Selection(args.data, split, args.max_problems, args.seed, args.skip_bad_rows)
    problems = evaluate.choose_problems(selection)
    if args.max_tries > 1 and (alone := sum(len(problem.tests) == 1 for problem in problems)):
        raise cli.UserError(
            f"{alone} of {len(problems)} problems have one test alone, by which answers are judged as well; "
            "--max_tries needs problems with a second test"
        )
    cli.log(f"sandbox: {sandbox.level(args.allow_no_sandbox)}")
    if args.check_tests:
        return print_test_check(args.data, len(problems), evaluate.check_tests(problems, args.allow_no_sandbox))

    from common.tasks.codegen import report

    store = resumable.AnswerStore(Path(args.report_dir, "answers.jsonl") if args.report_dir else None)
    evaluation = evaluate.Evaluation(problems, decoding, ks, store, args.allow_no_sandbox, args.seed, args.keep_main)
    entries, judged = [], []
    for model_dir in args.model_dir:
        settings = evaluate.WriterSettings(
            source_of(args, model_dir), args.prompt_style, args.max_batch_tokens, args.auto_fit
        )
        entry, direct = evaluation.measure(settings, args.plan_then_code, args.max_tries)
        contamination = run_record.contamination(model_dir, evaluation.groups)
        entries.append({"model_dir": model_dir, "contamination": contamination} | entry)
        judged.append(direct)
    result = {
        "evaluator": "codegen",
        "version": 1,
        "data": args.data,
        "data_sha256": sha256_file(args.data),
        "split": args.split,
        "n": len(problems),
        "k": ks,
        "decoding": dataclasses.asdict(decoding),
        "group_name": "problem",
        "sandbox": sandbox.level(args.allow_no_sandbox),
        "contamination": run_record.worst_contamination([entry["contamination"] for entry in entries]),
        "models": entries,
        "differences": [
            {"a": args.model_dir[later], "b": args.model_dir[earlier]}
            | evaluation.difference(judged[later], judged[earlier])
            for later in range(len(judged))
            for earlier in range(later)
        ],
        **run_record.provenance("eval_codegen.py", argv),
    }
    print(report.format_tables(result))
    run_figures.keep(result)
    if args.report_dir:
        cli.log(f"report: {report.write_report(args.report_dir, result)}")
    model_card.refresh(args.model_dir)
    print(report.json_line(result))


def check_flags(args: argparse.Namespace) -> tuple[list[int], Decoding]:
    """Refuse what cannot work before anything is loaded; (the values of --k, and 1; how answers are decoded)."""
    if not args.confirm_run_unsafe_code:
        raise cli.UserError(
            "this runs code that a model wrote, in a sandbox but on this machine; "
            "pass --confirm_run_unsafe_code if you agree"
        )
    if bool(args.model_dir) == args.check_tests:
        raise cli.UserError("give either --model_dir with the models to judge, or --check_tests")
    if len(set(args.model_dir)) < len(args.model_dir):
        raise cli.UserError("--model_dir names the same model twice; name each once")
    for model_dir in args.model_dir:
        models.check_model_dir(model_dir, args.base, onnx=False)
        codegen_flags.check_trained(model_dir)
    try:
        ks = sorted({1, *(cli.positive_int(part) for part in args.k.split(","))})
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise cli.UserError(f"--k {args.k} is not a list of numbers above 0, e.g. 1,5") from error
    if ks[-1] > args.num_samples:
        raise cli.UserError(f"--k {ks[-1]} needs at least as many samples; pass --num_samples {ks[-1]}")
    if args.max_tries > 1 and args.num_samples > 1:
        raise cli.UserError("--max_tries goes with one answer to a problem; leave out --num_samples")
    return ks, codegen_flags.decoding(args)


def print_test_check(data: str, count: int, check: dict) -> None:
    """What `evaluate.check_tests` found in `count` problems; last a JSON line."""
    for kind in ("reference", "pass", "constant"):
        print(f"{kind}: {check[kind]['passed']} of {check[kind]['of']} problems passed")
        for entry in check[kind]["unexpected"]:
            what = entry["error"] or entry["code"].splitlines()[-1].strip()
            print(f"  problem {entry['task_id']}: {what} {entry['detail']}")
    result = {"evaluator": "codegen_tests", "version": 1, "data": data, "n": count, **check}
    print(json.dumps(result, ensure_ascii=False))


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
