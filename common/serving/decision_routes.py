"""Typed questions about a text, answered with probabilities: OpenAI's `/v1/decisions`, System One's `/v1/systemone`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response

from common.cli import UserError
from common.serving import decision_shapes as shapes
from common.serving import label_tasks
from common.serving.run_registry import Version
from common.serving.server import Server
from common.serving.sizes import estimate_row
from common.serving.work import DIGITS, Decide, Decided
from common.tasks.ranking import questions
from common.tasks.ranking.questions import PREDICATE, SCORE, Question
from common.tasks.ranking.task import LabelTask
from common.web.app import Problem, responses

CALIBRATION_HEADER = "X-Decision-Calibration"  # of each answer, in order
MAX_ASKED = 4_000_000  # characters of a request's text times its questions


@dataclass(frozen=True)
class Plan:
    """How a question is put to a model.

    Attributes:
        labels: of `task`, in the order of the question's options.
        text: the input as the task reads it.
    """

    task: LabelTask
    labels: tuple[str, ...]
    work: Decide
    text: str

    @property
    def prompt(self) -> str:
        """What the model reads."""
        return self.task.prompt(self.text)


@dataclass(frozen=True)
class Verdict:
    """The answer to a question: the probabilities of its options, in their order, and the index of the chosen one."""

    question: Question
    probabilities: list[float]
    chosen: int
    abstained: bool
    calibration: str
    tokens: int

    @property
    def confidence(self) -> float:
        """See `questions`."""
        measure = questions.score_confidence if self.question.kind == SCORE else questions.choice_confidence
        return round(measure(self.probabilities, self.chosen), DIGITS)

    @property
    def score(self) -> float:
        """The mean level."""
        return round(questions.expected_level(self.probabilities), DIGITS)


def add_decisions(app: FastAPI, server: Server) -> None:
    """The two routes."""

    @app.post("/v1/decisions", response_model=shapes.DecisionsAnswer, responses=responses(404, 409, 422, 503, 504))
    async def decisions(body: shapes.DecisionsRequest, request: Request) -> Response:
        """Predicates, choices and scores about an input by a run, with probabilities, as OpenAI's client asks them."""
        asked = [question.asked() for question in body.questions]
        given = (shapes.transcript(body.input), shapes.row_of(body.input))
        verdicts = await decide(server, request, body.model, asked, *given, body.calibration)
        answers = [_answer(*pair) for pair in zip(body.questions, verdicts, strict=True)]
        read = sum(verdict.tokens for verdict in verdicts)
        usage = {
            "input_tokens": read,
            "input_tokens_details": {"cache_write_tokens": 0, "cached_tokens": 0},
            "output_tokens": 0,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": read,
        }
        return _response({"model": body.model, "answers": answers, "usage": usage}, verdicts)

    @app.post("/v1/systemone", response_model=shapes.SystemOneAnswer, responses=responses(404, 409, 422, 503, 504))
    async def systemone(body: shapes.SystemOneRequest, request: Request) -> Response:
        """The same questions in System One's shape, which `transformers serve`, vLLM and llama.cpp speak."""
        if body.assets:
            raise Problem(422, "assets: the models here read no images; send text", "assets")
        asked = [question.asked() for question in body.questions.values()]
        state = body.state
        row = None if isinstance(state, list) else shapes.clean(state) if isinstance(state, str) else state
        verdicts = await decide(server, request, body.model, asked, shapes.read_json(state), row, body.calibration)
        named = zip(body.questions.items(), verdicts, strict=True)
        answers = {name: _systemone_answer(question, verdict) for (name, question), verdict in named}
        usage = {"input_tokens": sum(verdict.tokens for verdict in verdicts), "output_tokens": 0}
        return _response({"model": body.model, "answers": answers, "usage": usage}, verdicts)


