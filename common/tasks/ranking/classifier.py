"""A model that answers a label-ranking task: scorer and calibration together, used by infer, eval and serve alike.

Torch is imported only for a model that needs it: an ONNX export answers without.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.cli import UserError
from common.models import adapters
from common.models import loading as models
from common.models import onnx_runtime as onnx_model
from common.models.batching import MAX_BATCH_TOKENS
from common.models.flags import source_of
from common.models.source import ModelSource
from common.tasks.ranking.calibration import Calibration, batch_calibration
from common.tasks.ranking.onnx_ranker import OnnxRanker
from common.tasks.ranking.ranker import cached_prior
from common.tasks.ranking.task import LabelTask
from common.vram import preflight as vram

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from common.models.onnx_runtime import OnnxModel

CALIBRATION_FILE = "calibration.json"
DIGITS = 6  # of the numbers in an answer


class Classifier:
    """One model (adapter on its base, plain model or ONNX export) with its label ranker, prior and calibration."""

    def __init__(
        self,
        model_dir: str,
        task: LabelTask,
        *,
        base: str | None = None,
        load_in_4bit: str = "auto",
        dtype: str = "auto",
        max_batch_tokens: int = MAX_BATCH_TOKENS,
        num_null_prompts: int | None = None,
        trust_remote_code: bool = False,
        loaded: tuple[PreTrainedModel | PeftModel | OnnxModel, PreTrainedTokenizerBase] | None = None,
        model_hash: str | None = None,
        prior_dir: str | Path | None = None,
    ) -> None:
        """Loads the model, or takes a `loaded` one that others share and whose adapter is active at every call.

        Args:
            model_hash: `adapters.adapter_hash`, where it is known already.
            prior_dir: where the prior is cached; default: `model_dir`.
        """
        self.model_dir, self.task = model_dir, task
        if onnx_model.is_onnx(model_dir):
            if base or load_in_4bit == "on" or dtype != "auto":
                raise UserError(f"{model_dir} is an ONNX export; leave --base, --load_in_4bit and --dtype out")
            model, tokenizer = loaded or onnx_model.load(model_dir)
            self.ranker = OnnxRanker(model, tokenizer, task, max_batch_tokens)
        else:
            from common.tasks.ranking.torch_ranker import LabelRanker

            source = ModelSource(model_dir, base, load_in_4bit, dtype, trust_remote_code)
            model, tokenizer = loaded or models.load_for_inference(source)
            self.ranker = LabelRanker(model, tokenizer, task, max_batch_tokens)
        model_hash = model_hash or adapters.adapter_hash(model_dir)
        self.prior = cached_prior(self.ranker, prior_dir or model_dir, model_hash, num_null_prompts)

    @classmethod
    def from_flags(cls, args: argparse.Namespace, model_dir: str, task: LabelTask) -> Classifier:
        """The classifier that a command's scoring flags ask for (`cli.add_scoring_flags`).

        Raises:
            UserError: more null prompts than the task has; see `models.load_for_inference`.
        """
        if args.num_null_prompts and args.num_null_prompts > len(task.null_inputs):
            raise UserError(
                f"--num_null_prompts {args.num_null_prompts} is more than the {len(task.null_inputs)} null inputs of "
                f"{task.name}; give fewer, or leave the flag out"
            )
        source, max_batch_tokens = source_of(args, model_dir), args.max_batch_tokens
        if not onnx_model.is_onnx(model_dir):
            source, max_batch_tokens = vram.fit_inference(
                source, max_batch_tokens, auto_fit=args.auto_fit, generates=False
            )
        return cls(
            model_dir,
            task,
            base=source.base,
            load_in_4bit=source.load_in_4bit,
            dtype=source.dtype,
            max_batch_tokens=max_batch_tokens,
            num_null_prompts=args.num_null_prompts,
            trust_remote_code=source.trust_remote_code,
        )

    def raw_scores(self, texts: Sequence[str], **progress) -> np.ndarray:
        """See `LabelRanker.raw_scores`."""
        return self.ranker.raw_scores(texts, **progress)

    def calibration(
        self, method: str | None, raw: np.ndarray | None = None, label_bias: Mapping[str, float] | None = None
    ) -> Calibration:
        """The calibration of `--calibration`: None means fitted where the model folder has one, else prior.

        Args:
            raw: [n, K] scores of the rows to be labelled, which "batch" estimates from.

        Raises:
            UserError: "fitted" where nothing was fitted, "batch" without rows.
        """
        path = Path(self.model_dir) / CALIBRATION_FILE
        if method is None:
            method = "fitted" if path.is_file() else "prior"
        if method == "fitted":
            if not path.is_file():
                raise UserError(
                    f"{self.model_dir} has no fitted calibration; fit one with eval_creditmix.py --model_dir "
                    f"{self.model_dir} --fit_calibration data/{self.task.name}_dev.jsonl, or pass --calibration prior"
                )
            chosen = Calibration.load(path, self.task.labels)
        elif method == "batch":
            chosen = batch_calibration(np.empty((0, 0)) if raw is None else raw, self.task.labels)
        else:
            chosen = Calibration(self.task.labels, method, tuple(self.prior) if method == "prior" else ())
        return chosen.with_label_bias(label_bias or {})

    def answers(self, texts: Sequence[str], calibration: Calibration, raw: np.ndarray | None = None) -> list[dict]:
        """One answer per text, with the keys that infer and serve promise; numbers rounded for reading."""
        return self._answers(self.raw_scores(texts) if raw is None else raw, calibration)

    def answers_to(self, prompts: Sequence[list[int]], calibration: Calibration) -> list[dict]:
        """As `answers`, to prompts that are token ids already."""
        return self._answers(self.ranker.scores_of(prompts), calibration)

    def _answers(self, raw: np.ndarray, calibration: Calibration) -> list[dict]:
        result = calibration.apply(raw)

        def named(vector: Sequence[float]) -> dict[str, float]:
            return {label: round(float(value), DIGITS) for label, value in zip(self.task.labels, vector, strict=True)}

        return [
            {
                "model_name": self.model_dir,
                "prediction": self.task.labels[result.predictions[row]] if result.answered[row] else None,
                "scores": named(result.scores[row]),
                "raw_scores": named(raw[row]),
                "prior": named(calibration.prior),
                "probabilities": named(result.probabilities[row]),
                "top2_margin": round(float(result.top2_margin[row]), DIGITS),
            }
            for row in range(len(raw))
        ]
