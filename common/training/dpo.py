"""Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290) by TRL's DPOTrainer, on rows encoded here.

The reference is the base with the adapter off, or the starting adapter as it was. Its log-probabilities are computed
once, before the first step, so training all weights needs no copy of them.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from common import distributed as launch
from common.cli import UserError
from common.data import shapes, training_files
from common.models import chats, tokenizers
from common.models.batching import REFERENCE_TOKENS
from common.training import checkpoints, run
from common.training.batches import collate, encode_rows
from common.training.resumption import ResumesExactly
from common.training.schedule import WarmFromTheStart
from common.training.settings import DpoSettings
from common.training.trainer import (
    fit_batch_size,
    limit_length,
    prepare_student,
    row_order,
    training_arguments,
    try_step,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer


@dataclass(frozen=True)
class EncodedPair:
    """Token ids of a prompt and of two answers to it, of which the chosen one is the better."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]

    @property
    def answer_length(self) -> int:
        """Tokens of the longer answer."""
        return max(len(self.chosen_ids), len(self.rejected_ids))

    def __len__(self) -> int:
        """Tokens of the prompt with the longer answer."""
        return len(self.prompt_ids) + self.answer_length


def train(settings: DpoSettings, argv: Sequence[str] | None, task_of: run.TaskOf | None = None) -> None:
    """A whole run: pairs -> adapter in the run folder.

    Args:
        argv: the command's words, for the record; None: those of this process.
        task_of: see `run.start`.
    """
    rows = training_files.read(settings.data, shapes.DPO, settings.skip_bad_rows)
    held_out = []
    if settings.eval_data:
        held_out = training_files.read(settings.eval_data, shapes.DPO, settings.skip_bad_rows)
    record = run.start(settings, rows, argv, task_of)
    with run.recorded_failure(record):
        tokenizer = tokenizers.load_tokenizer(settings.student, trust_remote_code=settings.trust_remote_code)
        settings = limit_length(settings)
        pairs = encode_pairs(tokenizer, settings.data, rows, settings.max_len, whole=settings.idp_mode)
        longest, answer = max(map(len, pairs)), max(pair.answer_length for pair in pairs)
        if record:
            record.write(tokens=sum(map(len, pairs)))
        fitted = run.within_memory(settings, record, longest, answer)
        if fitted.max_len != settings.max_len:
            pairs = encode_pairs(tokenizer, fitted.data, rows, fitted.max_len, whole=fitted.idp_mode)
        if record:
            texts = (2 * len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids) for pair in pairs)
            record.write(train_tokens=sum(texts))
        student = prepare_student(fitted, tokenizer)
        eval_pairs = []
        if held_out:
            eval_pairs = encode_pairs(tokenizer, fitted.eval_data, held_out, fitted.max_len, whole=fitted.idp_mode)
        run.train_and_save(build_trainer(fitted, student, tokenizer, pairs, eval_pairs), fitted, record)


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase, path: str, rows: Sequence[dict], max_len: int, *, whole: bool
) -> list[EncodedPair]:
    """The rows that fit `max_len`; see `encode_rows`, and of answers of which one thinks `chats.thinking_alike`.

    Raises:
        UserError: none does.
    """
    answers = [chats.thinking_alike(tokenizer, row["chosen"], row["rejected"]) for row in rows]
    sides = [
        encode_rows(tokenizer, path, [(row["prompt"], both[side]) for row, both in zip(rows, answers, strict=True)],
                    max_len, whole)
        for side in (0, 1)
    ]  # fmt: skip
    pairs = []
    for chosen, rejected in zip(*sides, strict=True):
        if chosen is None or rejected is None:
            continue
        # Both answers must follow the same prompt: take the one that was cut more.
        shorter = min(chosen, rejected, key=lambda row: row.prompt_length)
        pairs.append(
            EncodedPair(
                shorter.input_ids[: shorter.prompt_length],
                chosen.input_ids[chosen.prompt_length :],
                rejected.input_ids[rejected.prompt_length :],
            )
        )
    if not pairs:
        raise UserError(f"{path}: no pair fits --max_len {max_len}; raise it")
    return pairs


