"""Tiny models that the tests build themselves: random weights, no network, nothing kept between runs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SHARED = Path(__file__).parents[2] / "shared"

CORPUS = [
    "Classify the credit mix of this customer as Good, Standard or Bad. Return only the label.\n\n"
    f"Age: {20 + i % 40}, Occupation: {job}, Annual Income: {1000 + 37.5 * i}, Outstanding Debt: {3 * i + 0.25}"
    for i, job in enumerate(["Scientist", "Lawyer", "Engineer", "Writer"] * 20)
]


@pytest.fixture(scope="session")
def tokenizer():
    from common import miniature, tokenizers

    return tokenizers.align(miniature.build_tokenizer(CORPUS, vocab_size=420))


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory, tokenizer) -> str:
    """A Qwen2-architecture model of random weights and its tokenizer, in a folder."""
    from common import miniature

    folder = tmp_path_factory.mktemp("models") / "tiny"
    miniature.build_model(tokenizer, hidden=32, layers=2, heads=4, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
