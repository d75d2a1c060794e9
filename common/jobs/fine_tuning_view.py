"""A job as OpenAI shows it: the fine-tuning job, its events, its checkpoints."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

from common.jobs import progress
from common.jobs.files import file_id
from common.jobs.fine_tuning import KEY, PUBLISHED, PUBLISHES, VALIDATION, model_name
from common.jobs.folder import ARTIFACTS, JobFolder
from common.jobs.progress import BEAT, POLL
from common.jobs.published import owner_of
from common.jobs.store import CANCELLED, ENDED, FAILED, PAUSED, SUCCEEDED, TO_PAUSE, Job

PREFIX = "ftjob-"
ORGANIZATION = "distill-slm"
NAMED = "--name="  # in the command that publishes a model
STOPPED = {FAILED: "it failed", CANCELLED: "The job was cancelled", PAUSED: "The job is paused"}


def job_object(job: Job, folder: JobFolder, results: bool) -> dict[str, Any]:
    """The job.

    Args:
        results: whether its file of results is there.
    """
    asked, hyper = job.request[KEY]["asked"], job.request[KEY]["hyperparameters"]
    method = "dpo" if job.method == "dpo" else "supervised"
    done = job.state == SUCCEEDED
    return {
        "id": PREFIX + job.id,
        "object": "fine_tuning.job",
        "created_at": int(job.created),
        "finished_at": int(job.ended) if job.ended else None,
        "estimated_finish": estimated_finish(job, folder),
        "status": "pausing" if job.cancel == TO_PAUSE else job.state,
        "model": job.request["student"],
        "fine_tuned_model": name_of(job) if done else None,
        "training_file": asked["training_file"],
        "validation_file": asked.get("validation_file"),
        "result_files": [file_id(job.id)] if done and results else [],
        "hyperparameters": hyper,
        "method": {"type": method, method: {"hyperparameters": hyper}},
        "seed": job.request["seed"],
        "metadata": asked.get("metadata"),
        "integrations": [],
        "organization_id": ORGANIZATION,
        "trained_tokens": trained_tokens(job, folder) if done else None,
        "error": failure(job),
        "validation": folder.read(f"{ARTIFACTS}/{VALIDATION}") or None if done else None,
    }


def name_of(job: Job) -> str:
    """What the inference server calls the model of a job: as its last command says, since an earlier version gave other
    names.
    """
    words = [word for command in job.commands if PUBLISHES in command["argv"] for word in command["argv"]]
    given = next((word.removeprefix(NAMED) for word in words if word.startswith(NAMED)), None)
    return given or model_name(job.request["student"], job.request[KEY]["asked"].get("suffix"), job.id)


def failure(job: Job) -> dict[str, Any] | None:
    if job.state != FAILED or job.error is None:
        return None
    return {"code": "job_failed", "message": job.error["reason"], "param": None}


def estimated_finish(job: Job, folder: JobFolder) -> int | None:
    """When the training will have ended at its speed, in seconds since 1970; None before that is known."""
    if job.state != "running":
        return None
    known = progress.status(folder, ended=False)["progress"]
    left = known and known["seconds_left"]
    return None if left is None else int(time.time() + left)


def trained_tokens(job: Job, folder: JobFolder) -> int | None:
    """Tokens of the rows, as often as they were trained on; None of a run that does not say."""
    tokens = folder.read_record().get("train_tokens")
    return round(tokens * job.request["epochs"]) if isinstance(tokens, int) else None


def events(job: Job, folder: JobFolder) -> list[dict[str, Any]]:
    """What has happened, the oldest first. An event keeps its id and its place, whatever follows."""
    entries: list[tuple[float, dict[str, Any]]] = []

    def add(key: str, when: float, message: str, level: str = "info", data: dict[str, Any] | None = None) -> None:
        event = {
            "id": f"ftevent-{job.id}-{key}",
            "object": "fine_tuning.job.event",
            "created_at": int(when),
            "level": level,
            "message": message,
            "type": "metrics" if data else "message",
            "data": data or {},
        }
        entries.append((when, event))

    add("created", job.created, f"Created fine-tuning job: {PREFIX}{job.id}")
    for number, entry in enumerate(progress.parse(progress.read(folder, progress.LIVE, 0, -1))):
        add(f"line-{number}", entry["time"], *described(entry))
    unwritten = job.state in STOPPED and not job.stops  # by a service that kept none
    kept = {"state": job.state, "time": job.ended or time.time(), "reason": job.error and job.error["reason"]}
    for number, stop in enumerate([kept] if unwritten else job.stops):
        level = "error" if stop["state"] == FAILED else "info"
        add(f"{stop['state']}-{number}", stop["time"], stop["reason"] or STOPPED[stop["state"]], level)
    entries.sort(key=lambda entry: entry[0])
    if job.state == SUCCEEDED:
        end = job.ended or time.time()
        if figures := folder.read(f"{ARTIFACTS}/{VALIDATION}"):
            add("validation", end, validation_sentence(figures), "info", figures)
        add("model", end, f"New fine-tuned model created: {name_of(job)}")
        add("succeeded", end, "The job has successfully completed")
    return [event for _, event in entries]


def described(entry: dict[str, Any]) -> tuple[str, str, dict[str, Any] | None]:
    """(message, level, data) of a line of the live log."""
    step, total = entry["step"], entry["max_steps"]
    losses = progress.losses_of(entry)
    if not losses:
        return ("Fine-tuning job started" if not step else f"Fine-tuning job goes on from step {step}"), "info", None
    known = {"train_loss": losses.get("loss"), "valid_loss": losses.get("eval_loss")}
    figures = {name: value for name, value in known.items() if value is not None}
    words = {"train_loss": "training loss", "valid_loss": "validation loss"}
    message = ", ".join(f"{words[name]}={value:.4f}" for name, value in figures.items()) or "the loss is not finite"
    level = "info" if figures else "warn"
    return f"Step {step}/{total}: {message}", level, {"step": step, "total_steps": total, **figures}


def validation_sentence(figures: dict[str, Any]) -> str:
    """The figures of a validation file in words."""
    words = {"loss": "loss", "token_accuracy": "token accuracy", "accuracy": "accuracy",
             "preference_accuracy": "chosen answer likelier, without the reference",
             "reward_accuracy": "chosen answer preferred, against the reference"}  # fmt: skip
    parts = [
        f"{name} {value['value']:.4f} [{value['low']:.4f}, {value['high']:.4f}]"
        for key, name in words.items()
        if isinstance(value := figures.get(key), dict)
    ]
    return f"Validation on {figures.get('n')} rows: {', '.join(parts)}"


def checkpoints(job: Job, folder: JobFolder) -> list[dict[str, Any]]:
    """The models that a job has left and that are there, the last first: its own, and earlier states of it, each with
    its figures."""
    left = folder.read(f"{ARTIFACTS}/{PUBLISHED}")
    if job.state != SUCCEEDED or not left:
        return []
    there = [state for state in left["checkpoints"] if owner_of(Path(left["runs_dir"]) / state["model"]) == job.id]
    figures, points = folder.read(f"{ARTIFACTS}/{VALIDATION}"), progress.curves(folder)

    def shown(entry: dict[str, Any]) -> dict[str, Any]:
        step, own = entry["step"], entry["model"] == left["model"]
        valid = latest(points, "eval_loss", step)
        metrics: dict[str, Any] = {"step": step, "train_loss": latest(points, "loss", step), "valid_loss": valid}
        if own and figures:
            metrics["full_valid_loss"] = figures["loss"]["value"]
            metrics["full_valid_mean_token_accuracy"] = figures["token_accuracy"]["value"]
        elif valid is not None:
            metrics["full_valid_loss"] = valid
        return {
            "id": f"ftckpt-{job.id}-{step}",
            "object": "fine_tuning.job.checkpoint",
            "created_at": int(entry["created"]),
            "fine_tuned_model_checkpoint": entry["model"],
            "fine_tuning_job_id": PREFIX + job.id,
            "step_number": step,
            "metrics": metrics,
        }

    return [shown(entry) for entry in sorted(there, key=lambda entry: -entry["step"])]


def latest(points: Sequence[dict[str, Any]], name: str, step: int) -> float | None:
    """What was logged last under a name until a step."""
    return next((point[name] for point in reversed(points) if point["step"] <= step and name in point), None)


async def stream(look: Callable[[], tuple[Job, list] | None], closing: Callable[[], bool]) -> AsyncIterator[str]:
    """Server-sent events, each an event of the job, until it has ended; then [DONE].

    Args:
        look: the job and its events as they are now; None when it was deleted. Blocking.
    """
    sent: set[str] = set()
    silent = 0.0
    while not closing():
        known = await asyncio.to_thread(look)
        if known is None:
            break
        job, entries = known
        fresh = [entry for entry in entries if entry["id"] not in sent]
        for entry in fresh:
            yield f"data: {json.dumps(entry)}\n\n"
        sent.update(entry["id"] for entry in fresh)
        if job.state in ENDED:
            break
        silent = 0.0 if fresh else silent + POLL
        if silent >= BEAT:
            silent = 0.0
            yield ": still here\n\n"
        await asyncio.sleep(POLL)
    yield "data: [DONE]\n\n"
