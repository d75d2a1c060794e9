# PYTHON_ARGCOMPLETE_OK
"""A teacher writes training data: rows in, KD rows {"input", "teacher_output"} out, or preference pairs.

    python teacher_generate.py --teacher Qwen/Qwen2.5-7B-Instruct --data data/creditmix_sft.jsonl \\
        --out data/creditmix_teacher.jsonl --task creditmix
    python teacher_generate.py --endpoint http://localhost:8001/v1 --model qwen2.5-72b --data receipts.jsonl \\
        --out data/idp_teacher.jsonl --task idp --schema data/idp_schema.json
    python teacher_generate.py --endpoint https://api.openai.com/v1 --model gpt-4o --data problems.jsonl \\
        --out data/codegen_pairs.jsonl --task codegen --preferences --num_samples 6 --confirm_run_unsafe_code

The teacher is a local model (in 4 bits on a GPU), or anything that speaks OpenAI's chat API, with --probabilities also
/v1/decisions or /v1/systemone; its key comes from the environment. Rows are {"input"[, "output"]} as the trainers take
them, or what the task's *_prepare.py reads and writes; "output" (or the raw row's own answer) counts as gold. An answer
that cannot be used (no label of the set, JSON that the schema refuses, code that does not compile or fails its tests)
is asked for again with the reason, --max_tries times in all. Writes OUT, OUT.rejects.jsonl (rows without a usable
answer, and why), OUT.raw.jsonl (every raw answer as it came; an interrupted run goes on from it and asks nothing twice)
and OUT.run.json (settings, tokens, cost, agreement with gold). Exit code 1: some rows got no answer, for a reason that
may pass, and the same command asks for those again; or no answer to any row could be used.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from common import cli, run_record
from common.models.flags import parse_args
from common.teachers import tasks
from common.teachers.flags import add_teacher_flags, check_flags, task_of, teacher_of
from common.teachers.settings import gives_decisions


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__, prog="teacher_generate.py")
    add_teacher_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int | None:
    args = parse_args(build_parser(), argv)
    check_flags(args)
    task = task_of(args)
    items = tasks.read_items(args.data, task, args.skip_bad_rows)
    for notice in tasks.notices(task, items):
        cli.log(notice)
    if args.probabilities and (args.teacher or gives_decisions(args.endpoint)):
        tasks.check_instruction(args.data, task, items)

    from common.teachers import dataset, report
    from common.teachers.interview import Interview

    interview = Interview(teacher_of(args, task), f"{args.out}.raw.jsonl")
    if args.preferences:
        by_teacher = args.rank_by == "teacher"
        written = dataset.write_pairs(
            task, items, interview, samples=args.num_samples, by_teacher=by_teacher, max_tries=args.max_tries
        )
    else:
        written = dataset.write_answers(
            task,
            items,
            interview,
            max_tries=args.max_tries,
            reasons=args.reasons,
            probabilities=args.probabilities,
        )
    record = {
        "task": args.task,
        "teacher": args.teacher or {"endpoint": args.endpoint, "model": args.model},
        "settings": vars(args),
        "data": run_record.describe_data(args.data, len(items)),
        **report.figures(len(items), interview.totals(), written, args.price_in, args.price_out),
        **run_record.provenance("teacher_generate.py", argv),
    }
    paths = dataset.save(args.out, written, record)
    print(report.summary(record), *paths, sep="\n")
    for warning in report.warnings(record):
        cli.log(f"warning: {warning}")
    if unanswered := record["rows"]["unanswered"]:
        cli.log(f"error: {unanswered} of {len(items)} rows got no answer; the same command asks for them again")
        return cli.FAILED
    if not written.rows:
        cli.log(f"error: no answer could be used, and {args.out} is empty; the reasons are in {args.out}.rejects.jsonl")
        return cli.FAILED
    return None


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
