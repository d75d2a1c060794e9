"""The last command of a fine-tuning job: its run gets a place among those that are served, its curves become a file.

    python -m common.jobs.publication --run runs/jobs/jobs/0123/artifacts --name ft-tiny-0123 --runs_dir runs \\
        --data_dir runs/jobs --file_id file-0123

A run appears whole, under its name, so that a server that looks for it finds no half of one, and says in owner.json
which job it is of. Run again, it changes nothing. The files are hard links where the disk allows that, so the run
outlives its job, and takes no room of its own.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common import cli
from common.cli import UserError
from common.data import task_record
from common.files import write_json, write_text
from common.jobs import progress
from common.jobs.files import RESULTS as RESULTS_PURPOSE
from common.jobs.files import FileStore
from common.jobs.fine_tuning import PUBLISHED, RESULTS, VALIDATION
from common.jobs.folder import CHECKPOINTS, JobFolder, plain_files
from common.jobs.published import OWNER, STEP, owner_of
from common.models import adapters
from common.training.progress import ACCURACY

COLUMNS = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")  # OpenAI's
REWARD_ACCURACY = "rewards/accuracies"  # TRL's, of preferences
OF_TRAINING = ("optimizer", "scheduler", "rng_state", "trainer_state", "training_args")  # how files of it begin


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__, prog="python -m common.jobs.publication")
    parser.add_argument("--run", required=True, help="the run folder of the training")
    parser.add_argument("--name", required=True, help="that it is served under")
    parser.add_argument("--runs_dir", required=True, help="folder of the runs that are served")
    parser.add_argument("--data_dir", required=True, help="of the job service")
    parser.add_argument("--file_id", help="of the file of results; default: there is none")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = cli.parse_args(build_parser(), argv)
    run, runs_dir = Path(args.run), Path(args.runs_dir)
    folder = JobFolder(run.parent)
    record, figures = folder.read_record(), folder.read(f"{run.name}/{VALIDATION}")
    points = progress.curves(folder)
    check_name(runs_dir / args.name, folder.path.name)
    step = last_step(record, points)
    write_text(run / RESULTS, curve_csv(points, figures, step))
    if args.file_id:
        keep_results(Path(args.data_dir), args.file_id, (run / RESULTS).read_bytes())
    extra = {"metrics.json": metrics(runs_dir / args.name, figures)} if figures else {}
    publish(own_files(run), runs_dir / args.name, folder.path.name, extra)
    entries = [{"step": step, "model": args.name, "created": (run / RESULTS).stat().st_mtime}]
    entries += publish_checkpoints(run, runs_dir, args.name, step, folder.path.name)
    write_json(run / PUBLISHED, {"model": args.name, "runs_dir": str(runs_dir), "checkpoints": entries})
    cli.log(f"{args.name} is in {runs_dir}, with {len(entries) - 1} earlier states of it")


def is_anothers(run: Path, job_id: str) -> bool:
    """Whether there is a run that is not of this job."""
    return run.exists() and owner_of(run) != job_id


def check_name(run: Path, job_id: str) -> None:
    """Raises UserError where another run has this one's name."""
    if is_anothers(run, job_id):
        raise UserError(f"there is another run called {run.name} in {run.parent}; move it away and resume the job")


def last_step(record: Mapping[str, Any], points: Sequence[Mapping[str, Any]]) -> int:
    """The step whose weights were kept: the best epoch's where epochs were judged."""
    best = record.get("best") or {}
    return best.get("step") or record.get("steps") or max((point["step"] for point in points), default=0)


