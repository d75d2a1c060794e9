"""A run goes on with what it was begun with, or says what has changed; and it has its folder to itself."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from support.inputs import PROMPTS, write_rows
from support.models import build_base, run_json, weights
from support.training import SCRIPTS, train

import sft_train
from common import run_record
from common.cli import NothingToDo, UserError
from common.training import checkpoints, resumption
from common.training import flags as training_flags
from common.training import run as runs
from common.training.checkpoints import newest_checkpoint

pytestmark = pytest.mark.processes

SHORT = ("--max_steps", 2, "--save_steps", 1, "--per_device_train_batch_size", 2)


@pytest.fixture(scope="module")
def begun(base, rows, tmp_path_factory) -> Path:
    """A run that was stopped after its two steps had been saved. Not to be changed."""
    folder = train(sft_train.main, base, rows["sft"], tmp_path_factory.mktemp("begun") / "run", *SHORT)
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | {"state": "running"}))
    return folder


@pytest.fixture
def run(begun, tmp_path) -> Path:
    return Path(shutil.copytree(begun, tmp_path / "run"))


@pytest.fixture(scope="module")
def other_rows(tmp_path_factory) -> str:
    """Rows of other customers."""
    rows = [{"input": text, "output": "Good", "group": f"{number:016x}"} for number, text in enumerate(PROMPTS, 900)]
    return write_rows(tmp_path_factory.mktemp("other") / "sft.jsonl", rows)


def test_other_data_is_refused(base, run, other_rows):
    groups = run_record.read_groups(run)
    with pytest.raises(UserError, match=r"begun with other training data \(sha256\); .* --with_changes"):
        train(sft_train.main, base, other_rows, run, *SHORT, "--resume")
    assert run_record.read_groups(run) == groups
    assert run_record.read(run)["state"] == "running"


def test_other_rows_to_choose_the_best_epoch_by_are_refused(base, rows, other_rows, tmp_path):
    flags = ["--student", base, "--save_dir", str(tmp_path), "--data", rows["sft"], "--eval_data", rows["sft"]]
    settings = training_flags.sft_settings(sft_train.build_parser().parse_args(flags))
    before = {"data": settings.described_data(24)}
    assert resumption.differences(before, {}, settings.described_data(24)) == []
    other = replace(settings, eval_data=other_rows).described_data(24)
    assert resumption.differences(before, {}, other) == ["other training data (eval_sha256)"]
    assert resumption.differences({"data": {"path": "a", "rows": 24}}, {}, other) == []  # from before it was kept


def test_weights_can_be_read_by_whom_the_umask_lets(begun):
    umask = os.umask(0o077)
    os.umask(umask)
    files = [file for file in begun.rglob("*.safetensors") if file.is_file()]
    assert len(files) >= 2  # the adapter, and in its checkpoints
    assert {file.stat().st_mode & 0o777 for file in files} == {0o666 & ~umask}


def test_the_same_data_elsewhere_is_the_same(base, run, rows, tmp_path):
    copy = shutil.copy(rows["sft"], tmp_path / "copy.jsonl")
    groups = run_record.read_groups(run)
    train(sft_train.main, base, str(copy), run, *SHORT, "--resume")
    assert run_record.read_groups(run) == groups
    assert run_record.read(run)["state"] == "done"


def test_with_changes_both_files_count_as_seen(base, run, other_rows):
    before = run_record.read_groups(run)
    train(sft_train.main, base, other_rows, run, *SHORT, "--resume", "--with_changes")
    after = run_record.read_groups(run)
    assert len(before) == 12
    assert after > before
    assert len(after) == 36


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--learning_rate", 0.02), "--learning_rate 0.01, now 0.02"),
        (("--lora_r", 8), "--lora_r 16, now 8"),
        (("--seed", 3, "--weight_decay", 0.5), "--weight_decay 0.0, now 0.5; --seed 0, now 3"),
    ],
)
def test_other_settings_are_refused_by_name(base, run, rows, flags, named):
    with pytest.raises(UserError) as raised:
        train(sft_train.main, base, rows["sft"], run, *SHORT, *flags, "--resume")
    assert named in str(raised.value)


def test_another_teacher_is_named_and_one_may_be_left_out():
    before = {"settings": {"teacher": "large", "teacher_cache": None}}
    asked = {"teacher": "larger", "teacher_cache": "elsewhere"}
    assert resumption.differences(before, asked, {}) == ["--teacher large, now larger"]
    assert resumption.differences(before, asked | {"teacher": None}, {}) == []
    assert resumption.differences(before, asked | {"teacher": "large"}, {}) == []


def test_a_pass_may_be_smaller_after_it_ran_out_of_memory():
    """Of training and of the teacher's reading, as their messages say."""
    for name in ("per_device_train_batch_size", "max_batch_tokens"):
        assert resumption.differences({"settings": {name: 8}}, {name: 4}, {}) == []


