"""What a distillation was asked for, as frozen values, and the memory that they mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar

from common.models.batching import MAX_BATCH_TOKENS
from common.models.loading import is_on
from common.models.source import ModelSource
from common.training.settings import TrainSettings, has_cuda
from common.vram import model_shape
from common.vram.formulas import Training

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
OF_LOGITS = (*DIVERGENCES, "ce", "teacher_ce")
OF_HIDDEN = ("hidden_mse", "hidden_cosine")
TERMS = (*OF_LOGITS, *OF_HIDDEN, "attention_mse")
DEFAULT_WEIGHTS: Mapping[str, float] = MappingProxyType({"forward_kl": 0.5, "ce": 0.5})
ON_POLICY_WEIGHTS: Mapping[str, float] = MappingProxyType({"reverse_kl": 1.0})
CACHES = "teacher_cache"  # in the run folder, where an on-policy run is given no other
OF_DATASET = ("subset", "split", "text_column")
GOES_WITH: Mapping[str, tuple[str, ...]] = MappingProxyType({  # setting: those without any of which it decides nothing
    **dict.fromkeys(("rounds", "prompts_per_round", "num_samples", "max_new_tokens"), ("on_policy",)),
    **dict.fromkeys(("sample_temperature", "lmbda", "ignore_collapse"), ("on_policy",)),
    **dict.fromkeys(("cache_k", "cache_targets", "max_batch_tokens"), ("teacher_cache", "on_policy")),
    **dict.fromkeys(OF_DATASET, ("dataset",)),
    "load_teacher_in_4bit": ("teacher",),
    "jsd_beta": ("jsd",),
    "layer_map": (*OF_HIDDEN, "attention_mse"),
})  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DistillSettings(TrainSettings):
    """Of distill_train.py. The weight of a term that does not count is None or 0."""

    method: ClassVar[str] = "distill"

    teacher: str | None = None  # a folder or a Hub id
    load_teacher_in_4bit: str = "auto"
    teacher_cache: str | None = None  # folder that the teacher's distributions are written to and read from
    cache_targets: str = "topk"  # or "sampled": draws
    cache_k: int = 64  # tokens kept, or drawn, of each distribution
    max_batch_tokens: int = MAX_BATCH_TOKENS  # in a pass of the teacher that fills the cache, or of the writing student
    dataset: str | None = None  # of the Hub, or a folder, instead of `data`
    subset: str | None = None
    split: str = "train"
    text_column: str = "text"
    forward_kl: float | None = None
    reverse_kl: float | None = None
    jsd: float | None = None
    ce: float | None = None
    teacher_ce: float | None = None
    hidden_mse: float | None = None
    hidden_cosine: float | None = None
    attention_mse: float | None = None
    temperature: float = 1.0  # of the divergences
    jsd_beta: float = 0.5  # the teacher's share of the mixture
    layer_map: str = "last"  # layers compared: "last", "uniform" or pairs as in "1:2,3:6"
    labels: bool = False  # learn label probabilities that the rows carry
    on_policy: bool = False  # learn, in rounds, from answers that the student has written itself
    rounds: int = 4
    prompts_per_round: int | None = None  # None: so many that all rounds together go through the data once
    num_samples: int = 1  # answers to each prompt
    max_new_tokens: int = 256  # of an answer
    sample_temperature: float = 1.0  # at which the student writes
    lmbda: float = 1.0  # share of a round's prompts that the student answers; the others keep the data's completions
    ignore_collapse: bool = False  # go on though the student's answers have collapsed

    @property
    def weights(self) -> dict[str, float]:
        """The terms that count, by name."""
        return {name: weight for name in TERMS if (weight := getattr(self, name))}

    @property
    def data_name(self) -> str:
        """What a message calls the training rows."""
        return self.data or self.dataset

    @property
    def reads_teacher(self) -> bool:
        return self.teacher is not None

    @property
    def needs_completions(self) -> bool:
        """Whether the data has to hold answers, not prompts alone."""
        return not self.on_policy or self.lmbda < 1

    @property
    def keeps_own(self) -> bool:
        """Whether the token that a row goes on with is among those that the cache keeps: a student's own may be none of
        the teacher's likeliest, and has to hear of it."""
        return self.on_policy and self.lmbda > 0 and self.cache_targets == "topk"

    @property
    def teacher_source(self) -> ModelSource:
        """The teacher, as it is loaded."""
        return ModelSource(
            self.teacher, load_in_4bit=self.load_teacher_in_4bit, trust_remote_code=self.trust_remote_code
        )

    def plan(
        self, *, longest: int | None = None, completion_len: int | None = None, cuda: bool | None = None
    ) -> Training:
        """As `TrainSettings.plan`; labels are scored and trained as completions are."""
        cuda = has_cuda() if cuda is None else cuda
        plan = super().plan(longest=longest, completion_len=completion_len, cuda=cuda)
        if self.labels:
            return replace(plan, method=TrainSettings.method)
        of_layers = () if self.layer_map == "last" else OF_HIDDEN  # the last layer's states are there anyway
        weighed = (*OF_LOGITS, "attention_mse", *of_layers)
        live = self.teacher and not self.teacher_cache
        return replace(
            plan,
            terms=tuple(name for name in weighed if getattr(self, name)),
            teacher=model_shape.of(self.teacher, trust_remote_code=self.trust_remote_code) if live else None,
            teacher_four_bit=is_on(self.load_teacher_in_4bit, cuda),
        )

    def described_data(self, rows: int) -> dict[str, Any]:
        return super().described_data(rows) if self.data else {"path": self.dataset, "rows": rows}

    @classmethod
    def idle(cls, values: Mapping[str, Any]) -> frozenset[str]:
        """As `TrainSettings.idle`, with those of `GOES_WITH` that are alone."""
        alone = {name for name, others in GOES_WITH.items() if not any(values.get(other) for other in others)}
        return super().idle(values) | alone
