# PYTHON_ARGCOMPLETE_OK
"""Write Python code for a task, or for a JSONL file of them: the code alone, checked to compile.

    python infer_codegen.py --model_dir runs/kd_code --prompt "Write a function that sorts a list."
    python infer_codegen.py --model_dir runs/kd_code --prompt "Write a function that sorts a list." --plan_then_code
    python infer_codegen.py --model_dir runs/kd_code --input tasks.jsonl --output answers.jsonl
    python infer_codegen.py --model_dir runs/kd_code --input tasks.jsonl --output answers.jsonl \\
        --cascade https://api.openai.com/v1 --cascade_model gpt-4o --cascade_per_hour 500

With --plan_then_code the model writes a plan first, shown on stderr, and then the code for task and plan. With --test
"assert ..." the code is run on these tests, in the sandbox and only with --confirm_run_unsafe_code, and asked for again
with the error until it passes, --max_tries times at most; nothing else is run. Rows of --input have the task under
"prompt" or "input", rows of --output model_name, prompt and answers: each with plan, code and error (null where the
code compiles), and "cut": true where the tokens ran out before the code was whole. An interrupted run goes on where it
stopped. With --cascade a teacher is asked for code that does not compile, is cut off or fails --test, which the
teacher's has to pass as well; "answered_by" says who answered. The exit code is 1 where code does not compile, is cut
off or fails --test in the end; it is kept all the same.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from common import cli
from common.data import rows as records
from common.files import sha256_file
from common.generation.decoding import Decoding
from common.models import adapters
from common.models import loading as models
from common.models.flags import parse_args, source_of
from common.tasks.codegen import flags as codegen_flags
from common.tasks.codegen.answer import compile_error
from common.tasks.codegen.writer import CodeAnswer, CodeWriter, check_lengths
from common.teachers.cascade.flags import add_cascade_flags, cascade_settings

if TYPE_CHECKING:
    from common.teachers.cascade.programs import AnsweredCode, CodeCascade
    from common.teachers.cascade.settings import CascadeSettings

NOT_DECIDING = (  # flags that do not decide the answers to --input; thinking does, with the rest of the decoding
    *("output", "max_batch_tokens", "thinking", "prompt_lookup_num_tokens"),
    *("test", "max_tries", "confirm_run_unsafe_code", "allow_no_sandbox"),
    *("cascade_per_hour", "cascade_timeout", "cascade_keep"),
)


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__, prog="infer_codegen.py")
    parser.add_argument("--model_dir", required=True, help="run folder, or a base model's folder or Hub id")
    parser.add_argument("--prompt", help="the task, or a function stub to complete")
    parser.add_argument("--input", help='JSONL rows with the task under "prompt" or "input"')
    parser.add_argument("--output", type=cli.output_file, help="JSONL answers to the rows of --input, in their order")
    parser.add_argument("--plan_then_code", action="store_true", help="first a plan, then code for task and plan")
    parser.add_argument("--show_plan", action="store_true", help="print the plan before the code, in comment lines")
    trial = parser.add_argument_group("trying the code of --prompt")
    trial.add_argument("--test", nargs="+", default=[], metavar="ASSERT", help='e.g. "assert add(1, 2) == 3"')
    trial.add_argument("--max_tries", type=cli.positive_int, default=3, help="answers until one passes (default: 3)")
    trial.add_argument("--confirm_run_unsafe_code", action="store_true", help="yes, run it, in the sandbox")
    trial.add_argument("--allow_no_sandbox", action="store_true", help="where no sandbox works, run it without one")
    parser.add_argument("--skip_bad_rows", action="store_true", help="name and count bad rows and go on without them")
    codegen_flags.add_flags(parser)
    add_cascade_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int | None:
    args = parse_args(build_parser(), argv)
    if (args.prompt is None) == (args.input is None) or (args.input is None) != (args.output is None):
        raise cli.UserError("give either --prompt, or --input and --output together")
    if args.prompt is not None and not args.prompt.strip():
        raise cli.UserError('--prompt is empty; give a task such as "Write a function that sorts a list."')
    records.check_output(args.output, args.input)
    if args.show_plan and (not args.plan_then_code or args.input):
        raise cli.UserError("--show_plan goes with --plan_then_code and --prompt; rows of --output have their plan")
    decoding = codegen_flags.decoding(args)
    check_trial(args)
    handing = check_cascade(args)
    models.check_model_dir(args.model_dir, args.base, onnx=False)
    codegen_flags.check_trained(args.model_dir)
    tasks = [args.prompt] if args.prompt else read_tasks(args.input, args.skip_bad_rows)

    check_lengths(source_of(args, args.model_dir), tasks, decoding.max_new_tokens)
    writer = codegen_flags.load_writer(args, args.model_dir)
    cascade = None
    if handing:
        from common.teachers.cascade.handing import cascade_of
        from common.teachers.cascade.programs import CodeCascade

        cascade = CodeCascade(cascade_of(handing, None), args.model_dir, allow_no_sandbox=args.allow_no_sandbox)
    if args.test:
        return write_tried(args, writer, decoding, cascade)
    if args.prompt:
        return write_one(args, writer, decoding, cascade)
    return write_file(args, writer, decoding, tasks, cascade)


def check_trial(args: argparse.Namespace) -> None:
    """Refuse tests that cannot be run, or that nobody agreed to run."""
    if not args.test:
        return
    if args.input or args.plan_then_code or args.num_samples > 1:
        raise cli.UserError("--test goes with --prompt alone, without --plan_then_code and --num_samples")
    for test in args.test:
        if error := compile_error(test):
            raise cli.UserError(f'--test {test!r} is not Python ({error}); give e.g. "assert add(1, 2) == 3"')
    if not args.confirm_run_unsafe_code:
        raise cli.UserError(
            "--test runs code that a model wrote, in a sandbox but on this machine; "
            "pass --confirm_run_unsafe_code if you agree"
        )


def check_cascade(args: argparse.Namespace) -> CascadeSettings | None:
    """The cascade that is asked for; refuse one to which code cannot be handed on."""
    settings = cascade_settings(args)
    if settings and settings.below is not None:
        raise cli.UserError("--cascade_below is of a probability, which code has none of; leave it out")
    if settings and args.num_samples > 1:
        raise cli.UserError("--cascade goes with one answer to a task; leave --num_samples out")
    return settings


def read_tasks(path: str, skip_bad_rows: bool) -> list[str]:
    """The tasks of a JSONL file."""

    def fault(row: dict) -> str | None:
        return None if task_of(row) else "no task under 'prompt' or 'input'"

    rows = records.check_rows(path, records.iter_jsonl(path), (), skip_bad_rows, fault_of=fault).rows
    return [task_of(row) for row in rows]


def task_of(row: dict) -> str:
    """The task of a row; "" where it has none."""
    return next((row[key] for key in ("prompt", "input") if records.row_fault(row, (key,)) is None), "")


def write_one(
    args: argparse.Namespace, writer: CodeWriter, decoding: Decoding, cascade: CodeCascade | None
) -> int | None:
    """Print the code for --prompt, line by line where a person looks on."""
    plans = writer.plan([args.prompt], decoding) if args.plan_then_code else None
    streamer = None
    if sys.stdout.isatty() and args.num_samples == 1 and not cascade:
        if plans:
            show_plan(plans[0][0], args.show_plan)
        streamer = writer.streamer(args.prompt, sys.stdout, thinking=decoding.thinking)
    (answers,) = writer.write([args.prompt], decoding, plans, streamer=streamer)
    if cascade:
        ((_, answered),) = cascade.in_turn([args.prompt], [(0, answers[0])])
        answers = [said(answered)]
    if streamer is None:
        for number, answer in enumerate(answers, start=1):
            if args.num_samples > 1:
                print(f"# sample {number} of {args.num_samples}")
            if answer.plan:
                show_plan(answer.plan, args.show_plan)
            print(answer.code)
    return report_errors(answers)


def said(answered: AnsweredCode) -> CodeAnswer:
    """The answer; who gave it goes to stderr."""
    who, why = answered.facts["answered_by"], answered.facts.get("cascade")
    cli.log(f"answered by {who}" + (f"; the teacher was asked: {why}" if why else ""))
    return answered.answer


def write_tried(
    args: argparse.Namespace, writer: CodeWriter, decoding: Decoding, cascade: CodeCascade | None
) -> int | None:
    """Print the first code for --prompt that passes --test, or the last that does not."""
    from common.sandbox.grading import Tests
    from common.tasks.codegen import repair

    tests = [Tests(tuple(args.test))]
    (trials,) = repair.write_until_passing(
        writer, [args.prompt], decoding, tests, args.max_tries, allow_unsafe=args.allow_no_sandbox
    )
    for number, trial in enumerate(trials, start=1):
        outcome = "passes" if trial.verdict.passed else f"fails ({repair.described(trial.verdict)})"
        cli.log(f"try {number} of {args.max_tries} {outcome}")
    answer, passed = trials[-1].answer, trials[-1].verdict.passed
    if cascade and not passed:
        answered = cascade.tried(args.prompt, args.test, answer)
        answer, passed = said(answered), "unsure" not in answered.facts
    print(answer.code)
    return None if passed else cli.FAILED


def show_plan(plan: str, on_stdout: bool) -> None:
    """The plan on stderr, or on stdout in comment lines."""
    if on_stdout:
        print("".join(f"# {line}\n" for line in plan.splitlines()), end="")
    else:
        cli.log(plan + "\n")


def report_errors(answers: Sequence[CodeAnswer]) -> int | None:
    """Say which code does not compile or is cut off; the exit code."""
    failed = False
    for number, answer in enumerate(answers, start=1):
        which = f"sample {number}" if len(answers) > 1 else "the code"
        if error := compile_error(answer.code):
            cli.log(f"error: {which} does not compile ({error})")
        if answer.cut:
            cli.log(f"error: {which} is cut off after {answer.tokens} tokens; raise --max_new_tokens")
        failed = failed or bool(error) or answer.cut
    return cli.FAILED if failed else None


def write_file(
    args: argparse.Namespace,
    writer: CodeWriter,
    decoding: Decoding,
    tasks: Sequence[str],
    cascade: CodeCascade | None,
) -> int | None:
    """Answer --input into --output."""
    from common.data.resumable import write_each

    def answer_row(task: str, answers: Sequence[CodeAnswer]) -> dict:
        rows = [
            {"plan": one.plan, "code": one.code, "error": compile_error(one.code)} | ({"cut": True} if one.cut else {})
            for one in answers
        ]
        return {"model_name": args.model_dir, "prompt": task, "answers": rows}

    def answer(tasks: list[str]) -> Iterator[tuple[int, dict]]:
        written = writer.write_each(tasks, decoding, args.plan_then_code)
        if not cascade:
            for number, of_task in written:
                yield number, answer_row(tasks[number], of_task)
            return
        for number, answered in cascade.in_turn(tasks, ((number, of_task[0]) for number, of_task in written)):
            yield number, answer_row(tasks[number], [answered.answer]) | answered.facts

    settings = {key: value for key, value in vars(args).items() if key not in NOT_DECIDING} | decoding.as_dict()
    decided_by = [settings, sha256_file(args.input), adapters.adapter_hash(args.model_dir)]
    rows = write_each(args.output, tasks, answer, decided_by=decided_by, what="tasks")
    answers = [one for row in rows for one in row["answers"]]
    broken, cut = sum(one["error"] is not None for one in answers), sum(one.get("cut", False) for one in answers)
    if broken:
        cli.log(f"error: {broken} of {len(answers)} answers do not compile; see {args.output}")
    if cut:
        cli.log(f"error: {cut} of {len(answers)} answers are cut off; raise --max_new_tokens")
    return cli.FAILED if broken or cut else None


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
