"""Flags become settings: each has its field, its default, and its place in run.json."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

import dpo_train
import kd_train
import sft_train
from common import cli
from common.cli import NothingToDo, UserError
from common.models import hub
from common.models.loading import is_on
from common.training import flags, resumption, run
from common.training.settings import DpoSettings, KdSettings, TrainSettings
from common.vram.formulas import predict


@pytest.mark.parametrize(
    ("script", "settings_of", "kind", "method"),
    [
        (sft_train, flags.sft_settings, TrainSettings, "sft"),
        (kd_train, flags.kd_settings, KdSettings, "kd"),
        (dpo_train, flags.dpo_settings, DpoSettings, "dpo"),
    ],
)
def test_each_setting_is_a_flag_and_keeps_its_default(script, settings_of, kind, method, monkeypatch):
    monkeypatch.setattr(hub, "check", lambda name: None)
    args = cli.parse_args(script.build_parser(), ["--student", "s", "--data", "d", "--save_dir", "r"])
    settings = settings_of(args)
    assert settings.as_dict() == vars(args) == kind(student="s", data="d", save_dir="r").as_dict()
    assert (type(settings), settings.method) == (kind, method)


def test_the_recipe_of_each_method():
    assert (TrainSettings.learning_rate, KdSettings.learning_rate, DpoSettings.learning_rate) == (2e-4, 2e-4, 5e-5)
    assert (TrainSettings.lora_dropout, DpoSettings.lora_dropout) == (0.05, 0.0)
    assert (TrainSettings.lora_r, TrainSettings.lora_alpha, TrainSettings.max_len) == (16, 32, 1024)


def test_an_adapter_that_is_started_from_goes_on_with_its_own_settings(tiny_base, tmp_path):
    """In the record, and in what memory is predicted for; a flag that says otherwise would do nothing."""
    (tmp_path / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 8, "lora_dropout": 0.1}')
    common = ["--student", tiny_base, "--data", "d", "--save_dir", "r", "--init_adapter", str(tmp_path)]

    def settings_of(script, read, *more: str) -> TrainSettings:
        return read(cli.parse_args(script.build_parser(), [*common, *more]))

    started = settings_of(sft_train, flags.sft_settings)
    assert (started.lora_r, started.lora_alpha, started.lora_dropout) == (4, 8, 0.1)
    assert (started.plan().lora_r, started.plan().lora_dropout, started.plan().reference) == (4, 0.1, False)
    dpo = settings_of(dpo_train, flags.dpo_settings)
    assert (dpo.lora_r, dpo.lora_dropout) == (4, 0.0)  # which switches the adapter's off
    alone = replace(dpo, init_adapter=None).plan()
    weights = alone.trained * alone.trained_width
    assert predict(dpo.plan()).total - predict(alone).total == weights  # the copy that is the reference
    for flag, value in (("lora_r", "8"), ("lora_alpha", "16"), ("lora_dropout", "0.2")):
        with pytest.raises(UserError, match=f"--{flag} {value}: the adapter .* goes on with its own"):
            settings_of(sft_train, flags.sft_settings, f"--{flag}", value)
    assert settings_of(dpo_train, flags.dpo_settings, "--lora_dropout", "0.1", "--lora_r", "4").lora_dropout == 0.1
    with pytest.raises(UserError, match="goes on with its own"):
        settings_of(dpo_train, flags.dpo_settings, "--lora_dropout", "0.2")
    for value, taken in (("0.2", 0.1), ("0", 0.0)):  # of a run of an earlier version, too
        resumed = settings_of(dpo_train, flags.dpo_settings, "--lora_dropout", value, "--lora_r", "8", "--resume")
        assert (resumed.lora_r, resumed.lora_dropout) == (4, taken)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match=r"adapter_config\.json is broken"):
        settings_of(sft_train, flags.sft_settings)


def test_a_run_from_an_adapter_goes_on_whatever_its_record_says_of_that(tmp_path):
    """Before 0.2.0 it had the flags' defaults, which the adapter never had."""
    common = {"student": "s", "data": "d", "save_dir": str(tmp_path), "init_adapter": "a", "resume": True}
    settings = TrainSettings(**common, lora_r=8, lora_alpha=16, lora_dropout=0.1)
    before = {"settings": settings.as_dict() | {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.0}}
    (tmp_path / "run.json").write_text(json.dumps(before | {"state": "done"}))
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(NothingToDo):
        run.stop_where_done(settings, {})
    slower = replace(settings, learning_rate=1e-6)
    assert resumption.differences(before, slower.deciding(), {}) == ["--learning_rate 0.0002, now 1e-06"]
    afresh = replace(settings, init_adapter=None)
    assert "--lora_r 16, now 8" in resumption.differences(before, afresh.deciding(), {})


def test_a_dpo_from_an_adapter_goes_on_with_its_dropout_or_without(tmp_path):
    """Of all values 0 alone decides: it switches the adapter's off, then as now."""
    common = {"student": "s", "data": "d", "save_dir": str(tmp_path), "init_adapter": "a", "resume": True}
    own, off = (DpoSettings(**common, lora_dropout=dropout) for dropout in (0.05, 0.0))

    def changed(before: float, now: DpoSettings) -> list[str]:
        record = {"settings": now.as_dict() | {"lora_dropout": before}}
        return resumption.differences(record, now.deciding(record["settings"]), {})

    assert changed(0.1, own) == changed(0.0, off) == []
    assert (changed(0.1, off), changed(0.0, own)) == (["--lora_dropout 0.1, now 0.0"], ["--lora_dropout 0.0, now 0.05"])
    (tmp_path / "adapter_model.safetensors").touch()
    for before, error in ((0.1, NothingToDo), (0.0, UserError)):
        record = {"state": "done", "settings": own.as_dict() | {"lora_dropout": before}}
        (tmp_path / "run.json").write_text(json.dumps(record))
        with pytest.raises(error, match=r"nothing is left to train|no checkpoints to go on from"):
            run.stop_where_done(own, {})


@pytest.mark.parametrize("beta", ["0.0", "nan", "inf"])
def test_beta_is_above_0(beta):
    given = ["--student", "s", "--data", "d", "--save_dir", "r", "--beta", beta]
    args = cli.parse_args(dpo_train.build_parser(), given)
    with pytest.raises(UserError, match=f"--beta {beta} must be above 0"):
        flags.dpo_settings(args)


def test_switches():
    assert [is_on(switch, cuda) for switch in ("on", "off", "auto") for cuda in (True, False)] == [
        True, True, False, False, True, False]  # fmt: skip
