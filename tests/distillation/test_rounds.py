"""What makes a round: the rows it takes, what its answers become, what is kept, and when they are a collapse."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common.cli import LARGEST_SEED, UserError
from common.distillation import fill_cache, on_policy, round_statistics, student_answers, teacher_cache
from common.distillation.fill_cache import Targets
from common.distillation.round_statistics import RoundStatistics
from common.distillation.settings import DistillSettings
from common.distillation.student_answers import Prompts, Round, StudentAnswer
from common.distillation.teacher_cache import TeacherCache, pack, record_type
from common.models.tokenizers import Encoded
from common.run_record import RunRecord
from common.training import prefix_tree
from common.training.batches import IGNORE

SETTINGS = DistillSettings(student="s", save_dir="x", data="d", on_policy=True, max_len=40, max_new_tokens=20)
HEALTHY = RoundStatistics(1, 10, 10, 0, tokens=40.0, cut=0.1, empty=0.0, repetition=0.05, entropy=0.8)


def test_rounds_walk_through_the_data():
    settings = replace(SETTINGS, rounds=5, prompts_per_round=4)
    rounds = [Round.of(settings, number, 10) for number in range(1, 6)]
    assert [list(part.rows) == sorted(part.rows) for part in rounds] == [True] * 5
    first_lap = [row for part in rounds[:2] for row in part.rows]
    assert len(set(first_lap)) == 8
    assert set(first_lap) | set(rounds[2].rows) == set(range(10))
    assert rounds == [Round.of(settings, number, 10) for number in range(1, 6)]
    assert list(Round.of(replace(settings, rounds=1, prompts_per_round=None), 1, 10).rows) == list(range(10))
    assert [len(Round.of(replace(settings, lmbda=share), 1, 10).asked) for share in (0, 0.5, 1)] == [0, 2, 4]


def test_answers_become_rows(tokenizer):
    rows = [{"input": text, "output": "Good"} for text in ("one", "two", "three")]
    prompts = Prompts.of(replace(SETTINGS, lmbda=0.5), tokenizer, rows)
    part = Round(1, [0, 1, 2], frozenset({0, 2}))
    answers = [
        StudentAnswer(0, [5, 6], -1.0, True, ""),
        StudentAnswer(0, [7], -1.0, False, ""),
        StudentAnswer(2, [], 0.0, True, ""),
    ]
    numbered, of_answers = student_answers.training_rows(part, prompts, answers, end=9)
    numbers, encoded = zip(*numbered, strict=True)
    assert numbers == (0, 0, 1, 2)
    first, own, third = (prompts.prompts[0], prompts.rows[1], prompts.prompts[2])
    assert [row.input_ids for row in encoded] == [[*first, 5, 6, 9], [*first, 7], own.input_ids, [*third, 9]]
    assert [row.prompt_length for row in of_answers] == [len(first), len(first), len(third)]
    assert prompts.longest(20) == (max(len(first), len(third), len(prompts.prompts[1])) + 20, 20)


@pytest.mark.parametrize("whole", [False, True])
def test_a_long_prompt_leaves_room_for_an_answer(whole, tokenizer, capsys):
    """One that is long before its question cannot be cut."""
    instructed = [{"role": "system", "content": "word " * 60}, {"role": "user", "content": "short"}]
    rows = [{"input": "word " * 60}, {"input": "short"}, {"input": instructed}]
    long, short, never = Prompts.of(replace(SETTINGS, idp_mode=whole), tokenizer, rows).prompts
    said = "2 of 3 prompts left out, to" if whole else "1 of 3 prompts cut, 1 of 3 prompts left out, to"
    assert f"d: {said} leave room" in capsys.readouterr().err
    assert short is not None and never is None
    assert long is None if whole else 10 < len(long) <= 20


def test_the_own_token_is_kept():
    logits = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0, 0.0]]).repeat(3, 1)
    targets = Targets(drawn=False, own=True, k=2, temperature=1.0, vocabulary=5, layers=[])
    kept = targets.outcomes(logits, torch.tensor([0, 4, 5]), torch.empty(3, 0))
    assert kept["ids"].tolist() == [[0, 1], [0, 4], [0, 1]]  # 5 is none of the shared vocabulary
    p = logits[0, :5].softmax(dim=0)
    assert kept["logprobs"].exp()[1].tolist() == pytest.approx([float(p[0]), float(p[4])])
    assert kept["rest"].tolist() == pytest.approx([float(p[2:].sum()), float(p[1:4].sum()), float(p[2:].sum())])
    plain = replace(targets, own=False).outcomes(logits, torch.tensor([0, 4, 5]), torch.empty(3, 0))
    assert plain["ids"].tolist() == [[0, 1]] * 3


@pytest.mark.parametrize("as_tree", [False, True])
def test_special_tokens_are_not_learnt_from(as_tree, tmp_path):
    rows = [Encoded([1, 2, 3, 50, 4, 9], 2), Encoded([1, 2, 6, 9], 2), Encoded([1, 50, 50, 7], 2)]
    cache = TeacherCache(tmp_path, {}, record_type(1))
    tokens = sum(map(teacher_cache.completion_tokens, rows))
    cache.add(rows, pack(cache.record, np.arange(tokens)[:, None], np.zeros(tokens), logprobs=np.zeros((tokens, 1))))
    whole = fill_cache.collate(rows, 0, cache, as_tree=as_tree)
    batch = fill_cache.collate(rows, 0, cache, as_tree=as_tree, unlearnt=[50])
    assert whole["teacher"]["ids"][:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert batch["teacher"]["ids"][:, 0].tolist() == [0, 2, 3, 4, 5, 7]
    assert batch["labels"][batch["labels"] != IGNORE].tolist() == [3, 4, 9, 6, 9, 7]
    if as_tree:
        sources = whole[prefix_tree.NAME].sources
        assert batch[prefix_tree.NAME].sources == [sources[place] for place in (0, 2, 3, 4, 5, 7)]


def test_which_tokens_are_special(tokenizer):
    unlearnt = student_answers.unlearnt_tokens(tokenizer)
    assert tokenizer.eos_token_id not in unlearnt
    assert tokenizer.convert_tokens_to_ids("<|im_start|>") in unlearnt


def test_repetition():
    assert round_statistics.repetition([1, 2, 3]) == 0
    assert round_statistics.repetition(list(range(20))) == 0
    assert round_statistics.repetition([1, 2] * 10) == pytest.approx(15 / 17)


def test_figures_of_answers():
    answers = [
        StudentAnswer(0, [1, 2, 3], -3.0, True, ""),
        StudentAnswer(0, [4], -0.5, False, ""),
        StudentAnswer(3, [], 0.0, True, ""),
    ]
    told = round_statistics.of_answers(2, answers, own_rows=5)
    assert (told.round, told.prompts, told.answers, told.own_rows) == (2, 2, 3, 5)
    assert (told.tokens, told.cut, told.empty) == pytest.approx((4 / 3, 1 / 3, 1 / 3))
    assert told.entropy == pytest.approx(3.5 / 4)
    assert round_statistics.of_answers(2, answers, 5, temperature=0.7) == replace(told, entropy=None)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, None),
        ({"empty": 0.6}, "60 % of its answers are empty"),
        ({"repetition": 0.7}, "70 % of what its answers say they have said before"),
        ({"cut": 0.8}, "80 % of its answers do not end, against 10 % in round 1"),
        ({"tokens": 9.0}, "9.0 tokens, against 40.0 in round 1"),
        ({"entropy": 0.07}, "entropy of its answers is 0.070 nats a token, against 0.800"),
        ({"entropy": 4.0}, "entropy of its answers is 4.000"),
        ({"entropy": None}, None),
        ({"cut": 0.45, "tokens": 90.0, "entropy": 0.2, "repetition": 0.4}, None),
    ],
)
def test_what_is_a_collapse(change, words):
    why = round_statistics.collapse(HEALTHY, replace(HEALTHY, round=3, **change))
    assert (why is None) if words is None else words in why


def test_a_student_that_was_sure_from_the_start_may_stay_so():
    sure = replace(HEALTHY, entropy=0.01)
    assert round_statistics.collapse(sure, replace(sure, round=2, entropy=0.0001)) is None
    assert round_statistics.collapse(HEALTHY, RoundStatistics(2, 0, 0, 10)) is None


def test_a_rounds_seed_is_one_that_all_generators_take(tmp_path):
    settings = DistillSettings(student="s", save_dir=str(tmp_path), seed=LARGEST_SEED)
    rounds = on_policy.Rounds(settings, None, None, None, None, [], [])
    assert [on_policy.settings_of_round(rounds, number).seed for number in (1, 2, 3)] == [LARGEST_SEED, 0, 1]


@pytest.mark.parametrize("lora_r", [16, 0])
def test_a_student_that_fits_in_4_bits_alone_writes_in_them(lora_r, base, teacher, tmp_path, monkeypatch):
    """And is trained in them, the same base."""

    def preflight(plan, flags, *, auto_fit, **of_the_line):
        return {"load_in_4bit": "on", "max_batch_tokens": 512} if flags is on_policy.preflight.INFERENCE else {}

    monkeypatch.setattr(on_policy.preflight, "preflight", preflight)
    record = RunRecord(str(tmp_path), ["distill_train.py"], {}, method="distill")
    settings = replace(SETTINGS, student=base, teacher=teacher, lora_r=lora_r, auto_fit=True)
    prompts = SimpleNamespace(longest=lambda new: (40, new))
    if lora_r == 0:
        with pytest.raises(UserError, match=r"would write in 4 bits alone, .*; give --lora_r 16 or a smaller"):
            on_policy.within_memory(settings, record, prompts)
        return
    fitted = on_policy.within_memory(settings, record, prompts)
    assert student_answers.source_of(fitted, base).load_in_4bit == fitted.source.load_in_4bit == "on"
    assert fitted.max_batch_tokens == 512
    assert record.facts["auto_fit"] == {"load_in_4bit": "on", "max_batch_tokens": 512}
