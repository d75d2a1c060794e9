"""From settings to a Trainer: the student under its adapter, a batch that fits, a loss of our own.

SFT, KD and distillation train with transformers' Trainer and losses of our own rather than TRL's SFTTrainer: TRL's
fused head scores every position, its collator and preparation would all be replaced, and nothing of it would be left.
DPO uses TRL (`common.training.dpo`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from common import distributed as launch
from common.cli import UserError, log
from common.files import grant
from common.models import adapters, batching, loading
from common.training import checkpoints, quantization_aware
from common.training.batches import IGNORE, LengthGroupedOrder
from common.training.checkpoints import CHECKPOINTS, EXTRA, EXTRA_FILE
from common.training.resumption import ResumesExactly
from common.training.schedule import WarmFromTheStart
from common.training.settings import TrainSettings

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments

Settings = TypeVar("Settings", bound=TrainSettings)
# (model, batch, items of the whole optimizer step) -> (scalar loss, its terms before weighting, by name)
Loss = Callable[[Any, dict[str, Any], Any], tuple[Any, dict[str, Any]]]


@dataclass(frozen=True)
class TrainingRows:
    """What is trained on, and what is made of it.

    Attributes:
        rows: encoded rows of any kind that `collate` takes.
        lengths: tokens of each row.
        collate: rows to a batch; its `labels` hold the items that a step's loss is averaged over, else IGNORE.
        loss: see `Loss`; its terms are logged beside the loss, each a mean over the steps since the last log.
        eval_rows: judged after every epoch; none: no evaluation.
        eval_loss: judges `eval_rows`; None: `loss`.
    """

    rows: Sequence[Any]
    lengths: Sequence[int]
    collate: Callable[[Sequence[Any]], dict[str, Any]]
    loss: Loss
    eval_rows: Sequence[Any] = ()
    eval_loss: Loss | None = None

    @property
    def longest(self) -> int:
        """Index of the longest row."""
        return max(range(len(self.rows)), key=self.lengths.__getitem__)


def limit_length(settings: Settings, *others: str) -> Settings:
    """The settings with max_len within the context of the student (and of `others` that read along), and say so."""
    for name in (settings.student, *others):
        limit = batching.context_of(loading.load_config(name, settings.trust_remote_code))
        if settings.max_len <= limit:
            continue
        log(f"--max_len {settings.max_len} is more than the context of {name}; using {limit}")
        settings = replace(settings, max_len=limit)
    return settings


def prepare_student(settings: TrainSettings, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The student ready to train: its base frozen under the adapter, or, with --lora_r 0, all of it free."""
    loading.warn_if_offload_is_for_inference()
    base = loading.load_base(settings.source, training=True)
    loading.align_model(base, tokenizer)
    if settings.full:
        kind = settings.quantization_aware
        return quantization_aware.prepare(base, kind) if kind else base
    base.requires_grad_(False)
    if settings.init_adapter:
        student = adapters.load_adapter(base, settings.init_adapter, trainable=True)
    else:
        student = adapters.add_lora(
            base, r=settings.lora_r, alpha=settings.lora_alpha, dropout=settings.lora_dropout, seed=settings.seed
        )
    student.enable_input_require_grads()
    if base.device.type == "cpu" and loading.is_large(base.config):
        from common.models import lora_training, norm_training
        from common.training import prefix_tree

        lora_training.install(student)
        norm_training.install(student)
        prefix_tree.install(student.get_base_model())
    return student


def fit_batch_size(settings: TrainSettings, longest: int, try_batch: Callable[[int], None]) -> tuple[int, int]:
    """(per-device batch, accumulation steps) from the settings, else the largest real batch that fits.

    Args:
        longest: tokens of the longest row, of a preference with both answers.
        try_batch: runs forward and backward on that many copies of the longest row (only called on CUDA).
    """
    import torch

    world = launch.world_size()
    per_device, accumulation = settings.per_device_train_batch_size, settings.gradient_accumulation_steps
    if per_device is None:
        if launch.fsdp():
            per_device = 1  # nothing is sharded yet, so nothing can be tried
        elif torch.cuda.is_available():
            per_device = batching.first_batch(accumulation, world)
            while per_device > 1:
                try:
                    try_batch(per_device)
                    break
                except torch.OutOfMemoryError:
                    per_device //= 2
                torch.cuda.empty_cache()
        else:
            per_device = batching.first_cpu_batch(longest, accumulation, world)
    return per_device, accumulation or batching.accumulation_of(per_device, world)


def try_step(settings: TrainSettings, student: Any, loss: Callable[[], torch.Tensor]) -> None:
    """A forward and a backward pass as the trainer will do them on a card: checkpointed, in mixed precision."""
    import torch

    if settings.gradient_checkpointing != "off":
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    student.train()
    with torch.autocast(student.device.type, torch.bfloat16):
        value = loss()
    value.backward()
    student.zero_grad(set_to_none=True)


def freeze_unreached(student: Any, loss: Callable[[], torch.Tensor]) -> None:
    """Take out of training what a loss does not depend on, as layers above the last that it compares.

    They would not change anyway, but processes that train together would wait for their gradients in vain.
    """
    import torch

    with torch.autocast(student.device.type, torch.bfloat16):
        value = loss()
    value.backward()
    for parameter in student.parameters():
        parameter.requires_grad_(parameter.grad is not None)
    student.zero_grad(set_to_none=True)


def check_report_to(report_to: str) -> None:
    """Refuse a tracker that transformers does not know or that is not installed, with transformers' own words."""
    from transformers.integrations import get_reporting_integration_callbacks

    try:
        for callback in get_reporting_integration_callbacks(report_to):
            callback()
    except (ValueError, RuntimeError) as error:
        raise UserError(f"--report_to {report_to}: {' '.join(str(error).split())}") from error


