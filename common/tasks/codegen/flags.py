"""The command-line flags of everything that writes code, and the settings that they mean."""

from __future__ import annotations

import argparse

from common import cli
from common.data import task_record
from common.generation.decoding import Decoding
from common.generation.flags import add_lookup_flag
from common.models.flags import CHOSEN_BATCH, add_engine_flag, add_model_flags, add_thinking_flag, source_of, thinks
from common.tasks.codegen.writer import PROMPT_STYLES, CodeWriter

TEMPERATURE, TOP_P = 0.8, 0.95  # of several samples a task (Chen et al. 2021, arXiv:2107.03374)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of everything that writes code: decoding, prompts and the model's precision."""
    group = parser.add_argument_group("decoding")
    group.add_argument("--num_samples", type=cli.positive_int, default=1, help="answers to each task")
    group.add_argument("--temperature", type=float, help=f"default: 0 (greedy), or {TEMPERATURE} of several samples")
    group.add_argument("--top_p", type=float, default=TOP_P, help="probability that sampling stays within")
    group.add_argument("--seed", type=cli.seed, default=0)
    group.add_argument("--max_new_tokens", type=cli.positive_int, default=512, help="of a plan, and of the code")
    add_lookup_flag(group)
    add_thinking_flag(
        group, "let a reasoning model think first, within --max_new_tokens; its thinking is left out of the answer"
    )
    group.add_argument(
        "--prompt_style",
        choices=PROMPT_STYLES,
        default="auto",
        help="auto: completion for a plain base model, which was not trained on turns; chat for all others",
    )
    add_model_flags(parser, chosen_batch=CHOSEN_BATCH)
    add_engine_flag(parser)


def decoding(args: argparse.Namespace) -> Decoding:
    """How the flags of `add_flags` want answers to be decoded.

    Raises:
        UserError: a value out of range, or several samples that would all be the same.
    """
    temperature = args.temperature
    if temperature is None:
        temperature = TEMPERATURE if args.num_samples > 1 else 0.0
    if temperature < 0 or not 0 < args.top_p <= 1:
        raise cli.UserError("--temperature must be 0 or more, --top_p above 0 and at most 1")
    if args.num_samples > 1 and temperature == 0:
        raise cli.UserError("--num_samples above 1 needs a --temperature above 0: greedy answers are all the same")
    return Decoding(
        args.max_new_tokens,
        temperature,
        args.top_p,
        args.num_samples,
        args.seed,
        thinks(args),
        args.prompt_lookup_num_tokens,
    )


def load_writer(args: argparse.Namespace, model_dir: str) -> CodeWriter:
    """The model in `model_dir`, asked as the flags of `add_flags` say."""
    return CodeWriter.load(
        source_of(args, model_dir), args.max_batch_tokens, prompt_style=args.prompt_style, auto_fit=args.auto_fit
    )


def check_trained(model_dir: str) -> None:
    """Raises UserError for a model that was trained for something else than code."""
    task_record.check(model_dir, task_record.CODEGEN, None, "writing code")
