# PYTHON_ARGCOMPLETE_OK
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
from common.data import shapes
from common.export import model_card
from common.models.flags import parse_args
from common.tasks import recognition
from common.training import dpo, dry_run, flags


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__, prog="dpo_train.py")
    flags.add_dpo_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int | None:
    settings = flags.dpo_settings(parse_args(build_parser(), argv))
    if settings.dry_run:
        return dry_run.show(settings, shapes.DPO)
    dpo.train(settings, argv, recognition.record_of)
    model_card.refresh([settings.save_dir])
    return None


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
