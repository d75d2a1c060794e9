# PYTHON_ARGCOMPLETE_OK
"""Supervised fine-tuning: a QLoRA adapter from inputs and outputs, or from chats, with the loss on answers alone.

    python sft_train.py --student Qwen/Qwen2.5-3B-Instruct --data data/creditmix_sft.jsonl \\
        --save_dir runs/creditmix_sft --epochs 5

Writes the adapter, tokenizer, run.json and loss curve to --save_dir; go on after an interruption with --resume. With
--lora_r 0 it is a whole model, which --quantization_aware int8 (or int4) prepares for being quantised:

    python sft_train.py --student models/tiny_student --data data/creditmix_sft.jsonl --save_dir runs/creditmix_qat \\
        --lora_r 0 --quantization_aware int8 --learning_rate 3e-4
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from common import cli
from common.data import shapes
from common.export import model_card
from common.models.flags import parse_args
from common.tasks import recognition
from common.training import completion, dry_run, flags


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__, prog="sft_train.py")
    flags.add_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int | None:
    settings = flags.sft_settings(parse_args(build_parser(), argv))
    if settings.dry_run:
        return dry_run.show(settings, shapes.SFT)
    completion.train(settings, shapes.SFT, argv, recognition.record_of)
    model_card.refresh([settings.save_dir])
    return None


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
