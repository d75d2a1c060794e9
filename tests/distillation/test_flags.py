"""What cannot work together is refused; the names of other recipes mean what they meant."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from support.distillation import distill

import distill_train
from common import cli
from common.cli import NothingToDo, UserError
from common.distillation.flags import WEIGHTS, resolve_weights, settings_of
from common.distillation.settings import TERMS, DistillSettings
from common.models import hub
from common.training import resumption, run


def parsed(*argv: object):
    base = ["--student", "s", "--save_dir", "x", "--data", "d.jsonl"]
    return cli.parse_args(distill_train.build_parser(), [*base, *map(str, argv)])


def test_weights_of_two_other_recipes_have_one_meaning(tmp_path):
    gemma = parsed("--alpha_ce", 1.0, "--beta_mse", 0.1, "--gamma_kl", 0.5)
    assert resolve_weights(gemma) == {"ce": 1.0, "hidden_mse": 0.1, "forward_kl": 0.5}
    gpt2 = parsed("--alpha_kl", 0.7, "--beta_ce", 0.3, "--gamma_mse", 0.05, "--delta_cos", 0.05, "--epsilon_attn", 0)
    expected = {"forward_kl": 0.7, "teacher_ce": 0.3, "hidden_mse": 0.05, "hidden_cosine": 0.05}
    assert resolve_weights(gpt2) == expected
    assert resolve_weights(parsed()) == {"forward_kl": 0.5, "ce": 0.5}
    (tmp_path / "c.yaml").write_text(
        "teacher_model_name: t\ngamma_kl: 0.5\nper_device_batch_size: 2\ngrad_accum_steps: 8\nlr: 0.1\n"
    )
    args = parsed("--config", tmp_path / "c.yaml")
    values = (args.teacher, args.forward_kl, args.per_device_train_batch_size, args.gradient_accumulation_steps)
    assert (*values, args.learning_rate) == ("t", 0.5, 2, 8, 0.1)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--forward_kl", -1), "weight must be 0 or above"),
        (("--forward_kl", 0), "every loss term has the weight 0"),
        (("--temperature", 0), "--temperature 0.0 must be above 0"),
        ((), "--teacher is missing; forward_kl needs one"),
        (("--ce", 1, "--teacher_cache", "c"), "--teacher_cache without --teacher"),
        (("--teacher", "BASE", "--cache_targets", "sampled"), "--cache_targets goes with --teacher_cache"),
        (("--teacher", "BASE", "--cache_k", 8), "--cache_k goes with --teacher_cache or --on_policy; give that too"),
        (("--teacher", "BASE", "--lmbda", 0.5), "--lmbda goes with --on_policy"),
        (("--teacher", "BASE", "--ignore_collapse"), "--ignore_collapse goes with --on_policy"),
        (("--teacher", "BASE", "--split", "test"), "--split goes with --dataset"),
        (("--teacher", "BASE", "--forward_kl", 1, "--jsd_beta", 0.9), "--jsd_beta goes with --jsd"),
        (("--teacher", "BASE", "--layer_map", "uniform"), "goes with --hidden_mse or --hidden_cosine or --attention"),
        (("--ce", 1, "--load_teacher_in_4bit", "on"), "--load_teacher_in_4bit goes with --teacher"),
        (("--ce", 1, "--teacher", "BASE"), "--ce alone asks nothing of the teacher"),
        (("--teacher", "t", "--dataset", "wikitext"), "either --data FILE or --dataset NAME"),
        (("--on_policy",), "--teacher is missing; with --on_policy it reads"),
        (("--on_policy", "--teacher", "BASE", "--labels"), "for those that are ranked; give one"),
        (("--on_policy", "--teacher", "BASE", "--ce", 1), "--ce would teach the student its own answers"),
        (("--on_policy", "--teacher", "BASE", "--hidden_mse", 1), "--hidden_mse compares what is inside models"),
        (("--on_policy", "--teacher", "BASE", "--lmbda", 1.5), "--lmbda 1.5 is not from 0"),
        (("--on_policy", "--teacher", "BASE", "--sample_temperature", 0), "--sample_temperature 0.0 must be above 0"),
        (("--on_policy", "--teacher", "BASE", "--max_len", 256), "--max_new_tokens 256 leaves no room for a prompt"),
        (("--on_policy", "--teacher", "BASE", "--cache_k", 1), "--cache_k 1 has no room"),
        (("--on_policy", "--teacher", "BASE", "--cache_targets", "sampled"), "--reverse_kl needs --cache_targets topk"),
        (("--labels", "--teacher", "t"), "teacher_generate.py --probabilities"),
        (("--labels", "--hidden_mse", 1), "--hidden_mse compares what is inside models"),
        (("--teacher", "BASE", "--teacher_cache", "c", "--attention_mse", 1), "needs a live teacher"),
        (("--teacher", "BASE", "--teacher_cache", "c", "--cache_targets", "sampled", "--jsd", 1),
         "--jsd needs --cache_targets topk"),
        (("--teacher", "BASE", "--hidden_mse", 1, "--layer_map", "1:9"),
         "the student has the layers 1 to 2, the teacher 1 to 2"),
        (("--teacher", "BASE", "--hidden_mse", 1, "--layer_map", "first"), "is not last, uniform or pairs"),
        (("--teacher", "./nowhere"), "nowhere does not exist"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused(more, words, base, uneven, tmp_path):
    more = [base if word == "BASE" else word for word in more]
    with pytest.raises(UserError, match=words):
        distill(base, tmp_path / "run", "--data", uneven, *more)


def test_each_setting_is_a_flag_and_keeps_its_default(monkeypatch):
    monkeypatch.setattr(hub, "check", lambda name: None)
    args = parsed("--ce", 1)
    settings = settings_of(args)
    assert (
        settings.as_dict() == vars(args) == DistillSettings(student="s", save_dir="x", data="d.jsonl", ce=1.0).as_dict()
    )
    assert set(TERMS) == set(WEIGHTS)


def test_weights_are_those_of_the_terms_that_count():
    common = {"student": "s", "save_dir": "x"}
    settings = DistillSettings(**common, jsd=0.0, hidden_mse=0.1, forward_kl=1.0)
    assert settings.weights == {"forward_kl": 1.0, "hidden_mse": 0.1}
    assert DistillSettings(**common).weights == {}


def test_a_run_goes_on_without_a_flag_that_did_nothing(tmp_path):
    """Such a one was taken before 0.2.0."""
    settings = DistillSettings(student="s", save_dir=str(tmp_path), data="d", teacher="t", forward_kl=1.0, resume=True)
    before = {"settings": settings.as_dict() | {"cache_k": 32, "jsd_beta": 0.9, "layer_map": "uniform"}}
    (tmp_path / "run.json").write_text(json.dumps(before | {"state": "done"}))
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(NothingToDo):
        run.stop_where_done(settings, {})
    cached = replace(settings, teacher_cache="c", cache_k=8)
    assert resumption.differences(before, cached.deciding(), {}) == ["--cache_k 32, now 8"]
    mixed = replace(settings, jsd=0.5)
    assert resumption.differences(before, mixed.deciding(), {}) == ["--jsd None, now 0.5", "--jsd_beta 0.9, now 0.5"]
