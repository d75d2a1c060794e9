"""A model that answers a label-ranking task: scorer and calibration together, used by infer, eval and serve alike.

Torch is imported only for a model that needs it: an ONNX export answers without.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from common.cli import UserError
from common.models import adapters, onnx_runtime
from common.models.source import LoadedModel, ModelSource
from common.tasks.ranking.calibration import Calibration, batch_calibration, default_method
from common.tasks.ranking.loading import trained_on
from common.tasks.ranking.ranker import Ranker, cached_prior
from common.tasks.ranking.rankers import ranker_of
from common.tasks.ranking.settings import DEFAULT, ScoringSettings
from common.tasks.ranking.task import LabelTask, warned
from common.vram.preflight import load_within_memory

CALIBRATION = "calibration"  # what a model's folder keeps of a task, by `LabelTask.file_in`
DIGITS = 6  # of the numbers in an answer


class Classifier:
    """A model's label ranker with its prior and calibration.

    Attributes:
        model_dir: the model's folder, which may hold a fitted calibration.
        task: what is asked.
        ranker: gives the raw scores.
        prior: [labels] what the model gives each label before it sees a row, in nats; asked of it when it is wanted.
    """

    def __init__(self, model_dir: str, task: LabelTask, ranker: Ranker, prior: Callable[[], np.ndarray]) -> None:
        self.model_dir, self.task, self.ranker, self._ask_prior = model_dir, task, ranker, prior

    @cached_property
    def prior(self) -> np.ndarray:
        """See the class."""
        return self._ask_prior()

    @classmethod
    def load(cls, source: ModelSource, task: LabelTask, settings: ScoringSettings = DEFAULT) -> Classifier:
        """The classifier on a model that is loaded for it: adapter on its base, plain model, ONNX export or GGUF.

        Raises:
            UserError: more null prompts than the task has, settings that an export does not take, memory that is too
                short; see also `loading.load_for_inference`.
        """
        if (settings.num_null_prompts or 0) > len(task.null_inputs):
            raise UserError(
                f"--num_null_prompts {settings.num_null_prompts} is more than the {len(task.null_inputs)} null inputs "
                f"of {task.name}; give fewer, or leave the flag out"
            )
        max_batch_tokens = settings.max_batch_tokens
        if onnx_runtime.is_onnx(source.model_dir):
            if source.base or source.load_in_4bit == "on" or source.dtype != "auto":
                raise UserError(f"{source.model_dir} is an ONNX export; leave --base, --load_in_4bit and --dtype out")
            loaded = LoadedModel(*onnx_runtime.load(source.model_dir), max_batch_tokens)
        else:
            loaded = load_within_memory(source, max_batch_tokens, auto_fit=settings.auto_fit, generates=False)
        return cls.on(loaded, source.model_dir, task, num_null_prompts=settings.num_null_prompts)

    @classmethod
    def on(
        cls,
        loaded: LoadedModel,
        model_dir: str,
        task: LabelTask,
        *,
        num_null_prompts: int | None = None,
        model_hash: str | None = None,
        prior_dir: str | Path | None = None,
    ) -> Classifier:
        """The classifier on a model that is loaded already; others may use it too if its adapter is active when asked.

        Args:
            model_hash: `adapters.adapter_hash`, where it is known already.
            prior_dir: where the prior is cached; default: `model_dir`.
        """
        ranker = ranker_of(loaded.model, loaded.tokenizer, task, loaded.max_batch_tokens)

        def prior() -> np.ndarray:
            key = model_hash or adapters.adapter_hash(model_dir)
            return cached_prior(ranker, prior_dir or model_dir, key, num_null_prompts)

        return cls(model_dir, task, ranker, prior)

    def raw_scores(self, texts: Sequence[str]) -> np.ndarray:
        """See `Ranker.raw_scores`."""
        return self.ranker.raw_scores(texts)

    @property
    def default_method(self) -> str:
        """See `calibration.default_method`."""
        return default_method(trained_on(self.task, self.model_dir))

    def calibration(
        self, method: str | None, raw: np.ndarray | None = None, label_bias: Mapping[str, float] | None = None
    ) -> Calibration:
        """The calibration of `--calibration`: None means fitted where the model folder has one, else the default.

        Args:
            raw: [n, K] scores of the rows to be labelled, which "batch" estimates from.

        Raises:
            UserError: "fitted" where nothing was fitted, "batch" without rows.
        """
        path = self.task.kept_file(self.model_dir, CALIBRATION)
        if method is None:
            method = "fitted" if path.is_file() else self.default_method
        if method == "fitted":
            if not path.is_file():
                raise UserError(
                    f"{self.model_dir} has no fitted calibration; fit one with eval_creditmix.py --model_dir "
                    f"{self.model_dir} --fit_calibration data/{self.task.name}_dev.jsonl, or leave --calibration out"
                )
            chosen = Calibration.load(path, self.task.labels)
        elif method == "batch":
            chosen = batch_calibration(np.empty((0, 0)) if raw is None else raw, self.task.labels)
        else:
            chosen = Calibration(self.task.labels, method, tuple(self.prior) if method == "prior" else ())
        return chosen.with_label_bias(label_bias or {})

    def answers(self, texts: Sequence[str], calibration: Calibration, raw: np.ndarray | None = None) -> list[dict]:
        """One answer per text, with the keys that infer and serve promise; numbers rounded for reading.

        The answer to a text that is not of the task has a "warning" (see `LabelTask.warning`).
        """
        answers = self.answers_of(self.raw_scores(texts) if raw is None else raw, calibration)
        return [warned(self.task, text, answer) for text, answer in zip(texts, answers, strict=True)]

    def answers_of(self, raw: np.ndarray, calibration: Calibration) -> list[dict]:
        """As `answers`, of raw scores [rows, labels] alone, without a warning."""
        result = calibration.apply(raw)

        def named(vector: Sequence[float]) -> dict[str, float]:
            return {label: round(float(value), DIGITS) for label, value in zip(self.task.labels, vector, strict=True)}

        chosen = [self.task.labels[label] for label in result.predictions]
        return [
            {
                "model_name": self.model_dir,
                "prediction": chosen[row] if result.answered[row] else None,
                **({} if result.answered[row] else {"leaning": chosen[row]}),
                "scores": named(result.scores[row]),
                "raw_scores": named(raw[row]),
                "prior": named(calibration.prior),
                "probabilities": named(result.probabilities[row]),
                "top2_margin": round(float(result.top2_margin[row]), DIGITS),
            }
            for row in range(len(raw))
        ]
