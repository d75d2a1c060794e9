"""Classify rows by calibrated label ranking: one line of features, or a JSONL file of them.

    python infer_creditmix.py --model_dir runs/creditmix_sft --features "Age: 23.0, Occupation: Scientist, \\
        Annual Income: 19114.12, Outstanding Debt: 809.98, Credit Utilization Ratio: 35.03, \\
        Payment Behaviour: Low_spent_Small_value_payments"
    python infer_creditmix.py --model_dir runs/creditmix_sft --input rows.jsonl --output answers.jsonl
    python infer_creditmix.py --model_dir runs/creditmix_sft --engine ray --input 'rows/*.parquet' --output answers
    python infer_creditmix.py --model_dir runs/ticket_sft --task recipes/ticket_severity.yaml \\
        --features "Mail. Users affected: 3, Hours open: 2, mails arrive an hour late"

Rows of --input have the features under "features" or "question", with --task under the task's text field. Answers keep
their order; an interrupted run goes on where it stopped. Each answer has model_name, prediction, scores, raw_scores,
prior, probabilities and top2_margin. With --engine ray, --input is also a folder, a pattern, Parquet or an address such
as s3://bucket/rows, --output is a folder of part files, and each answer has an id too.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from common import cli
from common.data import rows as records
from common.files import write_jsonl
from common.models import loading as models
from common.tasks.ranking import rows as labelled
from common.tasks.ranking import task as tasks
from common.tasks.ranking.flags import add_scoring_flags
from common.tasks.ranking.task import LabelTask

WINDOW = 4096  # rows in memory at a time
NEAR = 0.05  # nats: more than bfloat16 makes of a score in another batch


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__, prog="infer_creditmix.py")
    parser.add_argument("--model_dir", required=True, help="run folder, ONNX export, or a base (folder or Hub id)")
    parser.add_argument("--features", help="one line of features, or the text of another task")
    parser.add_argument("--input", help="JSONL rows to classify")
    parser.add_argument("--output", help="JSONL answers, one per row of --input")
    parser.add_argument("--skip_bad_rows", action="store_true", help="list bad rows in OUTPUT.rejects.jsonl and go on")
    parser.add_argument("--engine", choices=("local", "ray"), default="local", help="ray: many files, many machines")
    parser.add_argument(
        "--workers", type=cli.positive_int, help="models at work under --engine ray; default: one per GPU, else machine"
    )
    add_scoring_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = cli.parse_args(build_parser(), argv)
    if (args.features is None) == (args.input is None) or (args.input is None) != (args.output is None):
        raise cli.UserError("give either --features, or --input and --output together")
    if args.features is not None and not args.features.strip():
        raise cli.UserError('--features is empty; give a line such as "Age: 23.0, Occupation: Scientist, ..."')
    if args.engine == "ray" and args.input is None:
        raise cli.UserError("--engine ray is for --input and --output; leave it out with --features")
    if args.engine == "local" and args.workers:
        raise cli.UserError("--workers goes with --engine ray; add it, or leave --workers out")
    records.check_output(args.output, args.input)
    task = tasks.load(args.task)
    label_bias = cli.parse_label_bias(args.label_bias, task.labels)
    models.check_model_dir(args.model_dir, args.base)
    if args.engine == "ray":
        from common.tasks.ranking import ray_scoring

        ray_scoring.score(args, task, label_bias)
        return
    if args.input:
        check_input(args.input, task, args.skip_bad_rows)

    from common.tasks.ranking.classifier import Classifier

    classifier = Classifier.from_flags(args, args.model_dir, task)
    if args.features is not None:
        text = labelled.clean(task, args.features)
        calibration = classifier.calibration(args.calibration, label_bias=label_bias)
        print(json.dumps(classifier.answers([text], calibration)[0], indent=2, ensure_ascii=False))
    else:
        classify_file(args, classifier, label_bias)


def check_input(path: str, task: LabelTask, skip_bad_rows: bool) -> None:
    """Read the file once, before a model loads: a bad row is found now, not in the middle of a night's work."""
    good = False
    for number, row in records.iter_jsonl(path):
        if labelled.text_of(task, row) is not None:
            good = True
        elif not skip_bad_rows:
            fault = str(row) if isinstance(row, ValueError) else f"no text under '{task.text_field}'"
            raise cli.UserError(f"{path}, line {number}: {fault}; mend the row, or pass --skip_bad_rows")
    if not good:
        raise cli.UserError(f"{path} has no usable rows; each needs its text under '{task.text_field}'")


