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
and report.html. Models are loaded one after another, each in a process of its own.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

from common import cli, run_record
from common.comparison import measure as judging
from common.comparison import perplexity
from common.comparison.measure import LABELS, ROWS, SQUAD, TEXT
from common.data import rows as records
from common.data import splits, squad
from common.files import sha256_file, sha256_text
from common.models import adapters
from common.models import loading as models
from common.models.flags import add_model_flags, parse_args
from common.tasks.ranking.loading import load_task
from common.tasks.ranking.task import LabelTask

NEW_TOKENS = {SQUAD: 32, ROWS: 256, LABELS: 1, TEXT: 1}
EXAMPLES = 5  # of each kind in the report


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
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap, the examples and a balanced draw")
    parser.add_argument("--skip_bad_rows", action="store_true", help="go on without bad rows, and count them")
    parser.add_argument("--report_dir", help="write results.txt, metrics.json, plots and report.html here")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(build_parser(), argv)
    contestants = check_flags(args)
    task = load_task(args.task) if args.task else None
    kind = LABELS if task else kind_of(args.data)
    rows, of = choose_rows(args, kind, task)

    from common.comparison import metrics as distill_metrics
    from common.comparison import report as distill_report

    outcomes = {
        role: judging.judge(
            judging.Job(
                model_dir,
                student_base(args) if role == "student" else None,
                kind,
                rows,
                args.speed_rows,
                args.max_len,
                args.max_new_tokens or NEW_TOKENS[kind],
                args.max_batch_tokens,
                (role == "teacher" and args.load_teacher_in_4bit) or args.load_in_4bit,
                args.dtype,
                args.trust_remote_code,
                task,
                args.calibration,
            )
        )
        for role, model_dir in contestants.items()
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
        "sampled_from": of if args.sample else None,
        "group_name": task.group_name if task else "Wikipedia article" if kind == SQUAD else "group",
        **distill_metrics.evaluate(kind, rows, outcomes, task, args.seed),
        **run_record.provenance("eval_distill.py", argv),
    }
    groups = [row["group"] for row in rows]
    for model in result["models"]:
        model["contamination"] = contamination(model["model_dir"], groups, kind, sha256)
    result["contamination"] = run_record.worst_contamination([each["contamination"] for each in result["models"]])
    result["examples"] = examples(kind, rows, outcomes, args.seed)
    print(distill_report.format_tables(result))
    if args.report_dir:
        cli.log(f"report: {distill_report.write_report(args.report_dir, result)}")
    print(distill_report.json_line(result))


def check_flags(args: argparse.Namespace) -> dict[str, str]:
    """The models by role, teacher first. Refuses what cannot work before anything is loaded."""
    contestants = {"teacher": args.teacher, "base": args.base, "student": args.student}
    contestants = {role: model_dir for role, model_dir in contestants.items() if model_dir}
    if len(set(contestants.values())) < len(contestants):
        raise cli.UserError("--teacher, --base and --student must be different models; name each once")
    for role, model_dir in contestants.items():
        models.check_model_dir(model_dir, student_base(args) if role == "student" else None)
    if args.calibration and not args.task:
        raise cli.UserError("--calibration goes with --task; leave it out")
    if args.task and args.max_new_tokens:
        raise cli.UserError("--max_new_tokens is for written answers, and --task ranks labels; leave it out")
    return contestants


def student_base(args: argparse.Namespace) -> str | None:
    """What the student's adapter is put on, if not where it was trained: --base, unless that is an adapter itself."""
    return None if args.base is None or adapters.is_adapter(args.base) else args.base


def kind_of(data: str) -> str:
    """How a file without --task is read: by its name."""
    if squad.is_squad(data):
        return SQUAD
    return TEXT if ".txt" in Path(data).suffixes else ROWS


def choose_rows(args: argparse.Namespace, kind: str, task: LabelTask | None) -> tuple[list[dict], int]:
    """The rows that are judged on, each with its "group", and how many there were before --sample."""
    if kind == TEXT:
        rows = perplexity.passages(args.data)
    elif kind == SQUAD:
        rows = squad.rows(args.data, args.split, args.skip_bad_rows)
    elif kind == LABELS:
        rows = draw_labelled(args, task)
    else:
        found = records.read_rows(args.data, records.SFT_KEYS, args.skip_bad_rows)
        rows = [{**row, "group": row.get("group") or splits.group_hash(row["input"])} for row in found]
        rows = [row for row in rows if args.split in ("all", splits.part_of(row["group"]))]
        if not rows:
            raise cli.UserError(f"{args.data} has no row of the {args.split} part; for a new file pass --split all")
    if args.sample and args.sample > len(rows):
        raise cli.UserError(f"--sample {args.sample} is more than the {len(rows):,} rows of {args.data}; ask for fewer")
    if not args.sample:
        return rows, len(rows)
    order = sorted(range(len(rows)), key=lambda place: sha256_text(text_of(rows[place])))
    return [rows[place] for place in sorted(order[: args.sample])], len(rows)


def draw_labelled(args: argparse.Namespace, task: LabelTask) -> list[dict]:
    """Rows {"text", "label", "group"}, as many of each label: the draw of eval_creditmix.py with the same seed."""
    rows, _ = task.read(args.data, skip_bad_rows=args.skip_bad_rows)
    rows = [row for row in rows if args.split in ("all", splits.part_of(row["group"]))]
    what = args.data if args.split == "all" else f"the {args.split} part of {args.data}"
    drawn = splits.balanced(rows, lambda row: row[task.label_field], task.labels, None, args.seed, what)
    return [{"text": row[task.text_field], "label": row[task.label_field], "group": row["group"]} for row in drawn]


def text_of(row: dict) -> str:
    """What the model is given of a row."""
    return row["text"] if "text" in row else row["input"]


def contamination(model_dir: str, groups: Sequence[str], kind: str, sha256: str) -> dict[str, int] | None:
    """{"rows", "of"} as `run_record.contamination`; None where a run keeps no record of its groups.

    No run on running text keeps one, but a run on the very same file has seen all of it.
    """
    run = run_record.read(model_dir)
    if kind != TEXT and run_record.read_groups(model_dir) is None and run:
        return None
    if kind != TEXT or not run:
        return run_record.contamination(model_dir, groups)
    same = run.get("data", {}).get("sha256") == sha256
    return {"rows": len(groups), "of": len(groups)} if same else None


def examples(kind: str, rows: Sequence[dict], outcomes: dict[str, dict], seed: int) -> list[dict]:
    """Rows with all answers, for reading: a few drawn blindly, and a few of those where student and teacher differ."""
    if kind == TEXT:
        return []
    draw = random.Random(seed)
    blind = draw.sample(range(len(rows)), min(EXAMPLES, len(rows)))
    teacher, student = (outcomes[role]["answers"] for role in ("teacher", "student"))
    apart = [row for row in range(len(rows)) if teacher[row] != student[row] and row not in blind]
    chosen = [(row, "drawn blindly") for row in blind]
    chosen += [(row, "student and teacher differ") for row in draw.sample(apart, min(EXAMPLES, len(apart)))]
    return [
        {
            "why": why,
            "input": text_of(rows[row]),
            "gold": rows[row].get("answers") or [rows[row].get("output") or rows[row]["label"]],
            "answers": {role: outcome["answers"][row] for role, outcome in outcomes.items()},
        }
        for row, why in chosen
    ]


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
