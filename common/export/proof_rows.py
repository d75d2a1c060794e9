"""The rows that an export is proven on: what they ask, and the right answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from common.cli import UserError
from common.data import rows as records
from common.data import shapes, task_record, training_files, turns
from common.export import text_metric
from common.export.text_metric import TextMetric
from common.models import chats, tokenizers
from common.tasks.codegen import prompt as code_prompt
from common.tasks.codegen import rows as code_rows
from common.tasks.idp import rows as idp_rows
from common.tasks.idp.training_rows import TrainingRowBuilder
from common.tasks.ranking import loading
from common.tasks.ranking.calibration import Calibration
from common.tasks.ranking.classifier import CALIBRATION
from common.tasks.ranking.task import LabelTask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class ProofRows:
    """The rows of a proof.

    Attributes:
        path: the file.
        prompts: what the model is asked: a text, or the turns of a chat.
        outputs: the right answers.
        task: the label task; None: any text is an answer.
        texts: of label rows, as the ranker takes them.
        groups: of label rows.
        calibration: that the model decides with; None: by the prior of each runtime's own.
        text_metric: what answers in text are worth; None: their likelihood alone is judged.
    """

    path: str
    prompts: list[chats.Prompt]
    outputs: list[str]
    task: LabelTask | None = None
    texts: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    calibration: Calibration | None = None
    text_metric: TextMetric | None = None

    @property
    def y(self) -> np.ndarray:
        """True label indices of label rows."""
        return np.array([self.task.labels.index(output) for output in self.outputs])


def read_proof_rows(
    path: str,
    task: LabelTask,
    model_dir: str,
    most: int | None,
    *,
    flag: str = "--proof_data",
    runs_code: bool = False,
) -> ProofRows:
    """Rows with a text and a label of `task`, training rows with an answer, labelled documents of an IDP run, or a
    coder's problems with their tests.

    What the model was trained for says which task they are of; of a base, which was trained for none, their manifest or
    their form. Of a chat the last answer is compared, which follows all turns before it.

    Args:
        model_dir: the model, which may have a fitted calibration, and may say what it was trained for.
        most: rows to use, evenly spaced in the file; None: all.
        flag: that named the file, for the messages.
        runs_code: code that a model wrote may be run, in the sandbox, or none will be.

    Raises:
        UserError: missing or bad rows, by file and line, or rows of another task than the model was trained for;
            problems where no code may be run.
    """
    unit, numbered, _ = records.iter_rows(path)
    number, first = next(numbered, (None, None))
    if number is None:
        raise UserError(f"{path} has no rows; give some with {flag}")
    record = task_record.read(model_dir) or task_record.beside(path) or {}
    kind = record.get("kind") or (task_record.CODEGEN if code_rows.is_problem(first) else None)
    if shapes.shape_of(first, (shapes.COMPLETION,)):
        rows = _spaced(training_files.read(path, shapes.SFT), most)
        prompts, outputs = [row["input"] for row in rows], [row["output"] for row in rows]
        task_record.check_prompts(model_dir, map(turns.last_text, prompts), path)
        return ProofRows(path, prompts, outputs, text_metric=text_metric.of_outputs(kind, outputs))
    if kind == task_record.IDP:
        return _read_documents(path, most, record, flag)
    if kind == task_record.CODEGEN:
        return _read_problems(path, most, runs_code)
    if records.row_fault(first, (task.text_field, task.label_field)) is not None:
        raise UserError(
            f"{path}, {unit} {number}: a row of {flag} has {task.text_field} and {task.label_field}, or input and "
            "output; give such rows"
        )
    loading.check(task, model_dir)
    rows = _spaced(task.read(path)[0], most)
    texts = [row[task.text_field] for row in rows]
    fitted = task.kept_file(model_dir, CALIBRATION)
    plain = Calibration(task.labels) if loading.trained_on(task, model_dir) else None
    return ProofRows(
        path,
        [task.prompt(text) for text in texts],
        [row[task.label_field] for row in rows],
        task,
        texts,
        [row["group"] for row in rows],
        Calibration.load(fitted, task.labels) if fitted.is_file() else plain,
    )


def _read_documents(path: str, most: int | None, record: task_record.Record, flag: str) -> ProofRows:
    if "schema" not in record:
        raise UserError(
            f"{path} holds documents, and the run does not say for which JSON Schema it was trained; give rows of "
            f"input and output like those of its training with {flag}"
        )
    rows = _spaced(idp_rows.read(path, record["schema"]), most)
    builder = TrainingRowBuilder(record["schema"], record["typed_fields"], seed=0)
    asked = builder.pairs(rows)
    outputs = [builder.text(fields) for _, fields in asked]
    metric = text_metric.of_outputs(task_record.IDP, outputs)
    return ProofRows(path, [prompt for prompt, _ in asked], outputs, text_metric=metric)


def _read_problems(path: str, most: int | None, runs_code: bool) -> ProofRows:
    problems = _spaced(code_rows.read(path), most)
    if not runs_code:
        raise UserError(
            f"{path} holds problems with tests, and the proof runs what the model writes for them, in a sandbox; pass "
            "--confirm_run_unsafe_code, or give rows of input and output"
        )
    prompts = [code_prompt.direct_prompt(problem.prompt) for problem in problems]
    outputs = [code_prompt.code_answer(problem.solution) for problem in problems]
    return ProofRows(path, prompts, outputs, text_metric=text_metric.of_problems(problems))


def _spaced(rows: list[dict], most: int | None) -> list[dict]:
    if most is None or most >= len(rows):
        return rows
    return [rows[index] for index in np.linspace(0, len(rows) - 1, most).round().astype(int)]


def encode(tokenizer: PreTrainedTokenizerBase, proof_rows: ProofRows) -> list[tokenizers.Encoded]:
    """Each row's prompt and output as token ids, as training has them; of a chat the last answer is the output."""
    asked = [prompt if isinstance(prompt, str) else turns.unlearnt(prompt) for prompt in proof_rows.prompts]
    return [chats.encode(tokenizer, *pair) for pair in zip(asked, proof_rows.outputs, strict=True)]


def longest(tokenizer: PreTrainedTokenizerBase, proof_rows: ProofRows) -> int:
    """Tokens of the longest row, those included that a label task's prior is measured on."""
    rows = [len(row.input_ids) for row in encode(tokenizer, proof_rows)]
    nulls = proof_rows.task.null_inputs if proof_rows.task else ()
    rows += [len(tokenizers.encode_prompt(tokenizer, proof_rows.task.prompt(text))) for text in nulls]
    return max(rows)
