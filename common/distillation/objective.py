"""Distillation from a teacher's distributions: what a step's loss is made of, with the teacher live or in a cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from common.cli import UserError
from common.distillation.settings import DIVERGENCES, OF_HIDDEN, OF_LOGITS, DistillSettings
from common.models import loading
from common.training import losses
from common.training.hidden_states import HiddenStateReader, predicted, scored


@dataclass(frozen=True)
class Objective:
    """What is minimised.

    Attributes:
        weights: by name of the term, those of TERMS that count.
        temperature: of the divergences.
        beta: of jsd.
    """

    weights: dict[str, float]
    temperature: float = 1.0
    beta: float = 0.5

    def __str__(self) -> str:
        """The formula, for a log."""
        terms = " + ".join(f"{weight:g} {name}" for name, weight in self.weights.items())
        extra = f", temperature {self.temperature:g}" if not self.weights.keys().isdisjoint(DIVERGENCES) else ""
        return terms + extra + (f", beta {self.beta:g}" if "jsd" in self.weights else "")

    def divergences(self, student: torch.Tensor, teacher: torch.Tensor) -> dict[str, torch.Tensor]:
        """The divergences that count, each [n], of log-probabilities [n, K] at the temperature."""
        makers = {
            "forward_kl": losses.forward_kl,
            "reverse_kl": losses.reverse_kl,
            "jsd": lambda *args: losses.jsd(*args, beta=self.beta),
        }
        return {name: make(student, teacher, self.temperature) for name, make in makers.items() if name in self.weights}

    def total(self, terms: dict[str, torch.Tensor]) -> torch.Tensor:
        """The weighted sum of the terms."""
        return sum(self.weights[name] * value for name, value in terms.items())


@dataclass(frozen=True)
class Signals:
    """What an objective learns from in both models.

    Attributes:
        pairs: layers that are compared, (student's, teacher's).
        vocabulary: ids that both have; divergences leave out what pads either LM head beyond.
        translated: the teacher's vocabulary is another, and its distributions are given in the student's.
    """

    objective: Objective
    pairs: Sequence[tuple[int, int]]
    vocabulary: int
    translated: bool = False

    @property
    def of_logits(self) -> list[str]:
        """The terms made from logits."""
        return [name for name in OF_LOGITS if name in self.objective.weights]

    @property
    def distributions(self) -> bool:
        """Whether the teacher's distributions are used, not only its hidden states or attention."""
        return not {"ce"}.issuperset(self.of_logits)

    @property
    def hidden(self) -> bool:
        """Whether hidden states are compared."""
        return not self.objective.weights.keys().isdisjoint(OF_HIDDEN)

    @property
    def attentions(self) -> bool:
        """Whether attention maps are compared."""
        return "attention_mse" in self.objective.weights


def layer_pairs(layer_map: str, student_layers: int, teacher_layers: int) -> list[tuple[int, int]]:
    """(student layer, teacher layer), from 1: "last", "uniform" (each of the student's at the same relative depth), or
    "1:2,3:6".

    Raises:
        UserError: not of that form, or a layer that a model does not have.
    """
    if layer_map == "last":
        return [(student_layers, teacher_layers)]
    if layer_map == "uniform":
        return [
            (layer, max(1, round(layer * teacher_layers / student_layers))) for layer in range(1, student_layers + 1)
        ]
    try:
        pairs = [tuple(int(part) for part in pair.split(":")) for pair in layer_map.split(",")]
        assert all(len(pair) == 2 for pair in pairs)
    except (ValueError, AssertionError) as error:
        raise UserError(f"--layer_map {layer_map} is not last, uniform or pairs such as 1:2,3:6") from error
    for ours, theirs in pairs:
        if not (1 <= ours <= student_layers and 1 <= theirs <= teacher_layers):
            raise UserError(
                f"--layer_map {layer_map}: the student has the layers 1 to {student_layers}, the teacher 1 to "
                f"{teacher_layers}"
            )
    return pairs


def load_teacher(settings: DistillSettings, signals: Signals) -> HiddenStateReader:
    """The teacher, ready to be read."""
    model, _ = loading.load_for_inference(settings.teacher_source)
    layers = [theirs for _, theirs in signals.pairs] if signals.hidden else []
    return HiddenStateReader(model.requires_grad_(False), layers)