def build_trainer(
    settings: DpoSettings,
    student: Any,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[EncodedPair],
    eval_pairs: Sequence[EncodedPair] = (),
) -> Trainer:
    """TRL's DPOTrainer on pairs that are encoded already, with reference log-probabilities computed once.

    Raises:
        UserError: the adapter that is started from is on the LM head, too, which TRL multiplies by itself.
    """
    import torch
    from datasets import Dataset
    from peft.tuners.tuners_utils import BaseTunerLayer
    from torch.utils.data import DataLoader
    from trl import DPOConfig, DPOTrainer

    from common.training import prefix_tree

    if isinstance(student.get_output_embeddings(), BaseTunerLayer):
        raise UserError(
            f"the adapter {settings.init_adapter} is on the LM head, too, which DPO cannot train; give another"
        )
    lengths = list(map(len, pairs))

    class PairTrainer(checkpoints.StudentSaver, ResumesExactly, WarmFromTheStart, DPOTrainer):
        def _prepare_dataset(self, dataset, *_):
            return dataset  # encoded by common.models.tokenizers, as every other script does

        def _precompute_ref_logps(self, dataset, name, batch_size):
            """As TRL's, without its cache file (whose name differs from process to process) and without dropout."""
            base = self.model if settings.full else self.model.get_base_model()
            if prefix_tree.understood_by(base) and name == "train":
                score_trees(base)
            loader = DataLoader(dataset, batch_size=batch_size, collate_fn=self.data_collator)
            self.model.eval()
            batches = [
                self.accelerator.gather_for_metrics(self.compute_ref_log_probs(self.model, batch))
                for batch in self.accelerator.prepare(loader)
            ]
            chosen, rejected = (torch.cat(parts).tolist() for parts in zip(*batches, strict=True))
            return dataset.add_column("ref_chosen_logps", chosen).add_column("ref_rejected_logps", rejected)

        def _get_train_sampler(self, train_dataset=None):
            return row_order(self.args, lengths)

    per_device, accumulation = fit_batch_size(
        settings, 2 * max(lengths), lambda size: try_pairs(settings, student, max(pairs, key=len), size, tokenizer)
    )
    config = DPOConfig(
        **training_arguments(settings, per_device, accumulation),
        beta=settings.beta,
        max_length=None,
        disable_dropout=settings.lora_dropout == 0,
        precompute_ref_log_probs=True,
        # without gradients more fit at once, up to where their logits would weigh more than a training step
        precompute_ref_batch_size=max(per_device, REFERENCE_TOKENS // (2 * max(lengths))),
    )
    trainer = PairTrainer(
        model=student,
        args=launch.one_card(config),
        train_dataset=Dataset.from_list(list(map(vars, pairs))),
        eval_dataset=Dataset.from_list(list(map(vars, eval_pairs))) if eval_pairs else None,
        processing_class=tokenizer,
    )
    if not settings.full and not settings.init_adapter and "ref" in student.peft_config:
        student.delete_adapter("ref")  # a copy of the untrained adapter: the reference is the base itself
    return trainer


def score_trees(model: PreTrainedModel) -> None:
    """Have a model that TRL gave its fused LM head make a tree of each batch, whose answers share their prompts.

    TRL scores every position on a CPU; of a tree the head sees what predicts answers alone, and the scores go back to
    where TRL looks for them.
    """

    from common.training import prefix_tree
    from common.training.batches import IGNORE

    fused = model.forward

    def predicting(decoder: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if tree := kwargs.get(prefix_tree.NAME):
            output.last_hidden_state = output.last_hidden_state[:, tree.sources]

    def forward(self: Any, *, labels: torch.Tensor | None = None, fused_lm_head: bool = False, **inputs: Any) -> Any:
        if not fused_lm_head:
            return fused(labels=labels, **inputs)
        real, scored = inputs["attention_mask"].bool(), labels[:, 1:] != IGNORE
        prompts = (real & (labels == IGNORE)).sum(dim=1).tolist()
        ids = [row[inside].tolist() for row, inside in zip(inputs["input_ids"], real, strict=True)]
        batch = prefix_tree.collate(list(map(tokenizers.Encoded, ids, prompts)), 0)
        if prefix_tree.NAME not in batch:
            return fused(labels=labels, fused_lm_head=True, **inputs)
        del batch["labels"]
        targets = labels[:, 1:][scored][None]
        output = fused(**inputs | batch, shift_labels=targets, fused_lm_head=True)
        for name in ("log_probs", "entropy", "mean_logits", "is_top1"):
            if (values := getattr(output, name)) is not None:
                setattr(output, name, values.new_zeros(scored.shape).masked_scatter(scored, values[0]))
        return output

    model.base_model.register_forward_hook(predicting, with_kwargs=True)
    model.forward = types.MethodType(forward, model)


def try_pairs(
    settings: DpoSettings, student: Any, longest: EncodedPair, size: int, tokenizer: PreTrainedTokenizerBase
) -> None:
    """A step on `size` copies of a pair, as `try_step`."""
    from common.training.losses import completion_loss

    row = tokenizers.Encoded(longest.prompt_ids + longest.chosen_ids, len(longest.prompt_ids))
    batch = collate([row] * (2 * size), tokenizer.pad_token_id)
    batch = {name: tensor.to(student.device) for name, tensor in batch.items()}
    try_step(settings, student, lambda: completion_loss(student, batch)[0])
