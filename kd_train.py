# PYTHON_ARGCOMPLETE_OK
"""Sequence-level knowledge distillation: a QLoRA adapter from rows {"input", "teacher_output"}.

    python kd_train.py --student Qwen/Qwen2.5-3B-Instruct --data data/creditmix_kd.jsonl --idp_mode \\
        --save_dir runs/creditmix_kd --epochs 5

The student learns the teacher's text by cross-entropy (Kim and Rush 2016, arXiv:1606.07947). Where there is no
teacher, the gold answer stands in as teacher_output. Writes the same files as sft_train.py.
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
    parser = cli.parser(__doc__, prog="kd_train.py")
    flags.add_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int | None:
    settings = flags.kd_settings(parse_args(build_parser(), argv))
    if settings.dry_run:
        return dry_run.show(settings, shapes.KD)
    completion.train(settings, shapes.KD, argv, recognition.record_of)
    model_card.refresh([settings.save_dir])
    return None


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
