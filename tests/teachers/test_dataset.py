"""Reasons, preference pairs, probabilities; agreement with gold."""

from __future__ import annotations

import math

import pytest
from support.inputs import CORPUS, LABELS, SHARED
from support.teacher import SCHEMA, generate, lines, numbered, question_of, rejects_of, run_of

import teacher_generate
from common.cli import UserError
from common.data import rows as records
from common.distillation.rows import read_labelled
from common.models.source import ModelSource
from common.tasks.ranking.creditmix import CREDITMIX
from common.tasks.ranking.task import LabelTask
from common.teachers.label_probabilities import distribution
from common.teachers.preferences import Candidate, best_and_worst
from common.teachers.tasks import Documents, Item, Labels, UnusableAnswer, held_out, read_items


def test_reasons(stub, files):
    rows = numbered(2, output="Good", group="ab" * 8)
    said = ["Low debt.\nHigh income.\n\n**Answer:** Good", "Answer: Good", "Much debt. Answer:\nanswer: Bad"]
    stub.reply = lambda body: said[0] if "Age: 20" in question_of(body) else said[1 + len(body["messages"]) // 2]
    assert generate(stub, *files(rows), "--reasons") == 0
    first, second = lines(files.out)
    assert first == {
        "input": rows[0]["input"], "teacher_output": "Good", "reason": "Low debt.\nHigh income.", "output": "Good",
        "group": "ab" * 8,
    }  # fmt: skip
    assert (second["teacher_output"], second["reason"]) == ("Bad", "Much debt. Answer:")
    for row in rows:
        asked = {question_of(body) for body in stub.asked if question_of(body).startswith(row["input"])}
        assert len(asked) == 1 and 'begins with "Answer:"' in asked.pop()
    asked = len(stub.asked)
    assert generate(stub, *files(rows), "--reasons", "rows") == 0
    assert len(stub.asked) == asked
    label, rationale = lines(files.out)[:2]
    assert label == first
    assert rationale["input"].startswith(rows[0]["input"] + "\n\nExplain")
    assert (rationale["teacher_output"], rationale["group"]) == ("Low debt.\nHigh income.", "ab" * 8)


def test_pairs_by_gold(stub, files, capsys):
    """Four samples a row, each with a seed of its own; the best and the worst of them."""
    rows = numbered(3, output="Good", group="ab" * 8)
    said = {"20": ["Bad", "Good", "Good", "Bad"], "21": ["Bad", "hm", "Bad", "Standard"], "22": ["Good"] * 4}
    stub.reply = lambda body: said[question_of(body)[-2:]][body["seed"]]
    assert generate(stub, *files(rows), "--preferences") == 0
    assert lines(files.out) == [
        {"prompt": rows[0]["input"], "chosen": "Good", "rejected": "Bad", "output": "Good", "group": "ab" * 8}
    ]
    assert len(records.read_rows(files.out, records.DPO_KEYS)) == 1  # as dpo_train.py reads them
    assert [(row["row"], row["reason"].partition(";")[0]) for row in rejects_of(files)] == [
        (2, "none of the answers agrees with gold"),
        (3, "all answers are the same"),
    ]
    assert {(body["seed"], body["temperature"]) for body in stub.asked} == {(seed, 0.8) for seed in range(4)}
    found = run_of(files)["agreement_with_gold"]
    assert (found["agree"], found["of"]) == (1, 3)  # of first answers: what is chosen by gold always agrees with it
    assert run_of(files)["statement"] == "The first answer is right in 1 of 3 rows."
    assert "warning" not in capsys.readouterr().err


def test_pairs_by_the_teachers_own_ranking(stub, files):
    rows = numbered(3)
    said = {"20": ["Good", "Bad", "Good"], "21": ["Bad", "hm", "Bad"], "22": ["x", "y", "z"]}

    def reply(body):
        if "Which answer is the best" in question_of(body):
            return "the second" if len(body["messages"]) == 1 else "Best: 2\nWorst: 1"
        return said[question_of(body)[-2:]][body["seed"]]

    stub.reply = reply
    assert generate(stub, *files(rows), "--preferences", "--num_samples", "3", "--rank_by", "teacher") == 0
    assert lines(files.out) == [
        {"prompt": rows[0]["input"], "chosen": "Bad", "rejected": "Good"},
        {"prompt": rows[1]["input"], "chosen": "Bad", "rejected": "hm"},
    ]
    assert [row["reason"] for row in rejects_of(files)] == ["none of the answers can be used"]
    (ranking,) = (body for body in stub.asked if len(body["messages"]) == 3)
    assert "Answer 1:\nGood\n\nAnswer 2:\nBad" in question_of(ranking) and rows[0]["input"] in question_of(ranking)
    assert "two different numbers from 1 to 2" in ranking["messages"][2]["content"]


def test_thinking_is_no_side_of_a_pair(stub, files):
    """Not of an answer that cannot be used either; one that is still thinking has said nothing."""
    rows, said = numbered(2, output="Good"), ["<think>Bad?</think>Good", "<think>hm</think>I cannot say", "<think>oh"]
    stub.reply = lambda body: said[body["seed"] if "Age: 20" in question_of(body) else body["seed"] % 2 * 2]
    assert generate(stub, *files(rows), "--preferences", "--num_samples", "3") == 0
    assert [(row["chosen"], row["rejected"]) for row in lines(files.out)] == [("Good", "I cannot say")]
    assert rejects_of(files)[0]["reason"].startswith("all answers are the same")


def test_the_best_and_the_worst():
    """By use first, then by score; an answer that was understood is better than one that was not."""
    task, item = Documents(SCHEMA), Item(1, "?", '{"company":"A","total":1}')
    half, whole = Candidate("half", (True, 0.5, True)), Candidate("whole", (True, 1.0, True))
    broken = Candidate("broken", (False, 0.0, False))
    for found, sides in (([half, whole], ("whole", "half")), ([broken, half, whole], ("whole", "broken"))):
        pair = best_and_worst(task, item, found)
        assert (pair.chosen, pair.rejected, pair.fault) == (*sides, None)
    assert best_and_worst(task, item, [broken]).fault == "none of the answers can be used"
    assert best_and_worst(task, item, [whole]).fault.startswith("all answers are the same")
    assert best_and_worst(task, item, [half, Candidate("other", half.quality)]).fault.startswith("the answers differ")


def test_label_distribution():
    """Masses by hand: tokens that begin one label's word count, the rest of the mass bounds an absent label."""

    def top(**found: float) -> list[tuple[str, float]]:
        return [(token, math.log(probability)) for token, probability in found.items()]

    found, uncovered = distribution([*top(Good=0.5, St=0.2, The=0.1), (" good", math.log(0.1))], CREDITMIX)
    # Good 0.6, Standard 0.2; Bad, absent, at most what is left over: 1 - 0.9
    assert found == pytest.approx({"Good": 0.6 / 0.9, "Standard": 0.2 / 0.9, "Bad": 0.1 / 0.9}, abs=1e-5)
    assert uncovered == pytest.approx(0.2)
    found, uncovered = distribution(top(Bad=0.9), CREDITMIX)
    assert found == pytest.approx({"Good": 0.05, "Standard": 0.05, "Bad": 0.9}) and uncovered == pytest.approx(0.1)
    severities = LabelTask("s", ("Low", "Lower"), "?", verbalizers={"Low": ["Minor"]})
    found, uncovered = distribution(top(Low=0.2, Lower=0.6, Minor=0.2), severities)
    assert found == pytest.approx({"Low": 0.25, "Lower": 0.75}) and uncovered == pytest.approx(0.2)  # Low may go on
    with pytest.raises(UnusableAnswer, match=r"no label is among the likeliest first tokens \('The', ' '\)"):
        distribution([("The", -0.1), (" ", -3.0)], CREDITMIX)


@pytest.mark.parametrize("found", [{"Low": 0.9, "High": 0.1}, {"Low": 0.5, "High": 0.5}, {"Low": 0.9}])
def test_where_the_first_token_begins_several_labels_no_label_is_the_likeliest(found):
    risks = LabelTask("risks", ("Low", "Low risk", "High"), "Rate the customer.")
    with pytest.raises(UnusableAnswer, match=r"the first token 'Low' begins several labels; ask a local model"):
        distribution([(token, math.log(probability)) for token, probability in found.items()], risks)


def test_probabilities_of_an_endpoint(stub, files, capsys):
    rows = numbered(2, output="Bad", group="ab" * 8)

    def reply(body):
        tops = {"Bad": 0.6, " Standard": 0.2, "Good": 0.1} if "Age: 20" in question_of(body) else {"I": 0.9}
        listed = [{"token": token, "logprob": math.log(p)} for token, p in tops.items()]
        return {"message": {"content": "Bad"}, "logprobs": {"content": [{"token": "Bad", "top_logprobs": listed}]},
                "finish_reason": "length"}  # fmt: skip

    stub.reply = reply
    assert generate(stub, *files(rows), "--probabilities", "--top_logprobs", "5") == 0
    assert (stub.asked[0]["logprobs"], stub.asked[0]["top_logprobs"], stub.asked[0]["max_tokens"]) == (True, 5, 1)
    (row,) = lines(files.out)
    assert row.keys() == {"input", "teacher_output", "probabilities", "uncovered_mass", "output", "group"}
    assert row["teacher_output"] == "Bad" and row["uncovered_mass"] == pytest.approx(0.1)
    assert row["probabilities"] == pytest.approx({"Good": 1 / 9, "Standard": 2 / 9, "Bad": 6 / 9}, abs=1e-5)
    assert rejects_of(files)[0]["reason"] == "no label is among the likeliest first tokens ('I')"
    assert run_of(files)["uncovered_mass"] == {"mean": 0.1, "max": 0.1, "rows_above_half": 0}
    shown = capsys.readouterr()
    assert (
        "probability that the labels did not cover: 0.1000 on average, 0.1000 at most, above a half in 0" in shown.out
    )
    assert "warning: The teacher gives" not in shown.err
    assert len(stub.asked) == 2  # a distribution is not asked for twice


def test_probabilities_of_a_local_model(base, files):
    from common.tasks.ranking.classifier import Classifier

    rows = [{"input": text, "output": "Good"} for text in CORPUS[:5]]
    argv = ["--teacher", base, *files(rows), "--probabilities"]
    assert teacher_generate.main(argv) is None
    classifier = Classifier.load(ModelSource(base), CREDITMIX)
    texts = [text.removeprefix(CREDITMIX.prompt("")) for text in CORPUS[:5]]
    wanted = classifier.answers(texts, classifier.calibration(None))
    found = lines(files.out)
    assert [row["teacher_output"] for row in found] == [answer["prediction"] for answer in wanted]
    for row, answer in zip(found, wanted, strict=True):
        assert row["probabilities"] == pytest.approx(answer["probabilities"], abs=1e-5)
    for form in ("csv", "parquet"):  # as distill_train.py --labels reads them
        table = str(files.out.with_suffix(f".{form}"))
        assert teacher_generate.main([*argv, "--out", table]) is None
        assert read_labelled(table, CREDITMIX) == read_labelled(str(files.out), CREDITMIX)
    with pytest.raises(UserError, match=r"out.csv: rows of --task codegen are written as JSONL; name it .jsonl"):
        teacher_generate.main(["--teacher", base, "--data", "x", "--task", "codegen", "--out", "out.csv"])
    with pytest.raises(UserError, match="row 1: the input does not begin with the instruction of creditmix"):
        teacher_generate.main(["--teacher", base, *files([{"input": "Age: 3"}]), "--probabilities"])


def test_a_teacher_that_is_worse_than_gold(stub, files, capsys):
    rows = numbered(60)
    for index, row in enumerate(rows):
        row["output"] = LABELS[index % 2]
    assert generate(stub, *files(rows)) == 0
    record = run_of(files)
    assert record["agreement_with_gold"].keys() == {"agree", "of", "value", "low", "high"}
    assert (record["agreement_with_gold"]["agree"], record["agreement_with_gold"]["value"]) == (30, 0.5)
    assert 0.35 < record["agreement_with_gold"]["low"] < 0.5 < record["agreement_with_gold"]["high"] < 0.65
    wanted = "The teacher is worse than the gold that it would replace: 30 of its 60 answers are wrong."
    assert record["statement"].startswith(wanted)
    shown = capsys.readouterr()
    assert f"warning: {wanted}" in shown.err and "agreement with gold: 30 of 60 answers, 0.500 [" in shown.out
    assert generate(stub, *files(numbered(60, output="Good"))) == 0
    assert "not significantly worse" in run_of(files)["statement"] and "warning" not in capsys.readouterr().err
    assert generate(stub, *files(numbered(60))) == 0
    assert run_of(files)["agreement_with_gold"] is None and "nothing is known" in run_of(files)["statement"]


def test_rows_of_held_out_groups_are_told(stub, files, capsys):
    groups = ["0" * 16, "f" * 16]  # validation, train
    rows = [row | {"group": group} for row, group in zip(numbered(2), groups, strict=True)]
    assert len([*held_out(read_items(files(rows)[1], Labels(CREDITMIX)))]) == 1
    assert generate(stub, *files(rows)) == 0
    assert "warning: 1 of 2 rows belong to groups that are held out" in capsys.readouterr().err


@pytest.mark.processes
def test_a_real_teachers_answers(stub, files):
    """The 300 rows that a real LLM labelled: it agrees with gold on 152."""
    path = SHARED / "data" / "creditmix" / "llm_teacher_300.csv"
    if not path.is_file():
        pytest.skip("needs the shared data")
    answers = {CREDITMIX.clean(row["question"]): row["teacher_label"]
               for _, row in records.numbered_rows(path)[1]}  # fmt: skip
    stub.reply = lambda body: answers[question_of(body).removeprefix(CREDITMIX.prompt(""))]
    assert generate(stub, "--data", str(path), "--out", str(files.out), "--concurrency", "16") == 0
    found = run_of(files)["agreement_with_gold"]
    assert (found["agree"], found["of"]) == (152, 300)
    assert run_of(files)["statement"].startswith(
        "The teacher is worse than the gold that it would replace: 148 of its 300"
    )