async def decide(
    server: Server,
    request: Request,
    model: str,
    asked: Sequence[Question],
    text: str,
    row: str | dict[str, Any] | None,
    calibration: str,
) -> list[Verdict]:
    """The answers of a run to questions about a text.

    Args:
        row: what the run's own label task reads, where the input may be a row of it.
        calibration: of questions that are not the run's own.

    Raises:
        Problem: 404, 409, 422, 503 or 504.
    """
    started = time.perf_counter()
    _check(asked, text)
    version = await server.find(model, "model")
    own = own_task(server, version)
    plans = [_plan(question, own, text, row, calibration) for question in asked]
    prompts = server.encode(version, [plan.prompt for plan in plans])
    tasks = [
        asyncio.ensure_future(server.answer(request, version, plan.work, prompt, tokens=estimate_row(plan.text)))
        for plan, prompt in zip(plans, prompts, strict=True)
    ]
    try:
        decided: list[Decided] = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
    verdicts = []
    for question, plan, answer in zip(asked, plans, decided, strict=True):
        places = [plan.task.labels.index(label) for label in plan.labels]
        probabilities = [answer.probabilities[place] for place in places]
        facts = (answer.abstained, answer.calibration, answer.tokens)
        verdicts.append(Verdict(question, probabilities, places.index(answer.chosen), *facts))
        if plan.work.calibration == "own":
            chosen = "none" if answer.abstained else plan.task.labels[answer.chosen]
            server.metrics.child(server.metrics.margin, version.name).observe(answer.margin)
            server.metrics.child(server.metrics.predictions, version.name, chosen).inc()
        named = dict(zip(question.options, probabilities, strict=True))
        facts = {"type": question.kind, "calibration": answer.calibration, "abstained": answer.abstained}
        server.record(request, version, Decide.name, started, text, **facts, probabilities=named, tokens=answer.tokens)
    return verdicts


def own_task(server: Server, version: Version) -> LabelTask | None:
    """The label task that a run is asked for by /infer; None where it was trained for something else.

    Raises:
        Problem: 409, its record is broken.
    """
    try:
        return label_tasks.task_of(version, server.settings.host.task)
    except label_tasks.OtherTask:
        return None
    except UserError as error:
        raise Problem(409, str(error), "model") from error


def _check(asked: Sequence[Question], text: str) -> None:
    if not text.strip():
        raise Problem(422, "the input is empty; send a text to ask about", "input")
    for number, question in enumerate(asked):
        plain = [option.strip() for option in question.options]
        for option in plain:
            if not option or plain.count(option) > 1:
                fault = f"'{option[:80]}' stands there twice" if option else "one is empty"
                raise Problem(422, f"questions.{number}: every option needs a text of its own; {fault}", "questions")
    if len(text) * len(asked) > MAX_ASKED:
        raise Problem(
            422, f"the input times its questions has more than {MAX_ASKED:,} characters; ask fewer", "questions"
        )


def _plan(
    question: Question, own: LabelTask | None, text: str, row: str | dict[str, Any] | None, calibration: str
) -> Plan:
    if own is not None and row is not None and (labels := question.own_labels(own)):
        clean = own.clean(row) if isinstance(row, str) else own.text_of(row)
        if clean is not None:
            return Plan(own, labels, Decide(own.text, "own"), clean)
    task = question.task()
    return Plan(task, task.labels, Decide(task.text, calibration), text)


def _response(content: dict[str, Any], verdicts: Sequence[Verdict]) -> Response:
    headers = {CALIBRATION_HEADER: ", ".join(verdict.calibration for verdict in verdicts)}
    # the names and levels in it are the client's, and may hold half a character
    return Response(shapes.as_json(content), headers=headers, media_type="application/json")


def _answer(asked: Any, verdict: Verdict) -> dict[str, Any]:
    """OpenAI's answer to a question."""
    head = {"type": asked.type, "name": asked.name}
    if verdict.abstained:
        return head | {"type": "refusal"}
    if verdict.question.kind == PREDICATE:
        return head | {"probability": verdict.probabilities[0]}
    if verdict.question.kind == SCORE:
        levels = enumerate(zip(asked.levels, verdict.probabilities, strict=True))
        shown = [{"value": value, "label": level.label, "probability": share} for value, (level, share) in levels]
        return head | {"score": verdict.score, "confidence": verdict.confidence, "probabilities": shown}
    pairs = zip(asked.choices, verdict.probabilities, strict=True)
    shown = [{"value": one.value, "probability": share} for one, share in pairs]
    chosen = asked.choices[verdict.chosen].value
    return head | {"choice": chosen, "confidence": verdict.confidence, "probabilities": shown}


def _systemone_answer(asked: Any, verdict: Verdict) -> dict[str, Any]:
    """System One's answer, which has no refusals: where the calibration abstains, it says so beside the answer."""
    more = {"abstained": True} if verdict.abstained else {}
    if verdict.question.kind == PREDICATE:
        return {"type": "noul", "noul": verdict.probabilities[0], **more}
    if verdict.question.kind == SCORE:
        levels = [str(level) for level in range(len(asked.criteria))]
        return {
            "type": "score",
            "score": verdict.score,
            "legend": dict(zip(levels, asked.criteria, strict=True)),
            "confidence": verdict.confidence,
            "probabilities": dict(zip(levels, verdict.probabilities, strict=True)),
            **more,
        }
    names = [*asked.criteria]
    return {
        "type": "choice",
        "choice": names[verdict.chosen],
        "confidence": verdict.confidence,
        "probabilities": dict(zip(names, verdict.probabilities, strict=True)),
        **more,
    }
