"""Fixtures of the label tasks' tests: CreditMix rows, a run that was trained on them, and the evaluator."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.served import make_run

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


@pytest.fixture(scope="session")
def distinct(base, tmp_path_factory) -> str:
    """An adapter whose scores differ from row to row, as those of a few steps need not."""
    return str(make_run(tmp_path_factory.mktemp("distinct") / "run", base, seed=1))


@pytest.fixture(scope="session")
def fitted(data, trained, tmp_path_factory) -> str:
    """`trained` with a calibration fitted on the dev rows."""
    run = shutil.copytree(trained, tmp_path_factory.mktemp("runs") / "fitted")
    eval_creditmix.main(["--model_dir", str(run), "--fit_calibration", str(data / "creditmix_dev.jsonl")])
    return str(run)


@pytest.fixture
def evaluate(dataset, capsys):
    """`evaluate(model_dir, ..., flag, ...)`: the last line of stdout as JSON; without controls unless `controls`."""

    def run(*argv: str, code: int | None = None, file: str = dataset, controls: bool = False) -> dict:
        capsys.readouterr()
        without = () if controls else ("--controls", "none")
        assert eval_creditmix.main(["--data", file, *without, "--model_dir", *map(str, argv)]) == code
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run