def test_how_a_step_is_cut_and_reported_may_change(base, run, rows):
    more = ("--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 2, "--save_steps", 7)
    train(sft_train.main, base, rows["sft"], run, *SHORT, *more, "--resume")
    assert run_record.read(run)["state"] == "done"


def test_other_rows_a_step_are_refused(base, run, rows):
    """Which rows a checkpoint has seen is told by its steps."""
    more = ("--gradient_accumulation_steps", 4, "--resume")
    for _ in range(2):  # the second time, too
        with pytest.raises(UserError, match="begun with 2 rows an optimizer step, now 8; give what it was begun with"):
            train(sft_train.main, base, rows["sft"], run, *SHORT, *more)
    train(sft_train.main, base, rows["sft"], run, *SHORT, *more, "--with_changes")
    assert run_record.read(run)["effective_batch"] == 8


def test_a_run_that_steps_down_by_itself_may_round_its_rows_up(base, run, rows, monkeypatch):
    """Of 5 rows a step it makes 3 passes of 2."""
    monkeypatch.setenv(runs.STEPPED_DOWN, "1")
    train(sft_train.main, base, rows["sft"], run, *SHORT, "--gradient_accumulation_steps", 3, "--resume")
    assert (run_json(run)["state"], run_json(run)["effective_batch"]) == ("done", 6)


def test_another_base_is_refused(base, run, rows, tokenizer, tmp_path):
    moved = shutil.copytree(base, tmp_path / "moved")
    other = build_base(tmp_path / "other", tokenizer, embeddings=0.3, seed=1)
    with pytest.raises(UserError, match="begun with other base weights than those of"):
        train(sft_train.main, other, rows["sft"], run, *SHORT, "--resume")
    with pytest.raises(UserError, match="begun with other base weights than those of"):  # the second time, too
        train(sft_train.main, other, rows["sft"], run, *SHORT, "--resume")
    train(sft_train.main, str(moved), rows["sft"], run, *SHORT, "--resume")


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_from_the_last_step_nothing_is_trained(kind, base, rows, tmp_path):
    """Though its epoch has more."""
    main, more = SCRIPTS[kind], ("--max_steps", 5, "--save_steps", 5, "--per_device_train_batch_size", 2)
    folder = train(main, base, rows[kind], tmp_path / "run", *more)
    before = weights(folder)
    rewrite(folder, state="failed")
    train(main, base, rows[kind], folder, *more, "--resume")
    assert (run_json(folder)["state"], run_json(folder)["steps"]) == ("done", 5)
    assert all(bool((before[name] == tensor).all()) for name, tensor in weights(folder).items())


def test_two_trainings_never_share_a_folder(base, run, rows):
    lock = resumption.lock_folder(run)
    with pytest.raises(UserError, match="another training writes to"):
        train(sft_train.main, base, rows["sft"], run, *SHORT, "--resume")
    with pytest.raises(UserError, match="another training writes to"):
        train(sft_train.main, base, rows["sft"], run, *SHORT, "--overwrite")
    assert newest_checkpoint(str(run)) is not None
    resumption.unlock(lock)
    train(sft_train.main, base, rows["sft"], run, *SHORT, "--resume")
    train(sft_train.main, base, rows["sft"], run, *SHORT, "--overwrite")  # the lock went with the run


def test_with_changes_alone_means_nothing(base, rows, tmp_path):
    with pytest.raises(UserError, match="--with_changes goes with --resume"):
        train(sft_train.main, base, rows["sft"], tmp_path, "--with_changes")


@pytest.mark.parametrize("content", ["null", "[]", "3", "{", "[" * 20_000])
def test_a_broken_record_is_said(run, content, base, rows):
    (run / "run.json").write_text(content)
    with pytest.raises(UserError, match=r"is broken .*; train again with --overwrite"):
        train(sft_train.main, base, rows["sft"], run, *SHORT, "--resume")


def test_a_broken_record_is_replaced_as_its_message_says(run, base, rows):
    (run / "run.json").write_text("{")
    train(sft_train.main, base, rows["sft"], run, *SHORT, "--overwrite")
    assert run_record.read(run)["state"] == "done"


@pytest.fixture(scope="module")
def judged(base, tmp_path_factory) -> tuple[str, Path, list]:
    """(rows, a finished run on them, its flags): each epoch is worse by the rows it is judged by, which say the
    opposite."""
    folder = tmp_path_factory.mktemp("judged")
    good, bad = (
        write_rows(folder / f"{word}.jsonl", [{"input": prompt, "output": word} for prompt in PROMPTS[:8]])
        for word in ("Good", "Bad")
    )
    more = ["--per_device_train_batch_size", 4, "--eval_data", bad, "--learning_rate", 0.05, "--epochs"]
    return good, train(sft_train.main, base, good, folder / "run", *more, 3), more


@pytest.fixture
def finished(judged, tmp_path) -> Path:
    run = Path(shutil.copytree(judged[1], tmp_path / "run"))
    assert run_json(run)["best"]["step"] == 2 < run_json(run)["steps"]
    return run


def rewrite(run: Path, **facts: str) -> None:
    (run / "run.json").write_text(json.dumps(run_json(run) | facts))


def same(run: Path, other: Path) -> bool:
    ours, theirs = weights(run), weights(other)
    return all(bool((ours[name] == theirs[name]).all()) for name in ours)


def test_of_a_finished_run_nothing_is_trained_or_lost(base, judged, finished):
    data, _, more = judged
    (finished / "calibration.json").write_text("{}")
    (finished / "evaluations").mkdir()
    (finished / "evaluations" / "one.json").write_text("{}")
    before = {file: file.stat().st_mtime_ns for file in finished.rglob("*") if file.is_file()}
    with pytest.raises(NothingToDo, match="has ended; nothing is left to train"):
        train(sft_train.main, base, data, finished, *more, 3, "--resume")
    assert {file: file.stat().st_mtime_ns for file in finished.rglob("*") if file.is_file()} == before
    with pytest.raises(UserError, match=r"--epochs 3.0, now 4.0"):
        train(sft_train.main, base, data, finished, *more, 4, "--resume")


def test_a_finished_run_without_checkpoints_is_not_replaced(base, judged, finished):
    """Under other settings, of which none can be gone on with."""
    data, _, more = judged
    shutil.rmtree(finished / "checkpoints")
    (finished / "calibration.json").write_text("{}")
    before = {file: file.stat().st_mtime_ns for file in finished.rglob("*") if file.is_file()}
    with pytest.raises(UserError, match="a finished run, and no checkpoints to go on from; choose another --save_dir"):
        train(sft_train.main, base, data, finished, *more, 4, "--resume", "--with_changes")
    assert {file: file.stat().st_mtime_ns for file in finished.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize(("epochs", "changes"), [(3, []), (4, ["--with_changes"])], ids=["closing failed", "longer"])
def test_the_best_epoch_stays_the_best(epochs, changes, base, judged, finished):
    data, run, more = judged
    rewrite(finished, state="failed")
    train(sft_train.main, base, data, finished, *more, epochs, *changes, "--resume")
    assert run_json(finished)["steps"] == 2 * epochs
    assert run_json(finished)["best"] == run_json(run)["best"]
    assert same(finished, run)


def test_weights_of_an_interruption_are_not_judged(base, judged, tmp_path, monkeypatch):
    """The best epoch is an unbroken run's."""
    from transformers import Trainer

    data, run, more = judged
    step = Trainer.training_step

    def interrupted_step(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        return step(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "training_step", interrupted_step)
        train(sft_train.main, base, data, tmp_path / "run", *more, 3)
    assert newest_checkpoint(str(tmp_path / "run")).endswith("checkpoint-1")
    assert not checkpoints.best_folder(tmp_path / "run").exists()
    train(sft_train.main, base, data, tmp_path / "run", *more, 3, "--resume")
    assert run_json(tmp_path / "run")["best"] == run_json(run)["best"]
    assert same(tmp_path / "run", run)


def test_an_evaluation_that_a_kill_took_is_made_up_for(base, judged, finished):
    data, run, more = judged
    shutil.rmtree(checkpoints.best_folder(finished))
    rewrite(finished, state="running")
    train(sft_train.main, base, data, finished, *more, 3, "--resume")
    record = run_json(finished)
    assert (record["steps"], record["best"]["step"]) == (6, 6)
    assert record["final_eval_loss"] == record["best"]["eval_loss"] == run_json(run)["final_eval_loss"]


def test_the_best_by_another_mean_is_not_the_best(base, judged, finished):
    """Before 0.2.0 best.json did not say which mean its loss was."""
    data, _, more = judged
    path = checkpoints.best_folder(finished) / "best.json"
    best = json.loads(path.read_text())
    assert best.pop("loss") == "per_token"
    path.write_text(json.dumps(best))
    rewrite(finished, state="failed")
    train(sft_train.main, base, data, finished, *more, 3, "--resume")
    assert run_json(finished)["best"]["step"] == run_json(finished)["steps"] == 6


def test_the_best_of_preferences_stays_the_best(base, rows, tmp_path):
    """Their held-out loss is what it always was."""
    main, more = SCRIPTS["dpo"], ("--max_steps", 2, "--save_steps", 1, "--eval_data", rows["dpo"])
    folder = train(main, base, rows["dpo"], tmp_path / "run", *more)
    path = checkpoints.best_folder(folder) / "best.json"
    best = json.loads(path.read_text()) | {"eval_loss": -1.0}
    assert best.keys() == {"step", "epoch", "eval_loss"}
    path.write_text(json.dumps(best))
    rewrite(folder, state="failed")
    train(main, base, rows["dpo"], folder, *more, "--resume")
    assert run_json(folder)["best"] == best


def test_weights_are_found_where_a_kill_left_them(base, judged, finished):
    """Between the removal of the best weights before and the renaming of the new ones."""
    data, run, more = judged
    best = checkpoints.best_folder(finished)
    best.rename(best.with_name(".best.building"))
    rewrite(finished, state="running")
    train(sft_train.main, base, data, finished, *more, 3, "--resume")
    assert run_json(finished)["best"] == run_json(run)["best"]
    assert same(finished, run)


def test_the_best_by_other_rows_is_not_the_best(base, judged, finished):
    data, run, more = judged
    train(sft_train.main, base, data, finished, *more, 4, "--eval_data", data, "--with_changes", "--resume")
    assert run_json(finished)["best"]["step"] == run_json(finished)["steps"] == 8
    assert not same(finished, run)
