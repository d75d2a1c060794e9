# PYTHON_ARGCOMPLETE_OK
"""Judge a student against its teacher, and against the base it was trained from: quality, size, speed, memory.

    python eval_distill.py --teacher runs/teacher --student runs/student --base models/tiny_student \\
        --data squad.json --report_dir runs/bench
    python eval_distill.py --teacher runs/teacher --student runs/student --task creditmix \\
        --data data/creditmix_dataset.json --sample 600
    python eval_distill.py --teacher gpt2 --student runs/wikitext --base distilgpt2 --data valid.txt --max_len 512

--data is SQuAD's JSON (exact match and F1), rows {"input", "output"} (.jsonl; perplexity of the output and exact
match), running text (.txt; perplexity), or with --task the rows of a label task (accuracy and macro-F1 of the
calibrated classifier). All models see the same held-out rows, chosen by a hash of their group (article, customer); a
text file is taken whole. Prints tables and, last, one JSON line; --report_dir adds results.txt, metrics.json, plots
and report.html, and keeps answers in answers.jsonl, so that a run that was interrupted goes on. Models are loaded one
after another, each in a process of its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from common import cli, run_record
from common.comparison import measure
from common.comparison.measure import Measurement
from common.comparison.rows import LABELS, ROWS, SQUAD, TEXT, RowSelection
from common.evaluation import run_figures
from common.export import model_card
from common.files import sha256_file
from common.models import adapters
from common.models import loading as models
from common.models.flags import add_model_flags, parse_args, source_of
from common.models.source import ModelSource
from common.tasks.ranking.loading import task_for

NEW_TOKENS = {SQUAD: 32, ROWS: 256, LABELS: 1, TEXT: 1}


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__, prog="eval_distill.py", conflict_handler="resolve")
    add_model_flags(parser)  # its --base is replaced below
    parser.add_argument("--teacher", required=True, help="run folder, model folder or Hub id")
    parser.add_argument("--student", required=True, help="the same, of what learnt from the teacher")
    parser.add_argument("--base", help="the student before training; also the base of its adapter, where that moved")
    parser.add_argument("--data", required=True, help="SQuAD's JSON, rows (.jsonl), text (.txt), or rows of --task")
    parser.add_argument("--task", metavar="creditmix|FILE.yaml", help="judge as a classifier of this label task")
    parser.add_argument("--split", choices=("validation", "dev", "all"), default="validation")
    parser.add_argument("--sample", type=cli.positive_int, metavar="N", help="only N of the rows, by a stable hash")
    parser.add_argument("--max_len", type=cli.positive_int, default=1024, help="tokens of a prompt and its answer")
    parser.add_argument("--max_new_tokens", type=cli.positive_int, help="of an answer; default: 32 (SQuAD), 256 (rows)")
    parser.add_argument("--speed_rows", type=cli.positive_int, default=16, help="rows that are timed, one at a time")
    parser.add_argument("--load_teacher_in_4bit", choices=("auto", "on", "off"), help="default: as --load_in_4bit")
    parser.add_argument(
        "--calibration", choices=("none", "prior", "batch", "fitted"), help="with --task: of all models"
    )
    parser.add_argument("--seed", type=cli.seed, default=0, help="of the bootstrap, the examples and a balanced draw")
    parser.add_argument("--skip_bad_rows", action="store_true", help="go on without bad rows, and count them")
    parser.add_argument(
        "--report_dir", type=cli.folder, help="write results.txt, metrics.json, plots, report.html, answers.jsonl here"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(build_parser(), argv)
    model_dirs = check_flags(args)
    task = task_for(args.task, *model_dirs.values()) if args.task else None
    selection = RowSelection(args.data, task, args.split, args.sample, args.seed, args.skip_bad_rows)
    kind = selection.kind
    rows, available = selection.read()

    from common.comparison import metrics, report

    outcomes = {
        role: measure.measure_in_own_process(
            Measurement(
                source_of_role(args, role, model_dir),
                kind,
                rows,
                args.speed_rows,
                args.max_len,
                args.max_new_tokens or NEW_TOKENS[kind],
                args.max_batch_tokens,
                task,
                args.calibration,
                args.auto_fit,
                str(Path(args.report_dir, "answers.jsonl")) if args.report_dir else None,
            )
        )
        for role, model_dir in model_dirs.items()
    }
    sha256 = sha256_file(args.data)
    result = {
        "evaluator": "distill",
        "version": 1,
        "data": args.data,
        "data_sha256": sha256,
        "kind": kind,
        "task": task and task.name,
        "split": "all" if kind == TEXT else args.split,
        "n": len(rows),
        "sampled_from": available if args.sample else None,
        "group_name": task.group_name if task else "Wikipedia article" if kind == SQUAD else "group",
        **metrics.evaluate(kind, rows, outcomes, task, args.seed),
        **run_record.provenance("eval_distill.py", argv),
    }
    groups = [row["group"] for row in rows]
    for model in result["models"]:
        model["contamination"] = metrics.contamination(model["model_dir"], groups, kind, sha256)
    result["contamination"] = run_record.worst_contamination([model["contamination"] for model in result["models"]])
    result["examples"] = metrics.examples(kind, rows, outcomes, args.seed)
    print(report.format_tables(result))
    run_figures.keep(result)
    if args.report_dir:
        cli.log(f"report: {report.write_report(args.report_dir, result)}")
    model_card.refresh(model["model_dir"] for model in result["models"])
    print(report.json_line(result))


def check_flags(args: argparse.Namespace) -> dict[str, str]:
    """The models by role, teacher first. Refuses what cannot work before anything is loaded."""
    model_dirs = {"teacher": args.teacher, "base": args.base, "student": args.student}
    model_dirs = {role: model_dir for role, model_dir in model_dirs.items() if model_dir}
    if len(set(model_dirs.values())) < len(model_dirs):
        raise cli.UserError("--teacher, --base and --student must be different models; name each once")
    for role, model_dir in model_dirs.items():
        models.check_model_dir(model_dir, student_base(args) if role == "student" else None)
    if args.calibration and not args.task:
        raise cli.UserError("--calibration goes with --task; leave it out")
    if args.task and args.max_new_tokens:
        raise cli.UserError("--max_new_tokens is for written answers, and --task ranks labels; leave it out")
    return model_dirs


def student_base(args: argparse.Namespace) -> str | None:
    """What the student's adapter is put on, if not where it was trained: --base, unless that is an adapter itself."""
    return None if args.base is None or adapters.is_adapter(args.base) else args.base


def source_of_role(args: argparse.Namespace, role: str, model_dir: str) -> ModelSource:
    """The model that plays a role, as the flags say."""
    source = replace(source_of(args, model_dir), base=student_base(args) if role == "student" else None)
    four_bit = args.load_teacher_in_4bit if role == "teacher" else None
    return replace(source, load_in_4bit=four_bit) if four_bit else source


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
