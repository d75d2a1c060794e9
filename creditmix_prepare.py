# PYTHON_ARGCOMPLETE_OK
"""Prepare labelled data: clean, split by customer, balance, write the SFT, KD and DPO rows and the held-out rows.

    python creditmix_prepare.py --src data/creditmix_dataset.json --outdir data
    python creditmix_prepare.py --src credit_score.csv.gz --features all --outdir data
    python creditmix_prepare.py --synthesize 6000 --outdir data
    python creditmix_prepare.py --task recipes/ticket_severity.yaml --src tickets.jsonl --outdir data
    python creditmix_prepare.py --src tickets.csv --guess_task tickets.yaml

Reads question/answer rows and the raw credit-score table (a JSON list, JSONL, CSV or Parquet, text also gzipped), or
makes synthetic rows. Writes into --outdir: creditmix_sft.jsonl, creditmix_kd.jsonl and creditmix_dpo.jsonl (training
customers, every class as often as the rarest), creditmix_dev.jsonl and creditmix_val.jsonl (other customers, classes as
they come) and creditmix_manifest.json (counts, cleaning rules, checksums). The same input and seed give the same bytes.
With --task, the rows are those of its text, label and group fields, and its name stands in the file names; --guess_task
writes such a file from the columns of your rows, for you to look at, and does nothing else.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from common import cli
from common.cli import UserError
from common.data import rows as records
from common.data import splits, tables, task_record
from common.files import json_text, read_json, sha256_file, sha256_text, write_text, write_together
from common.tasks.ranking import creditmix, guess, prepare
from common.tasks.ranking.loading import load_task
from common.tasks.ranking.task import LabelTask

RAW_FILE = "creditmix_dataset.json"
OUTPUTS = ("sft", "kd", "dpo", "dev", "val")


def build_parser() -> argparse.ArgumentParser:
    """The flags of this script."""
    parser = cli.parser(__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--src", help="labelled rows: a JSON list, JSONL, CSV (.gz is fine) or Parquet")
    source.add_argument(
        "--synthesize", type=cli.positive_int, metavar="N", help="make N synthetic rows instead (some 3 per customer)"
    )
    parser.add_argument("--task", metavar="FILE.yaml", help="another label set; default: CreditMix")
    parser.add_argument(
        "--guess_task", metavar="FILE.yaml", help="write --task's file from the columns of --src, and end"
    )
    parser.add_argument("--outdir", type=cli.folder, default="data", help="folder to write into (default: data)")
    parser.add_argument("--format", choices=tables.FORMATS, default="jsonl", help="of the rows that are written")
    parser.add_argument("--features", choices=list(creditmix.FEATURES), default="six", help="columns of a CSV to use")
    parser.add_argument(
        "--teacher_file",
        help="CSV or JSONL with question (or input) and teacher_label (or teacher_output): "
        "the KD rows are then the training rows that this teacher answered",
    )
    parser.add_argument("--seed", type=cli.seed, default=42, help="of the balancing draw, the order and --synthesize")
    parser.add_argument("--skip_bad_rows", action="store_true", help="name and count bad rows and go on without them")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Write the data files and print what is in them."""
    args = cli.parse_args(build_parser(), argv)
    if args.guess_task:
        _guess_task(args)
        return
    task, outdir = load_task(args.task), Path(args.outdir)
    files = [f"{task.name}_{what}.{args.format}" for what in OUTPUTS]
    records.check_outdir(outdir, args.src, files)
    contents: dict[str, bytes] = {}
    lengths: dict[str, int] = {}
    if args.synthesize:
        if args.features != "six" or args.task:
            raise UserError("--synthesize makes CreditMix's six features only; leave --features and --task out")
        _keep_real_data(outdir / RAW_FILE)
        source = name = f"--synthesize {args.synthesize} --seed {args.seed}"
        raw = creditmix.synthesize(args.synthesize, args.seed)
        rows, counts = creditmix.clean_rows(raw, source)
        contents[RAW_FILE], lengths[RAW_FILE] = json_text(raw).encode(), len(raw)
        digest = sha256_text(contents[RAW_FILE])
    else:
        source, name = args.src, Path(args.src).name
        rows, counts = task.read(source, args.features, args.skip_bad_rows)
        digest = sha256_file(source)

    parts = prepare.split_by_group(task, rows, source)
    train = splits.balanced(
        parts["train"], lambda row: row[task.label_field], task.labels, None, args.seed, f"the train part of {source}"
    )
    if args.teacher_file:
        kd, teacher = prepare.teacher_rows(task, parts, args.teacher_file, args.skip_bad_rows)
    else:
        kd, teacher = prepare.gold_rows(task, train)
    written = (prepare.sft_rows(task, train), kd, prepare.dpo_rows(task, train), parts["dev"], parts["validation"])
    for file, members in zip(files, written, strict=True):
        contents[file], lengths[file] = tables.packed(members, args.format), len(members)
    manifest = {
        "task": task.name,
        task_record.MANIFEST_KEY: task.record(),
        "source": {"name": name, "sha256": digest},
        "synthetic": counts["rows synthetic"] > 0,
        "seed": args.seed,
        "features": args.features,
        "instruction": task.instruction,
        "group_key": task.group_rule,
        "shares": {
            "train": round(1 - splits.DEV_SHARE - splits.VALIDATION_SHARE, 4),
            "dev": splits.DEV_SHARE,
            "validation": splits.VALIDATION_SHARE,
        },
        "parts": prepare.describe_parts(task, parts, train),
        "teacher": teacher,
        "cleaning": counts,
        "files": {file: {"rows": lengths[file], "sha256": sha256_text(what)} for file, what in contents.items()},
    }
    write_together(outdir, {**contents, f"{task.name}_manifest.json": json_text(manifest)})
    _print_summary(task, manifest, outdir)


def _guess_task(args: argparse.Namespace) -> None:
    """Write the description of a label set, print it, and say what comes next."""
    if args.synthesize or args.task:
        raise UserError("--guess_task reads the columns of --src; leave --synthesize and --task out")
    if Path(args.guess_task).exists():
        raise UserError(f"--guess_task {args.guess_task} is there already; choose another name, or move it away")
    text = guess.to_yaml(guess.guess(args.src), args.src)
    write_text(args.guess_task, text)
    print(text, end="")
    cli.log(f"look at {args.guess_task}, then: creditmix_prepare.py --task {args.guess_task} --src {args.src}")


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
    widths = [max(10, len(label) + 2) for label in task.labels]
    print(f"{'part':<12}{task.group_name + 's':>10}" + "".join(map(str.rjust, task.labels, widths)))
    for part, facts in manifest["parts"].items():
        for name, key in ((part, "rows"), *([("  balanced", "rows_written")] if part == "train" else [])):
            customers = f"{facts['groups']:,}" if key == "rows" else ""
            counted = zip(facts[key].values(), widths, strict=True)
            print(f"{name:<12}{customers:>10}" + "".join(f"{count:>{width},}" for count, width in counted))
    teacher = manifest["teacher"]
    if "answers" in teacher:
        print(
            f"teacher {teacher['name']}: {teacher['answers']:,} answers, {teacher['rows_taught']:,} of training rows "
            f"({teacher['rows_agreeing_with_gold']:,} agree with gold), {teacher['rows_left_out_dev']:,} of dev and "
            f"{teacher['rows_left_out_validation']:,} of validation rows left out, "
            f"{teacher['answers_without_row']:,} of no row of the source"
        )
    for file, facts in manifest["files"].items():
        print(f"{outdir / file}: {facts['rows']:,} rows")
    print(outdir / f"{task.name}_manifest.json")


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
