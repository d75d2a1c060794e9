"""The proof that an export still does what its model did: both measured on the same rows, each in its own runtime.

What is compared: the logits of some rows' last positions, the labels given or the probability of the right answers,
greedy text, and size, loading time and speed.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import log_softmax, logsumexp

from common.evaluation import bootstrap
from common.export.proof_rows import ProofRows, encode, longest
from common.export.proof_table import LIKELIHOOD
from common.export.text_metric import TextMetric
from common.files import sha256_file
from common.models import tokenizers
from common.models.batching import MAX_BATCH_TOKENS, by_token_budget
from common.models.torch_runtime import Runtime
from common.tasks.ranking import metrics
from common.tasks.ranking.calibration import Calibration, Scores
from common.tasks.ranking.decision import log_probabilities
from common.tasks.ranking.rankers import ranker_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOGIT_ROWS = 32  # whose logits are compared,
LOGIT_POSITIONS = 16  # at this many of their last positions: with a vocabulary of 150,000 that is 300 MB
GENERATED_PROMPTS, GENERATED_TOKENS = 20, 32
TIMED_PROMPTS, TIMED_TOKENS = 3, 64
SHOWN_CHANGES = 20  # answers that are other than before


@dataclass
class Speed:
    """What a runtime takes, as export.json has it.

    Attributes:
        bytes: of the model's files.
        seconds_to_load: them.
        tokens_per_s: of greedy text, one prompt at a time.
        rows_per_s: of label rows, in batches.
    """

    bytes: int
    seconds_to_load: float
    tokens_per_s: float = 0.0
    rows_per_s: float | None = None


@dataclass
class RuntimeResult:
    """What a runtime made of the rows of a proof.

    Attributes:
        logits: [positions, vocabulary].
        answers: greedy token ids, for the first prompts,
        texts: and as text.
        speed: what it took.
        scores: of label rows.
        nll: of text rows: the negative log-likelihood of each output in nats, and its tokens, [rows, 2].
        metric_parts: of text rows with a metric, [rows, 2] (see `TextMetric`).
    """

    logits: np.ndarray
    answers: list[list[int]]
    texts: list[str]
    speed: Speed
    scores: Scores | None = None
    nll: np.ndarray | None = None
    metric_parts: np.ndarray | None = None


class Measurement:
    """A runtime over the rows of a proof.

    Args:
        ends: the tokens that end an answer.
        speed: its size, and the time that it took to load; the rest is measured.
    """

    def __init__(
        self,
        runtime: Runtime,
        tokenizer: PreTrainedTokenizerBase,
        proof_rows: ProofRows,
        ends: Collection[int],
        speed: Speed,
    ) -> None:
        self.runtime, self.proof_rows, self.ends, self.speed = runtime, proof_rows, ends, speed
        self.tokenizer = tokenizer
        self.encoded = encode(tokenizer, proof_rows)
        self.prompts = [row.input_ids[: row.prompt_length] for row in self.encoded]

    def result(self) -> RuntimeResult:
        """All that is compared.

        Raises:
            UserError: a row does not fit the model's context.
        """
        logits, nll = self._likelihoods()
        answers = self._answers()
        texts = [tokenizers.decode(self.tokenizer, answer) for answer in answers]
        scores, metric = self.time(), self.proof_rows.text_metric
        parts = metric.parts(texts) if metric else None
        return RuntimeResult(logits, answers, texts, self.speed, scores, nll, parts)

    def time(self) -> Scores | None:
        """Measure the speed alone; of label rows their scores, which are what it takes."""
        timed = self.prompts[:TIMED_PROMPTS]
        started = time.perf_counter()
        for prompt in timed:
            self.runtime.generate([prompt], TIMED_TOKENS, ())
        self.speed.tokens_per_s = round(len(timed) * TIMED_TOKENS / (time.perf_counter() - started), 1)
        rows = self.proof_rows
        if rows.task is None:
            return None
        ranker = ranker_of(getattr(self.runtime, "model", self.runtime), self.tokenizer, rows.task)
        calibration = rows.calibration or Calibration(rows.task.labels, "prior", tuple(ranker.prior()))
        started = time.perf_counter()
        raw = ranker.raw_scores(rows.texts)
        self.speed.rows_per_s = round(len(rows.texts) / (time.perf_counter() - started), 1)
        return calibration.apply(raw)

    def _likelihoods(self) -> tuple[np.ndarray, np.ndarray | None]:
        """The logits that are compared, and of text rows the NLL of each output."""
        kept, nll = [], []
        labels = self.proof_rows.task is not None
        for index, row in enumerate(self.encoded[:LOGIT_ROWS] if labels else self.encoded):
            read, right = row.input_ids[:-1], row.input_ids[row.prompt_length :]
            logits = self.runtime.logits(read, min(len(read), max(len(right), LOGIT_POSITIONS)))
            if index < LOGIT_ROWS:
                kept.append(logits[-LOGIT_POSITIONS:])
            at_output = logits[-len(right) :]
            likelihoods = at_output[np.arange(len(right)), right] - logsumexp(at_output, axis=1)
            nll.append((-likelihoods.sum(), len(right)))
        return np.concatenate(kept), None if labels else np.array(nll)

    def _answers(self) -> list[list[int]]:
        """Greedy answers: whole ones where they are judged, else the beginning of some."""
        asked, most = self.prompts, _whole_answer(self.encoded)
        if self.proof_rows.text_metric is None:
            asked, most = asked[:GENERATED_PROMPTS], GENERATED_TOKENS
        answers: list[list[int]] = [[] for _ in asked]
        for batch in by_token_budget(list(map(len, asked)), MAX_BATCH_TOKENS, added=most):
            written = self.runtime.generate([asked[row] for row in batch], most, self.ends)
            for row, answer in zip(batch, written, strict=True):
                answers[row] = answer
        return answers


def context(tokenizer: PreTrainedTokenizerBase, proof_rows: ProofRows) -> int:
    """Tokens that a runtime needs room for: of the longest row, and of the longest prompt with what may follow."""
    encoded = encode(tokenizer, proof_rows)
    prompt = max(row.prompt_length for row in encoded)
    return max(longest(tokenizer, proof_rows) + TIMED_TOKENS, prompt + _whole_answer(encoded))


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
    return proof | {"speed": {"reference": asdict(reference.speed), "export": asdict(export.speed)}}


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