def curve_csv(points: Sequence[Mapping[str, Any]], figures: Mapping[str, Any], step: int) -> str:
    """The curves with OpenAI's columns; cells of what is not measured while a training runs are empty."""
    lines: dict[int, dict[str, Any]] = {}
    for point in points:
        line = lines.setdefault(point["step"], {"step": point["step"]})
        known = {"train_loss": point.get("loss"), "valid_loss": point.get("eval_loss")}
        known["train_accuracy"] = point.get(REWARD_ACCURACY, point.get(ACCURACY)) if "loss" in point else None
        line.update({name: value for name, value in known.items() if value is not None})
    if figures:
        accuracy = {"valid_mean_token_accuracy": figures["token_accuracy"]["value"]}
        lines[step] = lines.get(step, {"step": step}) | {"valid_loss": figures["loss"]["value"]} | accuracy
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines[number] for number in sorted(lines))
    return text.getvalue()


def keep_results(data_dir: Path, file_id: str, content: bytes) -> None:
    """Put the curves among the service's files, unless they are there."""
    store = FileStore(data_dir, max_bytes=1 << 40, quota=1 << 60)  # what a job has made is not refused
    if store.find(file_id):
        return
    incoming = store.receive()
    try:
        incoming.write(content)
        incoming.keep(RESULTS, RESULTS_PURPOSE, own_id=file_id)
    finally:
        incoming.close()


def metrics(model_dir: Path, figures: Mapping[str, Any]) -> dict[str, Any]:
    """The figures as an evaluator's result (see `common.evaluation.results`), which the inference server shows."""
    names = ("loss", "token_accuracy", "accuracy", "preference_accuracy", "reward_accuracy")
    entry = {"model_dir": str(model_dir), "replicates": figures["replicates"], "contamination": figures["shared"]}
    entry |= {name: figures[name] for name in names if name in figures}
    facts = {"evaluator": "validation", "data": figures["data"], "data_sha256": figures["data_sha256"]}
    return facts | {"split": "all", "n": figures["n"], "models": [entry]}


def own_files(run: Path) -> list[tuple[str, Path]]:
    """(path in the folder, file) of what a run is, without its checkpoints."""
    files = [(str(file.relative_to(run)), file) for file in plain_files(run)]
    hidden = [(name, file) for name, file in files if any(part.startswith(".") for part in Path(name).parts)]
    left_out = {name for name, _ in hidden} | {PUBLISHED}
    return [(name, file) for name, file in files if name not in left_out and Path(name).parts[0] != CHECKPOINTS]


def publish_checkpoints(run: Path, runs_dir: Path, name: str, last: int, job_id: str) -> list[dict[str, Any]]:
    """Publish the earlier states that the training still has; {"step", "model", "created"} of each."""
    entries = []
    task = [(task_record.FILE, run / task_record.FILE)] if (run / task_record.FILE).is_file() else []
    for folder in sorted((run / CHECKPOINTS).glob("checkpoint-*")):
        number = folder.name.rpartition("-")[2]
        whole = (folder / "trainer_state.json").is_file()
        holds_model = adapters.is_adapter(folder) or (folder / "model.safetensors").is_file()
        if not (number.isdigit() and whole and holds_model) or int(number) == last:
            continue
        files = [(file.name, file) for file in plain_files(folder) if not file.name.startswith(OF_TRAINING)]
        model = f"{name}{STEP}{number}"
        if is_anothers(runs_dir / model, job_id):
            cli.log(f"the state after step {number} is left out: there is another run called {model}")
            continue
        publish([*files, *task], runs_dir / model, job_id)
        entries.append({"step": int(number), "model": model, "created": folder.stat().st_mtime})
    return entries


def publish(
    files: Iterable[tuple[str, Path]], target: Path, job_id: str, extra: Mapping[str, dict[str, Any]] | None = None
) -> None:
    """Make a job's folder of links to files, and of JSON files of its own, that appears whole; one that is there stays.

    Raises:
        OSError: the disk is full, or the folder cannot be made.
    """
    if target.exists():
        return
    building = target.with_name(f".{target.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    for name, file in files:
        place = building / name
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file, place)
        except OSError:  # another disk, or one without links
            shutil.copy2(file, place)
    for name, value in {OWNER: {"job_id": job_id}, **(extra or {})}.items():
        (building / name).unlink(missing_ok=True)  # a link would change the file that it is one of
        (building / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    building.rename(target)


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
