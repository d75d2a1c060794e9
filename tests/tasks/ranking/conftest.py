"""Fixtures of the label tasks' tests: CreditMix rows, a run that was trained on them, and the evaluator."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import creditmix_prepare
import eval_creditmix
import sft_train


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """What creditmix_prepare.py makes of 1,500 synthetic rows."""
    folder = tmp_path_factory.mktemp("data")
    creditmix_prepare.main(["--synthesize", "1500", "--outdir", str(folder)])
    return folder


@pytest.fixture(scope="session")
def dataset(data) -> str:
    return str(data / "creditmix_dataset.json")


@pytest.fixture(scope="session")
def trained(data, base, tmp_path_factory) -> str:
    """An adapter of a few SFT steps, without a fitted calibration. Not to be changed."""
    run = str(tmp_path_factory.mktemp("runs") / "sft")
    argv = ["--student", base, "--data", str(data / "creditmix_sft.jsonl"), "--save_dir", run, "--max_steps", "24"]
    sft_train.main([*argv, "--learning_rate", "0.01", "--logging_steps", "24"])
    return run


@pytest.fixture
def evaluate(dataset, capsys):
    """`evaluate(model_dir, ..., flag, ...)`: the last line of stdout as JSON; without controls unless `controls`."""

    def run(*argv: str, code: int | None = None, file: str = dataset, controls: bool = False) -> dict:
        capsys.readouterr()
        without = () if controls else ("--controls", "none")
        assert eval_creditmix.main(["--data", file, *without, "--model_dir", *map(str, argv)]) == code
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run