class LiveTeacher:
    """A teacher that reads each batch along with the student."""

    def __init__(self, reader: HiddenStateReader, signals: Signals) -> None:
        self.reader, self.signals = reader, signals

    @torch.no_grad()
    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Of the tokens that predict completions "last" [n, width] and, where used, "hidden" [n, layers, width];
        "attentions"."""
        reading = self.reader.read(self.reader.model, batch, self.signals.attentions)
        learnt = {"last": scored(reading.last, batch), "attentions": reading.attentions}
        if self.signals.hidden:
            learnt["hidden"] = reading.hidden_at(batch, [theirs for _, theirs in self.signals.pairs])
        return learnt


class DistillationLoss:
    """The loss of a batch (see `common.training.trainer.Loss`): weighted terms, each a sum over tokens divided by the
    step's items."""

    def __init__(
        self,
        signals: Signals,
        student: HiddenStateReader,
        teacher: LiveTeacher | None,
        projections: torch.nn.ModuleList | None = None,
    ) -> None:
        """
        Args:
            teacher: None where batches carry what a cache holds of it.
            projections: of the student's hidden states to the teacher's width, one a pair; None: the widths agree.
        """
        self.signals, self.objective = signals, signals.objective
        self.student, self.teacher, self.projections = student, teacher, projections

    def __call__(
        self, model: Any, batch: dict[str, Any], num_items: torch.Tensor | int | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """(scalar loss, its terms); both 0 for a batch without completion tokens."""
        mask = predicted(batch)
        reading = self.student.read(model, batch, self.signals.attentions)
        teacher = batch.get("teacher") if self.teacher is None else self.teacher(batch)
        terms = {}
        if self.signals.of_logits:
            per_token = [scored(reading.last, batch), batch["labels"][:, 1:][mask]]
            if self.teacher is not None:
                per_token.append(teacher["last"])
            elif teacher is not None:
                per_token += [teacher[name] for name in ("ids", "rest", "logprobs") if name in teacher]
            sums = losses.summed_in_chunks(self._logit_terms, *per_token, width=self.student.head.weight.shape[0])
            terms = dict(zip(self.signals.of_logits, sums, strict=True))
        if self.signals.hidden:
            ours = reading.hidden_at(batch, [layer for layer, _ in self.signals.pairs])
            if self.projections is not None:
                ours = torch.stack([project(ours[:, i].float()) for i, project in enumerate(self.projections)], dim=1)
            for name in OF_HIDDEN:
                if name in self.objective.weights:
                    terms[name] = getattr(losses, name)(ours, teacher["hidden"]).mean(dim=1).sum()
        if self.signals.attentions:
            ours, theirs = reading.attentions, teacher["attentions"]
            maps = [(ours[i - 1], theirs[j - 1]) for i, j in self.signals.pairs] if ours and theirs else []
            queries = functional.pad(mask, (0, 1))
            terms["attention_mse"] = losses.attention_mse(maps, queries).sum()
        items = mask.sum().clamp(min=1) if num_items is None else num_items
        terms = {name: value / items for name, value in terms.items()}
        return self.objective.total(terms), terms

    def _logit_terms(self, hidden: torch.Tensor, gold: torch.Tensor, *teacher: torch.Tensor) -> torch.Tensor:
        """Sums over tokens of the terms made from logits, in the order of `Signals.of_logits`."""
        logits = self.student.logits(hidden)
        terms = {}
        if "ce" in self.objective.weights:
            terms["ce"] = functional.cross_entropy(logits.float(), gold, reduction="none")
        if self.signals.distributions:
            ours = losses.log_probs(logits[:, : self.signals.vocabulary], self.objective.temperature)
            terms |= self._teacher_terms(logits, ours, *teacher)
        return torch.stack([terms[name].sum() for name in self.signals.of_logits])

    def _teacher_terms(self, logits: torch.Tensor, ours: torch.Tensor, *teacher: torch.Tensor) -> dict:
        """The terms [n] that need the teacher: from its last hidden states, or from what a cache holds (see `pack`)."""
        temperature = self.objective.temperature
        if self.teacher is not None:
            with torch.no_grad():
                theirs = self.teacher.reader.logits(*teacher)[:, : self.signals.vocabulary]
                theirs = losses.log_probs(theirs, temperature)
            likeliest = theirs.argmax(dim=-1)
        elif len(teacher) == 2:  # draws and entropy
            return {"forward_kl": losses.sampled_forward_kl(ours, *teacher, temperature)}
        else:
            ids, rest, logprobs = teacher
            rest = rest.clamp(min=losses.TAIL_FLOOR).log()[:, None]
            theirs = torch.cat([logprobs, rest], dim=-1).log_softmax(dim=-1)
            ours, likeliest = losses.with_rest(ours, ids), ids[:, 0]
        terms = self.objective.divergences(ours, theirs)
        return terms | {"teacher_ce": functional.cross_entropy(logits.float(), likeliest, reduction="none")}


def projections(student_width: int, teacher_width: int, layers: int, seed: int) -> torch.nn.ModuleList:
    """Fresh linear maps from the student's hidden states to the teacher's (FitNets' regressor), one a layer."""
    torch.manual_seed(seed)
    return torch.nn.ModuleList(torch.nn.Linear(student_width, teacher_width, bias=False) for _ in range(layers))
