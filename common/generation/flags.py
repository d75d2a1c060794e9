"""The command-line flag of how text is written, whatever it is."""

from __future__ import annotations

import argparse

from common import cli
from common.generation.decoding import LOOKUP


def add_lookup_flag(parser: argparse._ActionsContainer) -> None:
    """--prompt_lookup_num_tokens; see `Decoding`."""
    parser.add_argument(
        "--prompt_lookup_num_tokens",
        type=cli.whole_number,
        default=LOOKUP,
        metavar="N",
        help="read up to N tokens at once where an answer repeats its prompt or itself; the answer stays the same, and "
        f"is there sooner; 0: token by token (default: {LOOKUP})",
    )
