"""The proof that an export still does what its model did: both measured on the same rows, each in its own runtime.

What is compared: the logits of some rows' last positions, the labels given or the probability of the right answers,
greedy text, and size, loading time and speed.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import log_softmax, logsumexp

from common.cli import UserError
from common.data import rows as records
from common.data import shapes, task_record, training_files, turns
from common.evaluation import bootstrap
from common.export import text_metric
from common.export.proof_table import LIKELIHOOD
from common.export.text_metric import TextMetric
from common.files import sha256_file
from common.models import chats, tokenizers
from common.models.torch_runtime import Runtime
from common.tasks.codegen import prompt as code_prompt
from common.tasks.codegen import rows as code_rows
from common.tasks.idp import rows as idp_rows
from common.tasks.idp.training_rows import TrainingRowBuilder
from common.tasks.ranking import loading, metrics
from common.tasks.ranking.calibration import Calibration, Scores
from common.tasks.ranking.classifier import CALIBRATION
from common.tasks.ranking.decision import log_probabilities
from common.tasks.ranking.rankers import ranker_of
from common.tasks.ranking.task import LabelTask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOGIT_ROWS = 32  # whose logits are compared,
LOGIT_POSITIONS = 16  # at this many of their last positions: with a vocabulary of 150,000 that is 300 MB
GENERATED_PROMPTS, GENERATED_TOKENS = 20, 32
TIMED_PROMPTS, TIMED_TOKENS = 3, 64
SHOWN_CHANGES = 20  # answers that are other than before


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


@dataclass
class RuntimeResult:
    """What a runtime made of the rows of a proof.

    Attributes:
        seconds_to_load, bytes: of the model's files.
        logits: [positions, vocabulary].
        answers: greedy token ids, for the first prompts,
        texts: and as text.
        tokens_per_s: of greedy text, one prompt at a time.
        scores: of label rows.
        rows_per_s: of label rows, in batches.
        metric_parts: of text rows with a metric, [rows, 2] (see `TextMetric`).
        nll: of text rows: the negative log-likelihood of each output in nats, and its tokens, [rows, 2].
    """

    seconds_to_load: float
    bytes: int
    logits: np.ndarray
    answers: list[list[int]]
    texts: list[str]
    tokens_per_s: float
    scores: Scores | None = None
    rows_per_s: float | None = None
    nll: np.ndarray | None = None
    metric_parts: np.ndarray | None = None

    def speed(self) -> dict[str, Any]:
        """Size, loading time and speed, for export.json."""
        return {
            "bytes": self.bytes,
            "seconds_to_load": round(self.seconds_to_load, 3),
            "tokens_per_s": round(self.tokens_per_s, 1),
            "rows_per_s": self.rows_per_s and round(self.rows_per_s, 1),
        }


def measure(
    runtime: Runtime, tokenizer: PreTrainedTokenizerBase, proof_rows: ProofRows, *, seconds_to_load: float, size: int
) -> RuntimeResult:
    """Run a model over the proof's rows.

    Raises:
        UserError: a row does not fit the model's context.
    """
    encoded = encode(tokenizer, proof_rows)
    ends = {tokenizer.eos_token_id, tokenizer.pad_token_id}
    kept, nll = [], []
    for index, row in enumerate(encoded):
        if proof_rows.task and index >= LOGIT_ROWS:
            break
        logits = runtime.logits(row.input_ids[:-1])
        if index < LOGIT_ROWS:
            kept.append(logits[-LOGIT_POSITIONS:])
        if not proof_rows.task:
            right = row.input_ids[row.prompt_length :]
            at_output = logits[row.prompt_length - 1 :]
            likelihoods = at_output[np.arange(len(right)), right] - logsumexp(at_output, axis=1)
            nll.append((-likelihoods.sum(), len(right)))
    prompts = [row.input_ids[: row.prompt_length] for row in encoded]
    metric = proof_rows.text_metric
    asked, budget = (len(prompts), _whole_answer(encoded)) if metric else (GENERATED_PROMPTS, GENERATED_TOKENS)
    answers = [runtime.generate([prompt], budget, ends)[0] for prompt in prompts[:asked]]
    started = time.perf_counter()
    for prompt in prompts[:TIMED_PROMPTS]:
        runtime.generate([prompt], TIMED_TOKENS, ())
    tokens_per_s = len(prompts[:TIMED_PROMPTS]) * TIMED_TOKENS / (time.perf_counter() - started)
    texts = [tokenizers.decode(tokenizer, answer) for answer in answers]
    measured = RuntimeResult(seconds_to_load, size, np.concatenate(kept), answers, texts, tokens_per_s)
    if proof_rows.task is None:
        measured.nll = np.array(nll)
        measured.metric_parts = metric.parts(texts) if metric else None
        return measured
    ranker = ranker_of(getattr(runtime, "model", runtime), tokenizer, proof_rows.task)
    calibration = proof_rows.calibration or Calibration(proof_rows.task.labels, "prior", tuple(ranker.prior()))
    started = time.perf_counter()
    raw = ranker.raw_scores(proof_rows.texts)
    measured.rows_per_s = len(proof_rows.texts) / (time.perf_counter() - started)
    measured.scores = calibration.apply(raw)
    return measured


def _whole_answer(encoded: Sequence[tokenizers.Encoded]) -> int:
    """Tokens that an answer may have: a quarter more than the longest right one."""
    return max(len(row.input_ids) - row.prompt_length for row in encoded) * 5 // 4 + 8


def compare(reference: RuntimeResult, export: RuntimeResult, proof_rows: ProofRows) -> dict[str, Any]:
    """What has changed from `reference` to `export`, for export.json.

    "metric" is macro-F1 of label rows; of text rows that of the task, field F1, F1 of words or pass@1, and where there
    is none "likelihood": the inverse perplexity, exp(-NLL per token), the likelihood of a token, and of label rows that
    of the right label. Its "difference" is that of the export from the reference, with a paired bootstrap interval: one
    minus the other; of likelihoods the share by which they change, which means the same whatever the perplexity.
    "changed" are answers that are other than before. KL is that of the export's next-token distribution from the
    reference's, in nats.
    """
    divergences, winners = [], []
    for pair in zip(reference.logits, export.logits, strict=True):
        log_p, log_q = (log_softmax(logits.astype(np.float64)) for logits in pair)
        divergences.append(np.exp(log_p) @ (log_p - log_q))
        winners.append(log_p.argmax() == log_q.argmax())
    right = [one == other for one, other in zip(reference.answers, export.answers, strict=True)]
    proof: dict[str, Any] = {
        "data": proof_rows.path,
        "data_sha256": sha256_file(proof_rows.path),
        "rows": len(proof_rows.prompts),
        "logits": {
            "positions": len(divergences),
            "max_difference": float(np.abs(reference.logits - export.logits).max()),
            "mean_kl": float(np.mean(divergences)),
            "top1_agreement": float(np.mean(winners)),
        },
        "generated": {
            "prompts": len(right),
            "equal": sum(right),
            "tokens_before_they_part": _shared(reference, export),
        },
    }
    if proof_rows.task:
        nll = [_label_nll(scores, proof_rows.y) for scores in (reference.scores, export.scores)]
        proof |= {"likelihood": _compare_nll(*nll)} | _compare_labels(reference.scores, export.scores, proof_rows)
    else:
        proof |= {"likelihood": _compare_nll(reference.nll, export.nll), "perplexity": _perplexities(reference, export)}
        of_task = proof_rows.text_metric and _compare_texts(reference, export, proof_rows.text_metric)
        proof["metric"] = of_task or proof["likelihood"]
    proof["changed"] = (_changed_labels if proof_rows.task else _changed_texts)(reference, export, proof_rows)
    return proof | {"speed": {"reference": reference.speed(), "export": export.speed()}}


def _changed_labels(reference: RuntimeResult, export: RuntimeResult, proof_rows: ProofRows) -> list[dict[str, Any]]:
    labels = proof_rows.task.labels
    pairs = zip(reference.scores.predictions, export.scores.predictions, strict=True)
    return _changed((labels[before], labels[after]) for before, after in pairs)


def _changed_texts(reference: RuntimeResult, export: RuntimeResult, proof_rows: ProofRows) -> list[dict[str, Any]]:
    return _changed(zip(reference.texts, export.texts, strict=True))


def _changed(pairs: Iterable[tuple[str, str]]) -> list[dict[str, Any]]:
    """The first rows of the proof whose answer has changed: {"row" from 1, "before", "after"}."""
    changed = [
        {"row": number, "before": before, "after": after}
        for number, (before, after) in enumerate(pairs, start=1)
        if before != after
    ]
    return changed[:SHOWN_CHANGES]


def _shared(reference: RuntimeResult, export: RuntimeResult) -> float:
    """The share of the reference's greedy tokens that come before the first one at which the export differs."""
    shared = total = 0
    for one, other in zip(reference.answers, export.answers, strict=True):
        total += len(one)
        shared += next((i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), len(one))
    return shared / total if total else 1.0