def training_arguments(settings: TrainSettings, per_device: int, accumulation: int) -> dict[str, Any]:
    """Keyword arguments that TrainingArguments and DPOConfig share."""
    import torch

    check_report_to(settings.report_to)
    cuda = torch.cuda.is_available()
    checkpointing = loading.is_on(settings.gradient_checkpointing, cuda)
    return {
        "output_dir": str(Path(settings.save_dir, CHECKPOINTS)),
        "per_device_train_batch_size": per_device,
        "per_device_eval_batch_size": per_device,
        "gradient_accumulation_steps": accumulation,
        "num_train_epochs": settings.epochs,
        "max_steps": settings.max_steps,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.lr_scheduler_type,
        "warmup_steps": settings.warmup_steps,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "gradient_checkpointing": checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if checkpointing else None,
        "bf16": cuda,
        "use_cpu": not cuda,
        "eval_strategy": "epoch" if settings.eval_data else "no",
        "save_strategy": "steps",
        "save_steps": settings.save_steps,
        "save_total_limit": 2,
        "logging_steps": settings.logging_steps,
        "logging_nan_inf_filter": False,  # it would hide that the loss became NaN
        "report_to": settings.report_to,
        "seed": settings.seed,
        "remove_unused_columns": False,
        "dataloader_pin_memory": cuda,
        "ddp_find_unused_parameters": False,
        "disable_tqdm": True,  # `progress.bar_callback` instead
    }


def row_order(arguments: TrainingArguments, lengths: Sequence[int]) -> LengthGroupedOrder:
    """The sampler of a training."""
    rows_per_step = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    return LengthGroupedOrder(lengths, rows_per_step, arguments.seed)


def loss_trainer(
    data: TrainingRows, student: Any, tokenizer: PreTrainedTokenizerBase, arguments: TrainingArguments
) -> Trainer:
    """A transformers Trainer on encoded rows with batches of similar length and a loss of its own."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import Trainer

    class LossTrainer(checkpoints.StudentSaver, ResumesExactly, WarmFromTheStart, Trainer):
        terms, logged_at = None, 0  # sums since the step of the last log
        eval_loss_is = "per_token"  # before 0.2.0 a mean of its batches' means

        def _get_train_sampler(self, train_dataset=None):
            return row_order(self.args, data.lengths)

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            value, terms = data.loss(model, inputs, num_items_in_batch)
            if self.terms is None:
                self.terms, self.logged_at = dict.fromkeys(terms, 0), self.state.global_step
            self.terms = {name: self.terms[name] + term.detach() for name, term in terms.items()}
            if num_items_in_batch is not None and self.args.average_tokens_across_devices:
                value = value * self.accelerator.num_processes  # DDP averages over processes what is already averaged
            return value

        def log(self, logs, *args, **kwargs):
            if "loss" in logs and self.terms:
                steps = max(1, self.state.global_step - self.logged_at)
                values = self.accelerator.reduce(self.terms, "sum")
                logs |= {name: float(f"{float(value) / steps:.6g}") for name, value in values.items()}
                self.terms = None
            super().log(logs, *args, **kwargs)

        def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
            """(None, sum of the loss, its items), each spread over the rows of the batch: see `mean_of_items`."""
            inputs = self._prepare_inputs(inputs)
            with torch.no_grad():
                total, _ = (data.eval_loss or data.loss)(model, inputs, 1)
            rows, items = len(inputs["labels"]), (inputs["labels"] != IGNORE).sum()
            return None, (total / rows).repeat(rows), (items / rows).repeat(rows)

        def save_model(self, output_dir=None, _internal_call=False):
            super().save_model(output_dir, _internal_call)
            extra = getattr(self.accelerator.unwrap_model(self.model), EXTRA, None)
            if extra and self.args.should_save:
                save_file(extra.state_dict(), Path(output_dir) / EXTRA_FILE)
                grant(Path(output_dir) / EXTRA_FILE)

        def _load_from_checkpoint(self, checkpoint, model=None):
            super()._load_from_checkpoint(checkpoint, model)
            if extra := getattr(self.model, EXTRA, None):
                extra.load_state_dict(load_file(Path(checkpoint) / EXTRA_FILE))

    trainer = LossTrainer(
        model=student,
        args=arguments,
        train_dataset=list(data.rows),
        eval_dataset=list(data.eval_rows) or None,
        data_collator=data.collate,
        processing_class=tokenizer,
        compute_metrics=mean_of_items,
    )
    trainer.model_accepts_loss_kwargs = True  # whatever the model's own loss takes: ours takes the items of a step
    return trainer


def mean_of_items(judged: Any) -> dict[str, float]:
    """The loss of rows that are judged, whatever their batches: their sum over their items."""
    return {"loss": float(judged.predictions.sum(dtype="float64") / max(judged.label_ids.sum(dtype="float64"), 1))}


def fitted_trainer(
    settings: TrainSettings, student: Any, tokenizer: PreTrainedTokenizerBase, data: TrainingRows
) -> Trainer:
    """`loss_trainer` as the settings say, in the largest real batch that fits."""
    from accelerate.utils import send_to_device
    from transformers import TrainingArguments

    def try_batch(size: int) -> None:
        batch = send_to_device(data.collate([data.rows[data.longest]] * size), student.device)
        try_step(settings, student, lambda: data.loss(student, batch, None)[0])

    per_device, accumulation = fit_batch_size(settings, data.lengths[data.longest], try_batch)
    arguments = launch.one_card(TrainingArguments(**training_arguments(settings, per_device, accumulation)))
    return loss_trainer(data, student, tokenizer, arguments)
