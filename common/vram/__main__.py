# PYTHON_ARGCOMPLETE_OK
"""Memory preflight: predict the peak from the config alone, compare it with what is free, find what would fit.

    python -m common.vram --student Qwen/Qwen2.5-3B-Instruct --max_len 1024
    python -m common.vram --student Qwen/Qwen2.5-3B-Instruct --max_len 2048 --method dpo --card_gb 8
    python -m common.vram --student Qwen/Qwen2.5-3B-Instruct --method serve --adapters 4 --card_gb 8

--method is sft, kd, dpo, distill (beside a live --teacher, or from a cache without), infer or serve. Needs neither
weights nor a GPU; the prediction is for a card unless --device says cpu. What is not given is what the method's trainer
would take on that device. The formulas are in common/vram/formulas.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from common import cli
from common.models.loading import is_on
from common.vram import model_shape
from common.vram.formulas import GB, Inference, Plan, Training, predict
from common.vram.plans import inference_width, training_plan
from common.vram.preflight import DESKTOP, INFERENCE, SERVER, Flags, advise, words

TRAINING: Flags = {
    "per_device_train_batch_size": lambda plan: plan.batch,
    "gradient_checkpointing": lambda plan: "on" if plan.checkpointing else "off",
    "teacher_cache": lambda plan: None if plan.teacher else "runs/teacher_cache",
    "max_len": lambda plan: plan.max_len,
    "load_in_4bit": lambda plan: "on" if plan.four_bit else "off",
}
# The trainers' defaults, where they are not the plan's.
DROPOUT = {"dpo": 0.0}
TERMS = ("forward_kl", "ce")


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = cli.parser(__doc__, prog="python -m common.vram")
    parser.add_argument("--student", required=True, help="model: a folder or a Hub id")
    methods = ("sft", "kd", "dpo", "distill", "infer", "serve")
    parser.add_argument("--method", choices=methods, default="sft")
    parser.add_argument("--teacher", help="distill: a model that is on the device, too")
    parser.add_argument("--max_len", type=cli.positive_int, default=1024, help="tokens a row")
    parser.add_argument("--completion_len", type=cli.positive_int, help="of the longest completion; default: --max_len")
    parser.add_argument(
        "--per_device_train_batch_size", type=cli.positive_int, help="default: what the trainer begins with"
    )
    parser.add_argument("--lora_r", type=cli.whole_number, default=16, help="0: all weights are trained")
    parser.add_argument("--lora_dropout", type=float, help="default: 0.05, of dpo 0")
    parser.add_argument("--gradient_checkpointing", choices=("auto", "on", "off"), default="auto", help="auto: on CUDA")
    parser.add_argument("--load_in_4bit", choices=("auto", "on", "off"), default="auto", help="NF4; auto: on CUDA")
    parser.add_argument("--max_batch_tokens", type=cli.positive_int, default=8192, help="infer and serve")
    parser.add_argument("--adapters", type=cli.whole_number, default=1, help="infer and serve: on one base")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--card_gb", type=float, help=f"compare with a card of this size, less {DESKTOP} for a desktop")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Print the prediction, and with --card_gb whether it fits."""
    args = cli.parse_args(build_parser(), argv)
    cuda, student = args.device == "cuda", model_shape.of(args.student)
    plan: Plan
    if args.method in ("infer", "serve"):
        four_bit = is_on(args.load_in_4bit, cuda)
        plan = Inference(
            student,
            batch_tokens=args.max_batch_tokens,
            adapters=args.adapters,
            lora_r=args.lora_r,
            four_bit=four_bit,
            width=inference_width(student, cuda=cuda, four_bit=four_bit),
            cuda=cuda,
        )
    else:
        dropout = DROPOUT.get(args.method, Training.lora_dropout) if args.lora_dropout is None else args.lora_dropout
        plan = training_plan(
            student,
            cuda=cuda,
            lora_r=args.lora_r,
            max_len=args.max_len,
            batch=args.per_device_train_batch_size,
            load_in_4bit=args.load_in_4bit,
            gradient_checkpointing=args.gradient_checkpointing,
            method=args.method,
            completion_len=args.completion_len,
            lora_dropout=dropout,
            terms=TERMS if args.method == "distill" else Training.terms,
            teacher=model_shape.of(args.teacher) if args.teacher else None,
            teacher_four_bit=cuda,
        )
    print(predict(plan).table())
    if args.card_gb:
        free = int((args.card_gb - DESKTOP) * GB)
        if predict(plan).total <= free:
            print(f"fits a card of {args.card_gb:g} GB")
        else:
            flags = {"infer": INFERENCE, "serve": SERVER}.get(args.method, TRAINING)
            print(f"too much for a card of {args.card_gb:g} GB; it would fit with {words(advise(plan, flags, free))}")


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