def _compare_labels(reference: Scores, export: Scores, proof_rows: ProofRows) -> dict[str, Any]:
    y, groups = proof_rows.y, proof_rows.groups
    values = [
        metrics.evaluate(scores, y, proof_rows.task.labels, groups=groups)["macro_f1"] for scores in (reference, export)
    ]
    difference = metrics.compare(export, reference, y, groups)["macro_f1"]
    return {
        "label_agreement": bootstrap.mean_interval(reference.predictions == export.predictions, groups),
        "metric": {"name": "macro_f1", "reference": values[0], "export": values[1], "difference": difference},
    }


def _compare_texts(reference: RuntimeResult, export: RuntimeResult, metric: TextMetric) -> dict[str, Any]:
    one, other = reference.metric_parts, export.metric_parts
    return {
        "name": metric.name,
        "reference": bootstrap.ratio_interval(one),
        "export": bootstrap.ratio_interval(other),
        "difference": bootstrap.ratio_interval(np.concatenate([other, one], axis=1)),
    }


def _label_nll(scores: Scores, y: np.ndarray) -> np.ndarray:
    """The negative log-probability of each row's label in nats, beside 1 [rows, 2]."""
    log_p = log_probabilities(scores.probabilities)
    return np.stack([-log_p[np.arange(len(y)), y], np.ones(len(y))], axis=1)


def _perplexities(reference: RuntimeResult, export: RuntimeResult) -> dict[str, Any]:
    return {
        name: {key: float(np.exp(value)) for key, value in bootstrap.ratio_interval(result.nll).items()}
        for name, result in (("reference", reference), ("export", export))
    }


def _compare_nll(reference: np.ndarray, export: np.ndarray) -> dict[str, Any]:
    """The likelihood of a token, or of a label, from NLLs [rows, 2] beside how many each is of."""
    nlls = [bootstrap.ratio_interval(sums) for sums in (reference, export)]
    change = bootstrap.ratio_interval(np.concatenate([export, reference], axis=1))
    ends = {"value": "value", "low": "high", "high": "low"}  # more NLL is less probability
    return {
        "name": LIKELIHOOD,
        "reference": {key: float(np.exp(-nlls[0][of])) for key, of in ends.items()},
        "export": {key: float(np.exp(-nlls[1][of])) for key, of in ends.items()},
        "difference": {key: float(np.expm1(-change[of])) for key, of in ends.items()},
    }
