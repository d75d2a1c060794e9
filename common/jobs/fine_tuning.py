"""OpenAI's fine-tuning job as a job of this service: its body, the settings that follow from it, the model's name."""

from __future__ import annotations

import math
import os
import re
import secrets
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from common.cli import UserError
from common.jobs.files import StoredFile, file_id
from common.jobs.store import FINE_TUNING as KEY
from common.models import adapters
from common.models.batching import EFFECTIVE_BATCH
from common.training.settings import DpoSettings, TrainSettings
from common.web.app import Problem

AUTO = "auto"
MOST_EPOCHS, EPOCHS = 25, 3  # of "auto"
FEW_ROWS, MANY_ROWS = 100, 25_000  # that "auto" wants to be seen at least, and at most
STEPS_AN_EPOCH = 16  # that "auto" wants at least, in batches of fewer rows where there are few
ROWS_AT_ONCE = 4  # of a batch whose size is given; the rest is accumulated
LOGGED = 200  # points of a loss curve
LONGEST_BASE = 40  # characters of a base's name in a model's
LONGEST_NAME = 128 - len("-step-1000000000")  # of a model's, whose checkpoints are to be served, too
FIELDS = {"student": "model", "init_adapter": "model", "data": "training_file", "eval_data": "validation_file",
          "epochs": "n_epochs", "learning_rate": "learning_rate_multiplier",
          "per_device_train_batch_size": "batch_size", "gradient_accumulation_steps": "batch_size"}  # fmt: skip
VALIDATION, RESULTS, PUBLISHED = "validation.json", "step_metrics.csv", "published.json"  # among the artifacts
JUDGES, PUBLISHES = "common.jobs.validation", "common.jobs.publication"  # modules that follow a training

Text = Annotated[str, StringConstraints(max_length=512)]
Key = Annotated[str, StringConstraints(min_length=1, max_length=64)]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Hyperparameters(Body):
    batch_size: Literal["auto"] | Annotated[int, Field(ge=1, le=256, strict=True)] | None = None
    learning_rate_multiplier: Literal["auto"] | Annotated[float, Field(gt=0, le=100)] | None = None
    n_epochs: Literal["auto"] | Annotated[int, Field(ge=1, le=50, strict=True)] | None = None


class DpoHyperparameters(Hyperparameters):
    beta: Literal["auto"] | Annotated[float, Field(gt=0, le=2)] | None = None


class Supervised(Body):
    hyperparameters: Hyperparameters | None = None


class Dpo(Body):
    hyperparameters: DpoHyperparameters | None = None


class Method(Body):
    type: Literal["supervised", "dpo", "reinforcement"]
    supervised: Supervised | None = None
    dpo: Dpo | None = None
    reinforcement: dict[str, Any] | None = Field(None, description="not available")


class FineTuningRequest(Body):
    """OpenAI's body of `fine_tuning.jobs.create`."""

    model: Annotated[str, StringConstraints(min_length=1, max_length=512)] = Field(
        description="A base as /distill takes it, a run to go on from, or a name that FINE_TUNING_MODELS stands in for"
    )
    training_file: str = Field(max_length=64)
    validation_file: str | None = Field(None, max_length=64)
    hyperparameters: Hyperparameters | None = Field(None, description="Deprecated: give them with the method")
    method: Method | None = None
    seed: Annotated[int, Field(ge=0, le=2**31 - 1, strict=True)] | None = None
    suffix: Annotated[str, StringConstraints(min_length=1, max_length=64)] | None = None
    metadata: dict[Key, Text] | None = Field(None, max_length=16)
    integrations: list[dict[str, Any]] | None = Field(None, description="not available")

    def refuse_what_is_missing(self) -> None:
        """Raises Problem 422 for what this service has not."""
        if self.method and self.method.type == "reinforcement":
            raise Problem(422, "method: reinforcement is not available; supervised and dpo are", "method")
        if self.integrations:
            message = "integrations: there are none; take the curves from the events or result_files"
            raise Problem(422, message, "integrations")

    def body(self) -> dict[str, Any]:
        """As it was sent."""
        return self.model_dump(exclude_unset=True)

    @property
    def is_dpo(self) -> bool:
        return self.method is not None and self.method.type == "dpo"

    def asked(self) -> DpoHyperparameters:
        """The hyperparameters as they were given, with the method or in the old way."""
        of_method = self.method and (self.method.dpo if self.is_dpo else self.method.supervised)
        given = (of_method and of_method.hyperparameters) or self.hyperparameters or Hyperparameters()
        return DpoHyperparameters(**given.model_dump())


@dataclass(frozen=True)
class Base:
    """What is trained on: a model, and the adapter that is gone on from."""

    student: str
    init_adapter: str | None = None


