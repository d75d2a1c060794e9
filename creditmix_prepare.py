"""Prepare labelled data: clean, split by customer, balance, write the SFT, KD and DPO rows and the held-out rows.

    python creditmix_prepare.py --src data/creditmix_dataset.json --outdir data
    python creditmix_prepare.py --src credit_score.csv.gz --features all --outdir data
    python creditmix_prepare.py --synthesize 6000 --outdir data
    python creditmix_prepare.py --task recipes/ticket_severity.yaml --src tickets.jsonl --outdir data

Reads question/answer JSON or JSONL and the raw credit-score CSV (also gzipped), or makes synthetic rows. Writes into
--outdir: creditmix_sft.jsonl, creditmix_kd.jsonl and creditmix_dpo.jsonl (training customers, every class as often as
the rarest), creditmix_dev.jsonl and creditmix_val.jsonl (other customers, classes as they come) and
creditmix_manifest.json (counts, cleaning rules, checksums). The same input and seed give the same bytes. With --task,
the rows are those of its text, label and group fields, and its name stands in the file names.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

from common import cli
from common.cli import UserError
from common.data import rows as records
from common.data import splits
from common.files import json_text, jsonl_text, read_json, sha256_file, sha256_text, write_together
from common.tasks.ranking import creditmix
from common.tasks.ranking import rows as labelled
from common.tasks.ranking import task as tasks
from common.tasks.ranking.task import CREDITMIX, LabelTask

RAW_FILE = "creditmix_dataset.json"
OUTPUTS = ("sft", "kd", "dpo", "dev", "val")


def build_parser() -> argparse.ArgumentParser:
    """The flags of this script."""
    parser = cli.parser(__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--src", help="question/answer JSON or JSONL, or the raw credit-score CSV; .gz is fine")
    source.add_argument(
        "--synthesize", type=cli.positive_int, metavar="N", help="make N synthetic rows instead (some 3 per customer)"
    )
    parser.add_argument("--task", metavar="FILE.yaml", help="another label set; default: CreditMix")
    parser.add_argument("--outdir", default="data", help="folder to write into (default: data)")
    parser.add_argument("--features", choices=list(creditmix.FEATURES), default="six", help="columns of a CSV to use")
    parser.add_argument(
        "--teacher_file",
        help="CSV or JSONL with question (or input) and teacher_label (or teacher_output): "
        "the KD rows are then the training rows that this teacher answered",
    )
    parser.add_argument("--seed", type=int, default=42, help="of the balancing draw, the order and --synthesize")
    parser.add_argument("--skip_bad_rows", action="store_true", help="name and count bad rows and go on without them")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Write the data files and print what is in them."""
    args = cli.parse_args(build_parser(), argv)
    task, outdir = tasks.load(args.task), Path(args.outdir)
    files = [f"{task.name}_{what}.jsonl" for what in OUTPUTS]
    records.check_outdir(outdir, args.src, files)
    texts: dict[str, str] = {}
    if args.synthesize:
        if args.features != "six" or args.task:
            raise UserError("--synthesize makes CreditMix's six features only; leave --features and --task out")
        _keep_real_data(outdir / RAW_FILE)
        source = name = f"--synthesize {args.synthesize} --seed {args.seed}"
        raw = creditmix.synthesize(args.synthesize, args.seed)
        rows, counts = creditmix.clean_rows(raw, source)
        texts[RAW_FILE] = json_text(raw)
        digest = sha256_text(texts[RAW_FILE])
    else:
        source, name = args.src, Path(args.src).name
        rows, counts = labelled.read(source, task, args.features, args.skip_bad_rows)
        digest = sha256_file(source)

    def label(row: dict) -> str:
        return row[task.label_field]

    parts = _parts(task, rows, source)
    train = splits.balanced(parts["train"], label, task.labels, None, args.seed, f"the train part of {source}")
    kd, teacher = _kd_rows(task, parts, train, args)
    sft = [_with_prompt(task, row, "input", output=label(row)) for row in train]
    for file, members in zip(files, (sft, kd, _dpo_rows(task, train), parts["dev"], parts["validation"]), strict=True):
        texts[file] = jsonl_text(members)
    manifest = {
        "task": task.name,
        "source": {"name": name, "sha256": digest},
        "synthetic": counts["rows synthetic"] > 0,
        "seed": args.seed,
        "features": args.features,
        "instruction": task.instruction,
        "group_key": creditmix.GROUP_KEY if task == CREDITMIX else task.group_key or task.text_field,
        "shares": {
            "train": round(1 - splits.DEV_SHARE - splits.VALIDATION_SHARE, 4),
            "dev": splits.DEV_SHARE,
            "validation": splits.VALIDATION_SHARE,
        },
        "parts": {
            part: {
                "groups": len(splits.groups_of(members)),
                "rows": splits.class_counts(members, label, task.labels),
                "rows_written": splits.class_counts(train if part == "train" else members, label, task.labels),
            }
            for part, members in parts.items()
        },
        "teacher": teacher,
        "cleaning": counts,
        "files": {file: {"rows": _row_count(text), "sha256": sha256_text(text)} for file, text in texts.items()},
    }
    write_together(outdir, texts | {f"{task.name}_manifest.json": json_text(manifest)})
    _print_summary(task, manifest, outdir)


