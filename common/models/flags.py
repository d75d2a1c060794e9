"""The command-line flags of everything that uses a model, and the settings that they mean."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from common import cli
from common.cli import UserError
from common.models import gguf_import
from common.models.batching import MAX_BATCH_TOKENS, TEXT_BATCH_TOKENS
from common.models.source import ENGINES, LLAMA_CPP, TORCH, ModelSource

CHOSEN_BATCH = "the most of {}, {} and {} that half of the free memory has room for".format(*TEXT_BATCH_TOKENS)
MODEL_FLAGS = ("student", "teacher", "model_dir", "base")


def parse_args(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """`cli.parse_args`, with each model that is named by a GGUF as the model folder made of it.

    Raises:
        UserError: see `cli.parse_args` and `gguf_import.model_folder`.
    """
    args = cli.parse_args(parser, argv)
    packed = getattr(args, "engine", TORCH) == LLAMA_CPP
    if packed and (args.base or args.load_in_4bit == "on" or args.dtype != "auto"):
        raise UserError(f"--engine {LLAMA_CPP} runs a GGUF as it is; leave --base, --load_in_4bit and --dtype out")
    weights = not getattr(args, "dry_run", False)
    for flag in MODEL_FLAGS:
        value = getattr(args, flag, None)
        if isinstance(value, list):
            setattr(args, flag, [_folder(name, packed, weights) for name in value])
        elif value:
            setattr(args, flag, _folder(value, packed, weights))
    return args


def _folder(name: str, packed: bool, weights: bool) -> str:
    if not packed:
        return gguf_import.model_folder(name, weights=weights)
    folder = gguf_import.packed_folder(name)
    if gguf_import.file_of(folder) is None:
        raise UserError(
            f"--engine {LLAMA_CPP} runs GGUF files, and {name} is none; make one with export_model.py --format gguf "
            "--quant Q4_K_M, name a quantisation on the Hub (owner/name:Q4_K_M), or leave --engine out"
        )
    return folder


def add_engine_flag(parser: argparse._ActionsContainer) -> None:
    """--engine, of what a model is asked with."""
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default=TORCH,
        help="what runs the model: torch; or llama.cpp, which takes a GGUF as it is, on the CPU (default: torch)",
    )


def add_model_flags(parser: argparse.ArgumentParser, *, chosen_batch: str | None = None) -> None:
    """Where the base of an adapter is, precision and batches.

    Args:
        chosen_batch: how the loader chooses --max_batch_tokens, in words (`CHOSEN_BATCH`), where texts are written.
            None: it is MAX_BATCH_TOKENS.
    """
    model = parser.add_argument_group("model")
    model.add_argument("--base", help="base of the adapter, where it has moved from where it was trained")
    model.add_argument("--load_in_4bit", choices=("auto", "on", "off"), default="auto", help="NF4; auto: on CUDA")
    model.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    model.add_argument(
        "--max_batch_tokens",
        type=cli.positive_int,
        default=None if chosen_batch else MAX_BATCH_TOKENS,
        help="tokens in one forward pass" + (f" (default: {chosen_batch})" if chosen_batch else ""),
    )
    model.add_argument(
        "--auto_fit", action="store_true", help="where memory is short, take settings that fit, and say so"
    )
    model.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")


def add_thinking_flag(parser: argparse._ActionsContainer, what: str) -> None:
    """--thinking, of what models that reason write (`thinks`).

    Args:
        what: becomes of the thinking, after "on: ".
    """
    parser.add_argument("--thinking", choices=("on", "off"), default="off", help=f"on: {what}")


def thinks(args: argparse.Namespace) -> bool:
    """What the flag of `add_thinking_flag` says."""
    return args.thinking == "on"


def source_of(args: argparse.Namespace, model_dir: str) -> ModelSource:
    """The model in `model_dir`, loaded as the flags of `add_model_flags` say."""
    engine = LLAMA_CPP if getattr(args, "engine", None) == LLAMA_CPP else TORCH  # some scripts have others beside
    return ModelSource(model_dir, args.base, args.load_in_4bit, args.dtype, args.trust_remote_code, engine)
