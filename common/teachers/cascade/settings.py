"""What a cascade is asked for, as values."""

from __future__ import annotations

import os
from dataclasses import dataclass

from common.cli import UserError
from common.models.source import ModelSource
from common.teachers.settings import EndpointSettings, LocalSettings, address_fault

TIMEOUT = 20.0  # seconds, unless something else is asked for
ANSWER_TOKENS = 512  # of a teacher's answer
KEY_VARIABLE = "CASCADE_API_KEY"  # of the environment; where it is not set, the teachers' own


@dataclass(frozen=True)
class RunTeacher:
    """A larger run that the same server has, by its name."""

    run: str


@dataclass(frozen=True)
class CascadeSettings:
    """Who is asked, about what, how often.

    Attributes:
        teacher: an endpoint, a model that is loaded here, or in the server another run.
        below: rows whose answer has less than this probability are handed on, and those that the calibration abstains
            from; None: those alone.
        per_hour: rows that are handed on in any hour, at most; None: all.
        timeout: seconds until the student's own answer stands: for a row at an endpoint, in the server for a request.
        keep: the teacher's answers are kept, with the texts that they answer, as training rows.
    """

    teacher: EndpointSettings | LocalSettings | RunTeacher
    below: float | None = None
    per_hour: int | None = None
    timeout: float = TIMEOUT
    keep: bool = False

    @property
    def name(self) -> str:
        """The teacher's, as answers give it."""
        if isinstance(self.teacher, EndpointSettings):
            return self.teacher.model
        return self.teacher.run if isinstance(self.teacher, RunTeacher) else self.teacher.source.model_dir


@dataclass(frozen=True)
class JudgedCascade:
    """A cascade that an evaluation judges.

    Attributes:
        teacher: an endpoint, or a model that is evaluated beside the others.
        price: of a row that is handed on; None: not known.
        kept: file of an endpoint's raw answers, so that it is not asked twice; None: they are not kept.
    """

    teacher: EndpointSettings | ModelSource
    price: float | None = None
    kept: str | None = None

    @property
    def local_teacher(self) -> ModelSource | None:
        """The model that is the teacher; None for an endpoint."""
        return self.teacher if isinstance(self.teacher, ModelSource) else None


def is_address(teacher: str) -> bool:
    """Whether a teacher is named by the address of an endpoint, not as a model."""
    return teacher.startswith(("http://", "https://"))


def endpoint(url: str, model: str | None, timeout: float, attempts: int = 1) -> EndpointSettings:
    """An endpoint as a cascade asks it: once, since there is an answer already.

    Raises:
        UserError: the address cannot be one, or there is no model's name.
    """
    if fault := address_fault(url):
        raise UserError(f"the cascade's endpoint {fault}")
    if not model:
        raise UserError("the cascade's endpoint needs the model's name there (--cascade_model, or CASCADE_MODEL)")
    variable = KEY_VARIABLE if os.environ.get(KEY_VARIABLE) else None
    return EndpointSettings(url, model, variable, timeout=timeout, max_attempts=attempts)
