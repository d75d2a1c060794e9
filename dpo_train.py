"""Direct preference optimisation: a QLoRA adapter from rows {"prompt", "chosen", "rejected"}.

    python dpo_train.py --student Qwen/Qwen2.5-3B-Instruct --data data/creditmix_dpo.jsonl \\
        --save_dir runs/creditmix_dpo --epochs 5 --beta 0.1 --init_adapter runs/creditmix_sft

Rafailov et al. 2023 (arXiv:2305.18290), by TRL's DPOTrainer. The reference is the base with the adapter off, or the
adapter given as --init_adapter as it was; its log-probabilities are computed once, so --lora_r 0 needs no copy of it.
Writes the same files as sft_train.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from common import cli
from common import distributed as launch
from common.data import rows as records
from common.models import tokenizers
from common.training import batches as completions
from common.training import trainer as training

REFERENCE_TOKENS = 2048  # of a batch in the pass for the reference log-probabilities


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__, prog="dpo_train.py")
    training.add_flags(parser, learning_rate=5e-5)
    parser.set_defaults(lora_dropout=0.0)  # the reference has none, so dropout would be noise between the two
    parser.add_argument("--beta", type=float, default=0.1, help="strength of the pull towards the reference")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = cli.parse_args(build_parser(), argv)
    if args.beta <= 0:
        raise cli.UserError(f"--beta {args.beta} must be above 0")
    training.check_flags(args)
    rows = read_pairs(args.data, args.skip_bad_rows)
    held_out = read_pairs(args.eval_data, args.skip_bad_rows) if args.eval_data else []
    record = training.start(args, "dpo", rows, argv)
    with training.failing(record):
        tokenizer = tokenizers.load_tokenizer(args.student, trust_remote_code=args.trust_remote_code)
        training.limit_length(args)
        train_rows = encode(tokenizer, args.data, rows, args)
        answer = max(answer_length(row) for row in train_rows)
        if training.check_memory(args, record, "dpo", max(length(row) for row in train_rows), answer):
            train_rows = encode(tokenizer, args.data, rows, args)
        student = training.prepare_student(args, tokenizer)
        eval_rows = encode(tokenizer, args.eval_data, held_out, args) if held_out else None
        training.train_and_save(build_trainer(args, student, tokenizer, train_rows, eval_rows), args, record)


def read_pairs(path: str, skip_bad_rows: bool) -> list[dict]:
    """DPO rows; a pair whose two answers are the same teaches nothing and is bad input."""

    def fault(row: dict) -> str | None:
        return "the chosen and the rejected answer are the same" if row["chosen"] == row["rejected"] else None

    return records.check_rows(path, records.iter_jsonl(path), records.DPO_KEYS, skip_bad_rows, fault_of=fault)


def encode(tokenizer, path: str, rows: Sequence[dict], args: argparse.Namespace) -> list[dict[str, list[int]]]:
    """`prompt_ids`, `chosen_ids` and `rejected_ids` of each row that fits, the form that DPOTrainer works on."""
    sides = [
        completions.encode_rows(
            tokenizer, path, [(row["prompt"], row[side]) for row in rows], args.max_len, args.idp_mode
        )
        for side in ("chosen", "rejected")
    ]
    encoded = []
    for chosen, rejected in zip(*sides, strict=True):
        if chosen is None or rejected is None:
            continue
        # Both answers must follow the same prompt: take the one that was cut more.
        shorter = min(chosen, rejected, key=lambda row: row.prompt_length)
        encoded.append(
            {
                "prompt_ids": shorter.input_ids[: shorter.prompt_length],
                "chosen_ids": chosen.input_ids[chosen.prompt_length :],
                "rejected_ids": rejected.input_ids[rejected.prompt_length :],
            }
        )
    if not encoded:
        raise cli.UserError(f"{path}: no pair fits --max_len {args.max_len}; raise it")
    return encoded


def answer_length(row: dict) -> int:
    """Tokens of the longer answer."""
    return max(len(row["chosen_ids"]), len(row["rejected_ids"]))


def length(row: dict) -> int:
    """Tokens of the prompt with the longer answer."""
    return len(row["prompt_ids"]) + answer_length(row)


def build_trainer(args: argparse.Namespace, student, tokenizer, train_rows: list[dict], eval_rows: list[dict] | None):
    """TRL's DPOTrainer on rows that are encoded already, with reference log-probabilities computed once."""
    import torch
    from datasets import Dataset
    from torch.utils.data import DataLoader
    from trl import DPOConfig, DPOTrainer

    lengths = [length(row) for row in train_rows]

    class Trainer(training.Saving, DPOTrainer):
        def _prepare_dataset(self, dataset, *_):
            return dataset  # encoded by common.models.tokenizers, as every other script does

        def _precompute_ref_logps(self, dataset, name, batch_size):
            """As TRL's, without its cache file (whose name differs from process to process) and without dropout."""
            loader = DataLoader(dataset, batch_size=batch_size, collate_fn=self.data_collator)
            self.model.eval()
            batches = [
                self.accelerator.gather_for_metrics(self.compute_ref_log_probs(self.model, batch))
                for batch in self.accelerator.prepare(loader)
            ]
            chosen, rejected = (torch.cat(parts).tolist() for parts in zip(*batches, strict=True))
            return dataset.add_column("ref_chosen_logps", chosen).add_column("ref_rejected_logps", rejected)

        def _get_train_sampler(self, train_dataset=None):
            step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
            return completions.LengthGroupedOrder(lengths, step, self.args.seed)

    longest = train_rows[max(range(len(lengths)), key=lengths.__getitem__)]

    def try_batch(size: int) -> None:
        row = tokenizers.Encoded(longest["prompt_ids"] + longest["chosen_ids"], len(longest["prompt_ids"]))
        batch = completions.collate([row] * (2 * size), tokenizer.pad_token_id)
        batch = {name: tensor.to(student.device) for name, tensor in batch.items()}
        training.try_step(args, student, lambda: completions.completion_loss(student, batch)[0])

    per_device, accumulation = training.fit_batch_size(args, 2 * max(lengths), try_batch)
    settings = DPOConfig(
        **training.trainer_settings(args, per_device, accumulation),
        beta=args.beta,
        max_length=None,
        disable_dropout=args.lora_dropout == 0,
        precompute_ref_log_probs=True,
        # without gradients more fit at once, up to where their logits would weigh more than a training step
        precompute_ref_batch_size=max(per_device, REFERENCE_TOKENS // (2 * max(lengths))),
    )
    trainer = Trainer(
        model=student,
        args=launch.one_card(settings),
        train_dataset=Dataset.from_list(train_rows),
        eval_dataset=Dataset.from_list(eval_rows) if eval_rows else None,
        processing_class=tokenizer,
    )
    if args.lora_r and not args.init_adapter and "ref" in student.peft_config:
        student.delete_adapter("ref")  # a copy of the untrained adapter: the reference is the base itself
    return trainer


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
