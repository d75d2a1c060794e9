"""A teacher behind /v1/decisions or /v1/systemone, which give the probability of each label themselves."""

from __future__ import annotations

import math
from typing import Any

import httpx2

from common.tasks.ranking.task import LabelTask
from common.teachers.chat_endpoint import ChatEndpoint
from common.teachers.interview import Answer, NoAnswer, Question
from common.teachers.settings import SYSTEM_ONE, EndpointSettings

NAME = "label"  # of the one question
TOLERANCE = 0.01  # by which probabilities may miss a sum of 1


class DecisionsEndpoint(ChatEndpoint):
    """Asked, paced and retried as a `ChatEndpoint`; the label task is one choice, whose options are its labels.

    Args:
        settings: its address ends in /decisions (OpenAI's shape) or /systemone (System One's).
    """

    speaks = "a decisions API"

    def __init__(self, settings: EndpointSettings, task: LabelTask, api_key: str | None = None) -> None:
        more = {name: value for name, value in (settings.extra_body or {}).items() if value is not None}
        super().__init__(settings, more, api_key)
        self.task, self.url = task, settings.url.rstrip("/")
        self.system_one = self.url.endswith(SYSTEM_ONE)
        self.key: Any = ["decisions", self.url, settings.model, task.instruction, task.labels, self.options]

    def body_of(self, question: Question) -> dict[str, Any]:
        """The request; the task's instruction is taken off the prompt, since it is the question's."""
        text = question.messages[0]["content"].removeprefix(self.task.prompt(""))
        asked = {"type": "choice", "instructions": self.task.instruction}
        if self.system_one:
            questions = {NAME: asked | {"criteria": dict.fromkeys(self.task.labels)}}
            return {"model": self.settings.model, "state": text, "questions": questions, **self.options}
        choices = [{"value": label} for label in self.task.labels]
        questions = [asked | {"name": NAME, "choices": choices}]
        return {"model": self.settings.model, "input": text, "questions": questions, **self.options}

    def read(self, response: httpx2.Response, body: Any, attempt: int) -> Answer | NoAnswer:
        """See `ChatEndpoint.read`; a refusal is no answer, and will be none the next time."""
        answer = body["answers"][NAME if self.system_one else 0]
        if answer["type"] == "refusal":
            return NoAnswer("the endpoint declines to answer", lasting=True)
        given = answer["probabilities"]
        shares = dict(given) if self.system_one else {one["value"]: one["probability"] for one in given}
        mass = {label: float(shares[label]) for label in self.task.labels}
        total = sum(mass.values())
        if len(shares) != len(mass) or min(mass.values()) < 0 or not math.isclose(total, 1, abs_tol=TOLERANCE):
            raise ValueError("probabilities")
        probabilities = {label: round(share / total, 6) for label, share in mass.items()}
        label = answer["choice"] if answer["choice"] in mass else max(mass, key=mass.get)
        usage = body.get("usage") or {}
        counts = [usage.get(name) for name in ("input_tokens", "output_tokens")]
        request_id = response.headers.get("x-request-id")
        return Answer(label, True, *counts, attempt, request_id, probabilities=probabilities)
