"""What a teacher says of all rows of an evaluation, so that a cascade to it can be judged at every share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from common.generation.decoding import Decoding
from common.tasks.ranking import cascade_curve
from common.tasks.ranking.calibration import Scores
from common.tasks.ranking.cascade_curve import NO_ANSWER
from common.tasks.ranking.task import LabelTask
from common.teachers import build
from common.teachers.cascade.settings import ANSWER_TOKENS, JudgedCascade
from common.teachers.interview import Answer, Interview, Question
from common.teachers.settings import EndpointSettings
from common.teachers.tasks import Labels, understand


def judged(
    cascade: JudgedCascade,
    model_dirs: Sequence[str],
    task: LabelTask,
    rows: Sequence[dict],
    scores: Mapping[str, Scores],
    y: Sequence[int],
    groups: Sequence[str],
    seed: int = 0,
) -> dict[str, Any]:
    """What handing rows on from each of `model_dirs` brings and costs (see `cascade_curve`).

    Args:
        rows: as `LabelTask.read` gives them.
        scores: of all models, a local teacher among them.
        y: true label indices.

    Raises:
        UserError: the endpoint cannot be asked.
    """
    tokens = None
    if isinstance(cascade.teacher, EndpointSettings):
        name, texts = cascade.teacher.model, [row[task.text_field] for row in rows]
        teacher, tokens = endpoint_predictions(cascade.teacher, task, texts, cascade.kept)
    else:
        name = cascade.teacher.model_dir
        teacher = scores[name].predictions
    students = [(model_dir, scores[model_dir]) for model_dir in model_dirs if model_dir != name]
    return cascade_curve.measured(
        name, teacher, students, np.array(y), groups, price=cascade.price, tokens=tokens, seed=seed
    )


def endpoint_predictions(
    settings: EndpointSettings, task: LabelTask, texts: Sequence[str], kept: str | None
) -> tuple[np.ndarray, dict[str, float] | None]:
    """(label indices [n], `NO_ANSWER` where there is no usable one; mean tokens of prompt and answer, where it tells).

    Args:
        kept: file of raw answers; what is in it is not asked again. None: none are kept.

    Raises:
        UserError: the endpoint cannot be asked.
    """
    interview = Interview(build.endpoint_teacher(settings, Decoding(ANSWER_TOKENS), None), kept)
    prompts = [task.prompt(text) for text in texts]
    questions = [Question(row, [{"role": "user", "content": prompt}]) for row, prompt in enumerate(prompts, start=1)]
    labels, predictions, tokens = Labels(task), np.full(len(texts), NO_ANSWER), []
    for row, (prompt, answer) in enumerate(zip(prompts, interview.ask(questions), strict=True)):
        if not isinstance(answer, Answer):
            continue
        parsed = understand(labels, prompt, answer.text, answer.finished, reasons=False)
        if parsed.fault is None:
            predictions[row] = task.labels.index(parsed.answer)
        if answer.prompt_tokens is not None and answer.completion_tokens is not None:
            tokens.append((answer.prompt_tokens, answer.completion_tokens))
    if not tokens:
        return predictions, None
    prompt, completion = np.mean(tokens, axis=0).round(1)
    return predictions, {"prompt": float(prompt), "completion": float(completion)}