def good_texts(path: str, task: LabelTask, bad: list[dict]) -> Iterator[str]:
    """The text of each good row; the bad ones are added to `bad`."""
    for number, row in records.iter_jsonl(path):
        text = labelled.text_of(task, row)
        if text is None:
            bad.append({"line": number, "row": str(row) if isinstance(row, ValueError) else row})
        else:
            yield text


def classify_file(args: argparse.Namespace, classifier, label_bias: dict[str, float]) -> None:
    """Stream --input to --output in windows; what is written under a .partial name survives an interruption."""
    from tqdm import tqdm

    partial, rejects = Path(args.output + ".partial"), Path(args.output + ".rejects.jsonl")
    partial.parent.mkdir(parents=True, exist_ok=True)
    # "batch" estimates from the first window, also where the answers of that window are there already
    first = list(islice(good_texts(args.input, classifier.task, []), WINDOW)) if args.calibration == "batch" else []
    first_raw = classifier.raw_scores(first) if first else None
    calibration = classifier.calibration(args.calibration, first_raw, label_bias)
    done = answers_to_keep(partial, args.input, classifier, calibration)
    bad: list[dict] = []
    rows = islice(good_texts(args.input, classifier.task, bad), done, None)
    with partial.open("a", encoding="utf-8") as handle, tqdm(unit=" rows", initial=done) as progress:
        while window := list(islice(rows, WINDOW)):
            for answer in classifier.answers(window, calibration, first_raw if window == first else None):
                handle.write(json.dumps(answer, ensure_ascii=False) + "\n")
            handle.flush()
            progress.update(len(window))
    os.replace(partial, args.output)
    rejects.unlink(missing_ok=True)
    if bad:
        write_jsonl(rejects, bad)
        cli.log(f"{len(bad)} bad rows of {args.input} skipped; they are in {rejects}")


def answers_to_keep(partial: Path, rows: str, classifier, calibration) -> int:
    """How many answers of an interrupted run stand: its whole lines, if the last is what is answered to that row now.

    Otherwise the file is of another model, calibration or input, and goes.
    """
    if not partial.is_file():
        return 0
    done, last = whole_lines(partial)
    text = next(islice(good_texts(rows, classifier.task, []), done - 1, None), None) if done else None
    if text is not None and same_answer(last, classifier.answers([text], calibration)[0]):
        cli.log(f"going on after {done:,} answers in {partial}")
        return done
    if done:
        cli.log(f"{partial} holds answers of another model, calibration or input; starting again")
    partial.unlink()
    return 0


def same_answer(line: bytes, answer: dict) -> bool:
    """Whether a line of an output file is this answer, but for the last digits, which depend on the batch."""
    try:
        found = json.loads(line)
        near = all(
            abs(found[key][label] - value) < NEAR for key in ("scores", "prior") for label, value in answer[key].items()
        )
        return near and found["model_name"] == answer["model_name"]
    except (ValueError, KeyError, TypeError):
        return False


def whole_lines(path: Path) -> tuple[int, bytes]:
    """Complete lines of an interrupted output, and the last; a line without its end is cut off."""
    count = end = 0
    last = b""
    with path.open("rb") as handle:
        for line in handle:
            if line.endswith(b"\n"):
                count, end, last = count + 1, end + len(line), line
    with path.open("ab") as handle:
        handle.truncate(end)
    return count, last


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
