"""Models that are compared."""

from __future__ import annotations

import pytest
from support.models import build_base


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer) -> dict[str, str]:
    """A teacher twice as wide as base and student, which have other weights, each in a folder."""
    folder = tmp_path_factory.mktemp("contest")
    shapes = {"teacher": {"hidden": 64, "seed": 1}, "base": {"seed": 2}, "student": {"seed": 3}}
    return {role: build_base(folder / role, tokenizer, embeddings=0.3, **shape) for role, shape in shapes.items()}