def _row_count(text: str) -> int:
    return len(json.loads(text)) if text.startswith("[") else text.count("\n")


def _keep_real_data(path: Path) -> None:
    """Refuse to write synthetic rows over a file that is not synthetic."""
    if not path.exists():
        return
    try:
        synthetic = all(row["synthetic"] is True for row in read_json(path))
    except (UserError, TypeError, KeyError):
        synthetic = False
    if not synthetic:
        raise UserError(f"{path} is there and not synthetic; choose another --outdir, or move the file away")


def _parts(task: LabelTask, rows: list[dict], source: str) -> dict[str, list[dict]]:
    """Rows of each part; every part must have every class."""
    _need_every_class(task, rows, source)
    parts: dict[str, list[dict]] = {part: [] for part in splits.PARTS}
    for row in rows:
        parts[splits.part_of(row["group"])].append(row)
    for part, members in parts.items():
        _need_every_class(task, members, f"the {part} part of {source}")
    return parts


def _need_every_class(task: LabelTask, rows: list[dict], what: str) -> None:
    counts = splits.class_counts(rows, lambda row: row[task.label_field], task.labels)
    if not all(counts.values()):
        empty = ", ".join(label for label, count in counts.items() if not count)
        told = ", ".join(f"{label} {count:,}" for label, count in counts.items())
        raise UserError(f"{what} has no row of class {empty} ({told}); give more {task.group_name}s of that class")


def _with_prompt(task: LabelTask, row: dict, key: str, **answers: str) -> dict:
    return {key: task.prompt(row[task.text_field]), **answers, "group": row["group"]}


def _kd_rows(
    task: LabelTask, parts: dict[str, list[dict]], train: list[dict], args: argparse.Namespace
) -> tuple[list[dict], dict]:
    """KD rows and what the manifest says of their teacher: the gold labels, or a teacher's own answers."""
    text, label = task.text_field, task.label_field
    if not args.teacher_file:
        rows = [_with_prompt(task, row, "input", teacher_output=row[label]) for row in train]
        return rows, {"name": "gold labels"}
    answers = labelled.read_teacher(args.teacher_file, task, args.skip_bad_rows)
    matched = {part: [row for row in members if row[text] in answers] for part, members in parts.items()}
    questions = {row[text] for members in matched.values() for row in members}
    # Every training row that the teacher answered, not only those of the balanced draw: answers are scarce.
    taught = matched["train"]
    if not taught:
        raise UserError(
            f"--teacher_file {args.teacher_file} answers no training row ({len(questions):,} of its {len(answers):,} "
            "questions are in the source); give the answers to this source's questions, with the same --features"
        )
    teacher = {
        "name": Path(args.teacher_file).name,
        "sha256": sha256_file(args.teacher_file),
        "answers": len(answers),
        "answers_without_row": len(answers) - len(questions),
        "rows_taught": len(taught),
        "rows_agreeing_with_gold": sum(answers[row[text]] == row[label] for row in taught),
        "rows_left_out_dev": len(matched["dev"]),
        "rows_left_out_validation": len(matched["validation"]),
    }
    return [_with_prompt(task, row, "input", teacher_output=answers[row[text]]) for row in taught], teacher


def _dpo_rows(task: LabelTask, train: list[dict]) -> list[dict]:
    """One pair a row; for each chosen label the other labels are rejected in turn, so equally often."""
    others = {label: cycle([other for other in task.labels if other != label]) for label in task.labels}
    labels = [row[task.label_field] for row in train]
    return [
        _with_prompt(task, row, "prompt", chosen=label, rejected=next(others[label]))
        for row, label in zip(train, labels, strict=True)
    ]


def _print_summary(task: LabelTask, manifest: dict, outdir: Path) -> None:
    counts = manifest["cleaning"]
    synthetic = " (SYNTHETIC)" if manifest["synthetic"] else ""
    print(
        f"{manifest['source']['name']}{synthetic}: {counts['rows read']:,} rows read, {counts['rows kept']:,} kept, "
        f"{counts['rows unlabelled']:,} unlabelled, {counts['rows bad']:,} bad"
    )
    for rule, count in counts.items():
        if not rule.startswith("rows "):
            print(f"  {count:>8,}  {rule}")
    print(f"{'part':<12}{task.group_name + 's':>10}" + "".join(f"{label:>10}" for label in task.labels))
    for part, told in manifest["parts"].items():
        for name, key in ((part, "rows"), *([("  balanced", "rows_written")] if part == "train" else [])):
            customers = f"{told['groups']:,}" if key == "rows" else ""
            print(f"{name:<12}{customers:>10}" + "".join(f"{count:>10,}" for count in told[key].values()))
    teacher = manifest["teacher"]
    if "answers" in teacher:
        print(
            f"teacher {teacher['name']}: {teacher['answers']:,} answers, {teacher['rows_taught']:,} of training rows "
            f"({teacher['rows_agreeing_with_gold']:,} agree with gold), {teacher['rows_left_out_dev']:,} of dev and "
            f"{teacher['rows_left_out_validation']:,} of validation rows left out, "
            f"{teacher['answers_without_row']:,} of no row of the source"
        )
    for file, told in manifest["files"].items():
        print(f"{outdir / file}: {told['rows']:,} rows")
    print(outdir / f"{task.name}_manifest.json")


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