@dataclass(frozen=True)
class Publication:
    """Where a job's model goes.

    Attributes:
        runs_dir: folder of runs that the inference server reads.
        data_dir: of this service, for the file of results.
    """

    runs_dir: Path
    data_dir: Path

    def commands(
        self, settings: TrainSettings, name: str, job_id: str, judged: bool = True, results: bool = True
    ) -> list[dict[str, Any]]:
        """What follows the training: the figures on the validation file, and the run's new place.

        Args:
            judged: whether there are figures.
            results: whether the curves become one of the files that clients get.
        """
        commands, artifacts = [], settings.save_dir
        if settings.eval_data and judged:
            words = [f"--run={artifacts}", f"--data={settings.eval_data}", f"--train_data={settings.data}"]
            commands.append({"argv": ["-m", JUDGES, *words], "output": None})
        words = [f"--run={artifacts}", f"--name={name}", f"--runs_dir={self.runs_dir}", f"--data_dir={self.data_dir}"]
        words += [f"--file_id={file_id(job_id)}"] * results
        return [*commands, {"argv": ["-m", PUBLISHES, *words], "output": None}]


def chosen(asked: DpoHyperparameters, rows: int, dpo: bool) -> dict[str, int | float]:
    """The hyperparameters with a number for each "auto".

    Few rows are seen more often, at most 25 times, and in smaller batches; of very many each is seen less often.
    """
    given = {name: value for name, value in asked.model_dump().items() if value not in (AUTO, None)}
    epochs = EPOCHS
    if rows * epochs < FEW_ROWS:
        epochs = min(MOST_EPOCHS, max(1, FEW_ROWS // rows))
    elif rows * epochs > MANY_ROWS:
        epochs = max(1, MANY_ROWS // rows)
    auto = {
        "n_epochs": epochs,
        "batch_size": max(1, min(EFFECTIVE_BATCH, rows // STEPS_AN_EPOCH)),
        "learning_rate_multiplier": 1.0,
    }
    return auto | ({"beta": DpoSettings.beta} if dpo else {}) | given


def payloads(
    request: FineTuningRequest, base: Base, training: StoredFile, validation: StoredFile | None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What was asked for, with the hyperparameters, and the job as this service's own request, in ever smaller passes,
    and then the same checkpointed. The first that fits is to be taken.
    """
    hyper = chosen(request.asked(), training.rows or 1, request.is_dpo)
    defaults = DpoSettings if request.is_dpo else TrainSettings
    batch = int(hyper["batch_size"])
    steps = math.ceil((training.rows or 1) / batch)
    payload: dict[str, Any] = {
        "method": "dpo" if request.is_dpo else "sft",
        "student": base.student,
        "data": training.id,
        "epochs": hyper["n_epochs"],
        "learning_rate": defaults.learning_rate * hyper["learning_rate_multiplier"],
        "seed": secrets.randbelow(2**31) if request.seed is None else request.seed,
        "save_steps": steps,
        "logging_steps": max(1, steps * int(hyper["n_epochs"]) // LOGGED),
    }
    if base.init_adapter:
        payload["init_adapter"] = base.init_adapter
    if validation:
        payload["eval_data"] = validation.id
    if request.is_dpo:
        payload["beta"] = hyper["beta"]
    sizes = [size for size in range(min(batch, ROWS_AT_ONCE), 0, -1) if batch % size == 0]
    passes = [{"per_device_train_batch_size": size, "gradient_accumulation_steps": batch // size} for size in sizes]
    passes += [sizes | {"gradient_checkpointing": "on"} for sizes in passes]
    return {"asked": request.body(), "hyperparameters": hyper}, [payload | sizes for sizes in passes]


def base_of(model: str, aliases: tuple[tuple[str, str], ...], runs_dir: Path) -> Base:
    """What a `model` stands for: the first alias that fits, a run that is gone on from, else a base.

    Raises:
        Problem: 422 for a run whose adapter is broken.
    """
    name = next((base for pattern, base in aliases if fnmatchcase(model, pattern)), model)
    run = runs_dir / name
    if "/" in name or not os.path.isdir(run):  # which Path.is_dir refuses to say of a name that is too long
        return Base(name)
    if not adapters.is_adapter(run):
        return Base(str(run))
    try:
        return Base(adapters.base_of(run), str(run))
    except UserError as error:
        raise Problem(422, f"model: {error}", "model") from error


def model_name(student: str, suffix: str | None, job_id: str) -> str:
    """ft-<base>-<suffix>-<job>: of letters, digits, '.', '_' and '-', so that a folder can have it.

    It has no colons as OpenAI's have, which some file systems and tools read otherwise.
    """
    behind = [*([words] if suffix and (words := plain(suffix)) else []), job_id]
    room = min(LONGEST_BASE, LONGEST_NAME - len("-".join(["ft", "", *behind])))
    base = plain(Path(student.rstrip("/")).name)[:room].strip("-.")
    return "-".join(["ft", base or "model", *behind])


def plain(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-.")


def renamed(problem: Problem, aliases: tuple[tuple[str, str], ...] = ()) -> Problem:
    """A refusal of this service's own request, by the names of OpenAI's; of a model with those that stand for one."""
    field = FIELDS.get(problem.param or "", problem.param)
    message = str(problem.detail)
    if field != problem.param:
        message = re.sub(rf"^{problem.param}\b", str(field), message)
    if field == "model" and aliases:
        message += f"; these names stand for a model here: {', '.join(pattern for pattern, _ in aliases)}"
    retry = (problem.headers or {}).get("Retry-After")
    return Problem(problem.status_code, message, field, int(retry) if retry else None)


def is_fine_tuning(request: dict[str, Any]) -> bool:
    """Whether a job's request is one of OpenAI's."""
    return isinstance(request.get(KEY), dict)
