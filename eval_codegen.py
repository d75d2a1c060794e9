"""Judge code that models write by running tests on it: pass@k, what compiles, lints and passes, with intervals.

    python eval_codegen.py --model_dir runs/sft_code --data data/codegen_val.jsonl --num_samples 10 --k 1,5 \\
        --confirm_run_unsafe_code
    python eval_codegen.py --model_dir models/tiny_coder runs/sft_code runs/dpo_code --data data/codegen_val.jsonl \\
        --plan_then_code --report_dir runs/code_report --confirm_run_unsafe_code
    python eval_codegen.py --data sanitized-mbpp.json --check_tests --confirm_run_unsafe_code

Code runs in the sandbox only, and only with --confirm_run_unsafe_code. Prints tables and, last, one JSON line;
--report_dir adds metrics.json, plots and report.html, and keeps answers and verdicts in answers.jsonl, so that a run
that was interrupted goes on. --plan_then_code judges plan-then-code beside direct answers, paired. Problems that share
their group with training rows are counted. --check_tests judges the tests instead of models: reference solutions must
pass, solutions that do nothing or return a constant must fail.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from common import cli, run_record
from common.data import resumable, splits
from common.files import sha256_file
from common.models import adapters
from common.models import loading as models
from common.sandbox import box as sandbox
from common.sandbox import grading
from common.tasks.codegen import metrics as code_metrics
from common.tasks.codegen import mutation as code_mutation
from common.tasks.codegen import prompt as codegen
from common.tasks.codegen import rows as code_problems
from common.tasks.codegen import writer as code_writer
from common.tasks.codegen.rows import Problem

WINDOW = 32  # problems whose answers are kept together


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__, prog="eval_codegen.py")
    parser.add_argument("--model_dir", nargs="+", default=[], help="run folders, or base models (folder or Hub id)")
    parser.add_argument("--data", required=True, help="problems: codegen_val.jsonl, MBPP, HumanEval, or own rows")
    parser.add_argument("--split", choices=("validation", "dev", "all"), default="validation")
    parser.add_argument("--max_problems", type=cli.positive_int, help="judge a draw of this many problems")
    parser.add_argument("--k", default="1", help="the k of pass@k, e.g. 1,5; at most --num_samples")
    parser.add_argument("--plan_then_code", action="store_true", help="also judge code written after a plan, paired")
    parser.add_argument("--check_tests", action="store_true", help="judge the problems' tests, not models")
    parser.add_argument("--skip_bad_rows", action="store_true", help="name and count bad rows and go on without them")
    parser.add_argument("--report_dir", help="write metrics.json, plots, report.html and answers.jsonl here")
    running = parser.add_argument_group("running code")
    running.add_argument("--confirm_run_unsafe_code", action="store_true", help="yes, run it, in the sandbox")
    running.add_argument("--allow_no_sandbox", action="store_true", help="where no sandbox works, run it without one")
    code_writer.add_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int | None:
    args = cli.parse_args(build_parser(), argv)
    ks = check_flags(args)
    problems = choose_problems(args)
    cli.log(f"sandbox: {sandbox.level(args.allow_no_sandbox)}")
    if args.check_tests:
        return check_tests(args, problems)

    from common.tasks.codegen import report as codegen_report

    store = resumable.AnswerStore(Path(args.report_dir, "answers.jsonl") if args.report_dir else None)
    groups = [problem.group for problem in problems]
    modes = ("direct", "plan_then_code") if args.plan_then_code else ("direct",)
    entries, firsts = [], []
    for model_dir in args.model_dir:
        judged = {mode: judge(args, model_dir, mode, problems, store) for mode in modes}
        entry = {"model_dir": model_dir, "contamination": run_record.contamination(model_dir, groups)}
        entry |= figures(problems, judged["direct"], ks, args.seed)
        if args.plan_then_code:
            entry["plan_then_code"] = figures(problems, judged["plan_then_code"], ks, args.seed)
            entry["plan_difference"] = code_metrics.difference(
                judged["plan_then_code"], judged["direct"], ks, groups, args.seed
            )
        entries.append(entry)
        firsts.append(judged["direct"])
    result = {
        "evaluator": "codegen",
        "version": 1,
        "data": args.data,
        "data_sha256": sha256_file(args.data),
        "split": args.split,
        "n": len(problems),
        "k": ks,
        "decoding": code_writer.decoding(args),
        "group_name": "problem",
        "sandbox": sandbox.level(args.allow_no_sandbox),
        "contamination": run_record.worst_contamination([entry["contamination"] for entry in entries]),
        "models": entries,
        "differences": [
            {"a": args.model_dir[later], "b": args.model_dir[earlier]}
            | code_metrics.difference(firsts[later], firsts[earlier], ks, groups, args.seed)
            for later in range(len(firsts))
            for earlier in range(later)
        ],
        **run_record.provenance("eval_codegen.py", argv),
    }
    print(codegen_report.format_tables(result))
    if args.report_dir:
        cli.log(f"report: {codegen_report.write_report(args.report_dir, result)}")
    print(codegen_report.json_line(result))
    return None


def check_flags(args: argparse.Namespace) -> list[int]:
    """Refuse what cannot work before anything is loaded; the values of --k, and 1."""
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
        models.check_model_dir(model_dir, args.base)
    try:
        ks = sorted({1, *(cli.positive_int(part) for part in args.k.split(","))})
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise cli.UserError(f"--k {args.k} is not a list of numbers above 0, e.g. 1,5") from error
    if ks[-1] > args.num_samples:
        raise cli.UserError(f"--k {ks[-1]} needs at least as many samples; pass --num_samples {ks[-1]}")
    code_writer.check_flags(args)
    return ks


def choose_problems(args: argparse.Namespace) -> list[Problem]:
    """The problems that are judged on: all of them in --check_tests, else those of --split."""
    problems = code_problems.read(args.data, args.skip_bad_rows)
    if args.split != "all" and not args.check_tests:
        problems = [problem for problem in problems if splits.part_of(problem.group) == args.split]
        if not problems:
            raise cli.UserError(f"{args.data} has no problem of the {args.split} part; for a new file pass --split all")
    if args.max_problems and args.max_problems < len(problems):
        problems = random.Random(args.seed).sample(problems, args.max_problems)
    return problems


def figures(
    problems: Sequence[Problem], judged: Sequence[Sequence[code_metrics.Judged]], ks: Sequence[int], seed: int
) -> dict:
    """All figures of one mode of a model, and its commonest failures."""
    measured = code_metrics.evaluate(judged, ks, [problem.group for problem in problems], seed)
    return measured | {"failures": code_metrics.commonest_failures(problems, judged)}


def judge(
    args: argparse.Namespace,
    model_dir: str,
    mode: str,
    problems: Sequence[Problem],
    store: resumable.AnswerStore,
) -> list[list[code_metrics.Judged]]:
    """The samples of one model in one mode, judged, [problem][sample]."""
    answers = write_answers(args, model_dir, mode, problems, store)
    codes = [(problem, answer["code"]) for problem, row in zip(problems, answers, strict=True) for answer in row]
    run_tests(args, codes, store)
    linted = iter(code_metrics.lints([code for _, code in codes]))

    def judged(problem: Problem, answer: dict) -> code_metrics.Judged:
        code, verdict = answer["code"], store[verdict_key(problem, answer["code"])]
        fault = codegen.compile_error(code)
        error = "unfinished" if fault and not answer["finished"] else verdict["error"]
        return code_metrics.Judged(
            code, answer["plan"], error, fault or verdict["detail"], fault is None, next(linted), verdict["share"]
        )

    return [[judged(problem, answer) for answer in row] for problem, row in zip(problems, answers, strict=True)]


def write_answers(
    args: argparse.Namespace,
    model_dir: str,
    mode: str,
    problems: Sequence[Problem],
    store: resumable.AnswerStore,
) -> list[list[dict]]:
    """The answers of a model, {"code", "plan", "finished", "tokens"}; only those that are not in the store are made."""
    decoding = code_writer.decoding(args)
    model = [adapters.adapter_hash(model_dir), args.base, args.load_in_4bit, args.dtype, args.prompt_style]
    keys = [resumable.content_key("answer", model, mode, decoding, problem.prompt) for problem in problems]
    missing = [(key, problem.prompt) for key, problem in zip(keys, problems, strict=True) if key not in store]
    if missing:
        writer = code_writer.CodeWriter.from_flags(args, model_dir)
        with progress_bar(len(missing), f"{model_dir}, {mode}") as progress:
            for start in range(0, len(missing), WINDOW):
                window = missing[start : start + WINDOW]
                tasks = [prompt for _, prompt in window]
                plans = writer.plan(tasks, **decoding) if mode == "plan_then_code" else None
                found = writer.write(tasks, plans, **decoding)
                rows = [[dataclasses.asdict(answer) for answer in row] for row in found]
                store.add(zip([key for key, _ in window], rows, strict=True))
                progress.update(len(window))
    return [store[key] for key in keys]


def verdict_key(problem: Problem, code: str) -> str:
    """Where the store has the verdict on `code`: {"error", "detail", "share" of the tests that pass}."""
    return resumable.content_key("verdict", code, dataclasses.asdict(problem.graded_by()))


def run_tests(args: argparse.Namespace, codes: Sequence[tuple[Problem, str]], store: resumable.AnswerStore) -> None:
    """Put the verdict on every program into the store; the same program is run once only."""
    missing = {verdict_key(problem, code): (code, problem.graded_by()) for problem, code in codes}
    waiting = [key for key in missing if key not in store]
    with progress_bar(len(waiting), "running tests") as progress:
        for start in range(0, len(waiting), 4 * WINDOW):
            window = waiting[start : start + 4 * WINDOW]
            pairs = [missing[key] for key in window]
            verdicts = grade(args, pairs, progress)
            told = zip(window, verdicts, passing_shares(args, pairs, verdicts), strict=True)
            store.add((key, {"error": one.error, "detail": one.detail, "share": share}) for key, one, share in told)


def passing_shares(
    args: argparse.Namespace, pairs: Sequence[tuple[str, grading.Tests]], verdicts: Sequence[grading.Verdict]
) -> list[float]:
    """The share of its tests that each solution passes; one that never got to run passes none."""
    shares = [float(verdict.passed) for verdict in verdicts]
    split = [
        (place, (code, dataclasses.replace(tests, asserts=(test,))))
        for place, ((code, tests), verdict) in enumerate(zip(pairs, verdicts, strict=True))
        if len(tests.asserts) > 1 and (verdict.error == "assertion" or verdict.error.startswith("exception"))
        for test in tests.asserts
    ]
    for (place, _), verdict in zip(split, grade(args, [pair for _, pair in split]), strict=True):
        shares[place] += verdict.passed / len(pairs[place][1].asserts)
    return shares


def progress_bar(total: int, what: str):
    from tqdm import tqdm

    return tqdm(total=total, desc=what, unit=" programs")


def grade(args: argparse.Namespace, pairs: Sequence[tuple[str, grading.Tests]], progress=None) -> list[grading.Verdict]:
    """Verdicts of the sandbox."""
    tell = None if progress is None else lambda verdict: progress.update()
    return grading.grade_many(pairs, progress=tell, allow_unsafe=args.allow_no_sandbox)


# The tests themselves.


def check_tests(args: argparse.Namespace, problems: Sequence[Problem]) -> None:
    """Print which reference solutions fail their tests, and which do-nothing solutions pass; last a JSON line."""
    kinds: dict[str, Callable[[Problem], list[str]]] = {
        "reference": lambda problem: [problem.solution],
        "pass": lambda problem: [code_mutation.with_body(problem.solution, problem.entry_point, "pass")],
        "constant": lambda problem: [
            code_mutation.with_body(problem.solution, problem.entry_point, f"return {constant}")
            for constant in code_mutation.CONSTANTS
        ],
    }
    result = {"evaluator": "codegen_tests", "version": 1, "data": args.data, "n": len(problems)}
    result["sandbox"] = sandbox.level(args.allow_no_sandbox)
    started = time.perf_counter()
    for kind, solutions in kinds.items():
        pairs = [(problem, code) for problem in problems for code in solutions(problem)]
        with progress_bar(len(pairs), kind) as progress:
            verdicts = grade(args, [(code, problem.graded_by()) for problem, code in pairs], progress)
        passed = {problem.task_id for (problem, _), verdict in zip(pairs, verdicts, strict=True) if verdict.passed}
        odd = [
            {"task_id": problem.task_id, "code": code, "error": verdict.error, "detail": verdict.detail}
            for (problem, code), verdict in zip(pairs, verdicts, strict=True)
            if verdict.passed != (kind == "reference")
        ]
        result[kind] = {"passed": len(passed), "of": len(problems), "unexpected": odd}
        print(f"{kind}: {len(passed)} of {len(problems)} problems passed")
        for each in odd:
            what = each["error"] or each["code"].splitlines()[-1].strip()
            print(f"  problem {each['task_id']}: {what} {each['detail']}")
    result["seconds"] = round(time.perf_counter() - started, 1)
    print(json.dumps(result, ensure_ascii=False))


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
