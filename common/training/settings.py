"""What a training was asked for, as frozen values: one field for each flag, and the memory that they mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from common import distributed as launch
from common import run_record
from common.files import sha256_file
from common.models.batching import accumulation_of
from common.models.source import ModelSource
from common.vram import model_shape
from common.vram.formulas import Plan, Training
from common.vram.plans import training_plan

LORA = {"lora_r": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"}  # flag: what PEFT calls it


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Settings that every trainer has; names and defaults are the flags', and `asdict` is what run.json keeps.

    Switches of three values are "on", "off" or "auto", which means on where there is a CUDA device.
    """

    method: ClassVar[str] = "sft"

    student: str  # base model: a folder or a Hub id
    save_dir: str  # run folder
    data: str | None = None  # file of the training rows
    eval_data: str | None = None  # file of the rows that are judged after every epoch
    task: str | None = None  # label set of the rows: a YAML file, or "creditmix"; None: as they show
    config: str | None = None  # YAML file that some of these settings come from
    resume: bool = False  # go on from the newest complete checkpoint
    dry_run: bool = False  # show what would be trained on, and load no weights; student and save_dir may be None then
    overwrite: bool = False  # replace the run that save_dir holds
    with_changes: bool = False  # with resume: go on though data, base or settings have changed
    init_adapter: str | None = None  # run folder of the adapter to start from; None: a fresh one
    skip_bad_rows: bool = False  # leave bad rows out, and count them
    idp_mode: bool = False  # structured output: a row that is too long is left out, never cut
    max_len: int = 1024  # tokens a row, prompt and completion
    report_to: str = "none"  # a tracker that transformers knows
    epochs: float = 3.0
    max_steps: int = -1  # optimizer steps; -1: as `epochs` says
    learning_rate: float = 2e-4
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.03  # optimizer steps, or a share of all where it is below 1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    per_device_train_batch_size: int | None = None  # rows (DPO: pairs) in one pass; None: what fits
    gradient_accumulation_steps: int | None = None  # passes an optimizer step; None: to reach EFFECTIVE_BATCH rows
    gradient_checkpointing: str = "auto"
    save_steps: int = 500  # optimizer steps between checkpoints
    save_minutes: float = 10.0  # between checkpoints, whichever comes first; 0: by steps alone
    logging_steps: int = 10
    seed: int = 0
    lora_r: int = 16  # rank of the adapter; 0: all weights are trained
    lora_alpha: int = 32
    lora_dropout: float = 0.05
    load_in_4bit: str = "auto"
    quantization_aware: str | None = None  # with lora_r 0: "int8" or "int4", whose rounding is simulated
    trust_remote_code: bool = False
    auto_fit: bool = False  # where memory is short, change settings instead of refusing

    @property
    def full(self) -> bool:
        """Whether all weights are trained, without an adapter."""
        return self.lora_r == 0

    @property
    def reads_teacher(self) -> bool:
        """Whether a teacher's distributions, hidden states or attention are learnt from."""
        return False

    @property
    def source(self) -> ModelSource:
        """The student, as it is loaded for training: all weights, where they are trained, in float32, since small
        updates are lost in bfloat16 ones."""
        return ModelSource(
            self.student,
            load_in_4bit="off" if self.full else self.load_in_4bit,
            dtype="float32" if self.full else "auto",
            trust_remote_code=self.trust_remote_code,
        )

    def plan(
        self, *, longest: int | None = None, completion_len: int | None = None, cuda: bool | None = None
    ) -> Training:
        """What these settings mean for memory.

        Args:
            longest, completion_len: tokens of the longest row and of the longest completion, where they are known.
            cuda: whether it trains on a card; None: as this machine would.

        Raises:
            UnknownShape: the student's memory cannot be predicted.
        """
        cuda = has_cuda() if cuda is None else cuda
        student = model_shape.of(self.student, trust_remote_code=self.trust_remote_code)
        return training_plan(
            student,
            cuda=cuda,
            lora_r=self.lora_r,
            max_len=min(longest or self.max_len, self.max_len),
            batch=self.per_device_train_batch_size,
            accumulation=self.gradient_accumulation_steps,
            world=launch.world_size(),
            load_in_4bit=self.load_in_4bit,
            gradient_checkpointing=self.gradient_checkpointing,
            method=self.method,
            completion_len=completion_len,
            lora_dropout=self.lora_dropout,
            rounds=self.quantization_aware is not None,
            reference=self.method == DpoSettings.method and self.init_adapter is not None,
        )

    def memory_flags(self, batch: int) -> Mapping[str, Callable[[Plan], Any]]:
        """The flags that decide the memory, each as a function of a plan (see `common.vram.preflight.Flags`).

        Args:
            batch: rows in one pass of the plan as it is; of smaller ones more are accumulated, so that a step keeps the
                rows that it was asked to have.
        """
        flags: dict[str, Callable[[Any], Any]] = {"per_device_train_batch_size": lambda plan: plan.batch}
        if self.per_device_train_batch_size or self.gradient_accumulation_steps:
            accumulation = self.gradient_accumulation_steps or accumulation_of(batch, launch.world_size())
            flags["gradient_accumulation_steps"] = lambda plan: accumulation * -(-batch // plan.batch)
        return flags | {
            "gradient_checkpointing": lambda plan: "on" if plan.checkpointing else "off",
            "teacher_cache": lambda plan: None if plan.teacher else str(Path(self.save_dir or "runs", "teacher_cache")),
            "max_len": lambda plan: plan.max_len,
            "load_in_4bit": lambda plan: "on" if plan.four_bit else "off",
        }

    def described_data(self, rows: int) -> dict[str, Any]:
        """Provenance of the training data, of which so many rows are used, and of those that choose the best epoch."""
        held_out = {"eval_sha256": sha256_file(self.eval_data)} if self.eval_data else {}
        return run_record.describe_data(self.data, rows) | held_out

    def as_dict(self) -> dict[str, Any]:
        """{flag: value}, for run.json."""
        return asdict(self)

    @classmethod
    def idle(cls, values: Mapping[str, Any]) -> frozenset[str]:
        """Names of the settings that decide nothing beside the others, whatever they say: with an adapter that is
        started from, which goes on with its own, those of a fresh one.

        Args:
            values: all of them by name.
        """
        return frozenset(LORA if values.get("init_adapter") else ())

    def deciding(self, before: Any = None) -> dict[str, Any]:
        """{flag: value} of those that are not idle, for a run that goes on to be compared by.

        Args:
            before: the settings of the run as it was, if it has any: what is idle now, and was not, counts.
        """
        values = self.as_dict()
        earlier = values | before if isinstance(before, dict) else values
        idle = self.idle(values) & self.idle(earlier)
        return {name: value for name, value in values.items() if name not in idle}


@dataclass(frozen=True, kw_only=True)
class KdSettings(TrainSettings):
    """Of kd_train.py."""

    method: ClassVar[str] = "kd"


@dataclass(frozen=True, kw_only=True)
class DpoSettings(TrainSettings):
    """Of dpo_train.py."""

    method: ClassVar[str] = "dpo"

    learning_rate: float = 5e-5
    lora_dropout: float = 0.0  # the reference has none, so dropout would be noise between the two
    beta: float = 0.1  # strength of the pull towards the reference

    @classmethod
    def idle(cls, values: Mapping[str, Any]) -> frozenset[str]:
        """As `TrainSettings.idle`, but for a dropout of 0, which switches the adapter's off."""
        return super().idle(values) - ({"lora_dropout"} if values.get("lora_dropout") == 0 else set())


def has_cuda() -> bool:
    """Whether this machine has a CUDA device."""
    import torch

    return torch.cuda.is_available()
