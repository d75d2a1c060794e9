"""Fixtures of the inference server's tests."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.served import NAMES, ROWS, make_runs, serve

from common.models.source import ModelSource
from common.tasks.ranking import creditmix
from common.tasks.ranking.classifier import Classifier
from common.tasks.ranking.creditmix import CREDITMIX


@pytest.fixture(scope="session")
def runs(tmp_path_factory, base) -> Path:
    """Three runs on one base. Not to be changed."""
    return make_runs(tmp_path_factory.mktemp("serve") / "runs", base)


@pytest.fixture(scope="session")
def expected(runs, base) -> dict[str, list[dict]]:
    """The script's answers, by name."""
    folders = {"base": base} | {name: str(runs / f"creditmix_{name}") for name in NAMES[1:]}
    answers = {}
    for name, folder in folders.items():
        classifier = Classifier.load(ModelSource(folder), CREDITMIX)
        texts = [creditmix.clean_features(row) for row in ROWS]
        answers[name] = classifier.answers(texts, classifier.calibration(None))
    return answers


@pytest.fixture(scope="module")
def served(runs, expected):
    with serve(runs) as running:
        yield running


@pytest.fixture
def own(runs, tmp_path) -> Path:
    """A copy of the runs that may be changed."""
    return Path(shutil.copytree(runs, tmp_path / "runs"))
