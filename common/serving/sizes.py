"""About how much a request takes of a batch, before its text is encoded."""

from __future__ import annotations

CHARACTERS_A_TOKEN = 3  # about; how many rows make a batch is decided before they are encoded
FRAME_TOKENS = 40  # about, of the instruction and the chat template
TURN_TOKENS = 12  # about, of what stands behind the text of a row: the template, and columns of the labels


def estimate(text: str) -> int:
    """About how many tokens a prompt with this text has."""
    return FRAME_TOKENS + len(text) // CHARACTERS_A_TOKEN


def estimate_row(text: str) -> int:
    """About how many tokens of a row with this text are read; what stands before it is kept (`Ranker.prefixes`)."""
    return TURN_TOKENS + len(text) // CHARACTERS_A_TOKEN
