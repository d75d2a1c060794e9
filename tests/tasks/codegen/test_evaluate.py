"""eval_codegen.py: from code to figures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.code_problems import HELD_OUT, TRAIN, Scripted, problem, right, wrong
from support.inputs import read_rows, write_rows

import eval_codegen
from common import cli, run_record
from common.sandbox import grading
from common.tasks.codegen.writer import CodeAnswer, CodeWriter

pytestmark = pytest.mark.processes


@pytest.fixture
def val(tmp_path) -> str:
    return write_rows(tmp_path / "val.jsonl", [problem(number) for number in HELD_OUT])


@pytest.fixture
def evaluate(val, capsys):
    """`evaluate(model_dir, ..., flag, ...)`: the last line of stdout as JSON."""

    def run(*argv: str) -> dict:
        capsys.readouterr()
        eval_codegen.main(["--data", val, "--confirm_run_unsafe_code", "--model_dir", *map(str, argv)])
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


def test_figures_are_those_of_the_answers(evaluate, scripted, tiny_base, tmp_path):
    a, b, c, d = HELD_OUT
    task = {number: problem(number)["prompt"] for number in HELD_OUT}
    answers = {
        task[a]: [right(a), right(a)],
        task[b]: [right(b), wrong(b)],
        task[c]: ["def plus(", "import os\n\n\n" + wrong(c)],
        task[d]: ["", "unfinished ("],
    }
    scripted(answers)
    result = evaluate(tiny_base, "--num_samples", "2", "--k", "1,2", "--report_dir", str(tmp_path / "report"))
    (model,) = result["models"]
    assert (result["evaluator"], result["version"], result["n"], result["k"]) == ("codegen", 1, 4, [1, 2])
    assert result["contamination"] == {"rows": 0, "of": 4} and result["decoding"]["temperature"] == 0.8
    assert model["pass_at_1"]["value"] == pytest.approx((1 + 0.5) / 4)
    assert model["pass_at_2"]["value"] == pytest.approx(2 / 4)
    assert model["compile_rate"]["value"] == pytest.approx(5 / 8)
    assert model["lint_rate"]["value"] == pytest.approx(4 / 8)  # an unused import besides
    assert model["test_pass_rate"]["value"] == pytest.approx((2 + 1 + 0.5 + 0.5) / 8)
    assert model["errors"] == {"passed": 3, "assertion": 2, "syntax": 1, "no function": 1, "unfinished": 1}
    stored = json.loads((tmp_path / "report/metrics.json").read_text())
    failures = {each["error"]: each for each in stored["models"][0]["failures"]}
    assert failures["assertion"]["count"] == 2 and failures["assertion"]["examples"][0]["code"] == wrong(b)
    assert "failures" not in model
    page = (tmp_path / "report/report.html").read_text()
    assert "pass@2" in page and "def plus(" in page and "http" not in page.replace("http-equiv", "")
    assert all((tmp_path / "report" / name).read_bytes()[:4] == b"\x89PNG" for name in ("rates.png", "outcomes.png"))


def test_plan_then_code_is_judged_beside_direct_answers(evaluate, tiny_base, monkeypatch):
    class Planner(Scripted):
        def write(self, tasks, decoding, plans=None, **more):
            made = right if plans else wrong
            return [
                [CodeAnswer(made(number), "", True, 9)] for number in HELD_OUT if problem(number)["prompt"] in tasks
            ]

    loads = []
    monkeypatch.setattr(CodeWriter, "load", classmethod(lambda cls, *source, **how: loads.append(0) or Planner({})))
    model = evaluate(tiny_base, "--plan_then_code")["models"][0]
    assert len(loads) == 1
    assert (model["pass_at_1"]["value"], model["plan_then_code"]["pass_at_1"]["value"]) == (0, 1)
    assert model["plan_difference"]["pass_at_1"] == {"value": 1, "low": 1, "high": 1}
    assert "plan_then_code" not in evaluate(tiny_base)["models"][0]


def test_tries_are_judged_beside_direct_answers(evaluate, tiny_base, tmp_path, monkeypatch):
    """An answer that fails its problem's first test is asked for again; one that fails another test is not."""
    a, b, c, d = HELD_OUT
    task = {number: problem(number)["prompt"] for number in HELD_OUT}
    passes_the_first = f"def plus{c}(n):\n    return {c + 1} if n == 1 else 0"
    direct = {task[a]: right(a), task[b]: wrong(b), task[c]: passes_the_first, task[d]: wrong(d)}
    asked = []

    class Mender(Scripted):
        def write(self, tasks, decoding, plans=None, **more):
            asked.extend(tasks)
            return [[CodeAnswer(direct.get(text) or self.again(text), "", True, 9)] for text in tasks]

        def again(self, text: str) -> str:
            assert "This code for it is wrong" in text and "assertion" in text
            return right(b) if task[b] in text else wrong(d)

    writer = Mender({})
    writer.style = SimpleNamespace(chat=True)
    monkeypatch.setattr(CodeWriter, "load", classmethod(lambda cls, *source, **how: writer))
    report = ["--report_dir", str(tmp_path / "report")]
    model = evaluate(tiny_base, "--max_tries", "3", *report)["models"][0]
    assert (model["pass_at_1"]["value"], model["tried"]["pass_at_1"]["value"]) == (1 / 4, 2 / 4)
    assert model["tried_difference"]["pass_at_1"]["value"] == 1 / 4
    assert len(asked) == 4 + 2 + 1 and problem(b)["tests"][0] in asked[4]
    assert "tried - direct" in (tmp_path / "report/report.html").read_text()
    assert evaluate(tiny_base, "--max_tries", "3", *report)["models"][0]["tried"] == model["tried"] and len(asked) == 7


def test_tries_need_a_test_to_keep_back(evaluate, tiny_base, val):
    Path(val).write_text(json.dumps({**problem(HELD_OUT[0]), "tests": problem(HELD_OUT[0])["tests"][:1]}) + "\n")
    with pytest.raises(cli.UserError, match="1 of 1 problems have one test alone"):
        evaluate(tiny_base, "--max_tries", "2")
    with pytest.raises(cli.UserError, match="--max_tries goes with one answer"):
        evaluate(tiny_base, "--max_tries", "2", "--num_samples", "2")


def test_a_second_run_goes_on(evaluate, scripted, tiny_base, tmp_path, monkeypatch):
    answers = {problem(number)["prompt"]: [right(number)] for number in HELD_OUT}
    writer = scripted(answers)
    report = ["--report_dir", str(tmp_path / "report")]
    first = evaluate(tiny_base, "--max_problems", "2", *report)
    assert writer.asked == 2 and first["n"] == 2
    runs = []
    grade_many = grading.grade_many
    monkeypatch.setattr(grading, "grade_many", lambda pairs, **more: runs.extend(pairs) or grade_many(pairs, **more))
    assert evaluate(tiny_base, *report)["models"][0]["pass_at_1"]["value"] == 1
    assert writer.asked == 4 and len(runs) == 2  # only what was not there
    evaluate(tiny_base, *report)
    assert writer.asked == 4 and len(runs) == 2
    evaluate(tiny_base, *report, "--max_new_tokens", "99")  # other settings, the same code
    assert writer.asked == 8 and len(runs) == 2


def test_a_killed_run_keeps_each_answer(evaluate, scripted, tiny_base, tmp_path):
    answers = {problem(number)["prompt"]: [right(number)] for number in HELD_OUT}
    writer = scripted(dict(list(answers.items())[:2]))  # the third raises
    report = ["--report_dir", str(tmp_path / "report")]
    with pytest.raises(KeyError):
        evaluate(tiny_base, *report)
    assert len(read_rows(tmp_path / "report/answers.jsonl")) == 2
    writer.answers, writer.asked = answers, 0
    assert evaluate(tiny_base, *report)["models"][0]["pass_at_1"]["value"] == 1
    assert writer.asked == 2


def test_usage_at_the_top_level_is_not_run_unless_asked_for(evaluate, scripted, tiny_base):
    scripted({problem(number)["prompt"]: [right(number) + "\n\nprint(nobody_knows)"] for number in HELD_OUT})
    assert evaluate(tiny_base)["models"][0]["pass_at_1"]["value"] == 1
    model = evaluate(tiny_base, "--keep_main")["models"][0]
    assert (model["pass_at_1"]["value"], model["errors"]) == (0, {"exception:NameError": 4})


def test_a_try_is_run_as_it_is_judged(evaluate, tiny_base, tmp_path, monkeypatch):
    """With --keep_main an answer that fails by what it does at its top level is asked for again."""

    class Mender(Scripted):
        def write(self, tasks, decoding, plans=None, **more):
            self.asked += len(tasks)
            usage = "" if decoding.seed else "\n\nprint(nobody_knows)"
            of_task = [number for text in tasks for number in HELD_OUT if f"plus{number}(n)" in text]
            return [[CodeAnswer(right(number) + usage, "", True, 9)] for number in of_task]

    writer = Mender({})
    writer.style = SimpleNamespace(chat=True)
    monkeypatch.setattr(CodeWriter, "load", classmethod(lambda cls, *source, **how: writer))
    tried = ["--max_tries", "2", "--report_dir", str(tmp_path / "report")]
    assert evaluate(tiny_base, *tried)["models"][0]["tried"]["pass_at_1"]["value"] == 1 and writer.asked == 4
    model = evaluate(tiny_base, *tried, "--keep_main")["models"][0]
    assert (model["pass_at_1"]["value"], model["tried"]["pass_at_1"]["value"]) == (0, 1) and writer.asked == 8


def test_problems_of_the_training_are_counted(evaluate, scripted, tiny_base, tmp_path):
    scripted({problem(number)["prompt"]: [right(number)] for number in HELD_OUT})
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(Path(tiny_base) / "config.json", run)
    run_record.write_groups(run, {problem(number)["group"] for number in [*HELD_OUT[:3], *TRAIN]})
    result = evaluate(tiny_base, run)
    assert result["contamination"] == {"rows": 3, "of": 4}
    assert [model["contamination"]["rows"] for model in result["models"]] == [0, 3]
    (difference,) = result["differences"]
    assert (difference["a"], difference["pass_at_1"]["value"]) == (str(run), 0)


def test_the_tests_themselves_are_judged(tmp_path, capsys):
    weak = problem(TRAIN[0]) | {"task_id": "weak", "tests": [f"assert plus{TRAIN[0]}(1)"]}
    broken = problem(HELD_OUT[0]) | {"task_id": "broken", "solution": wrong(HELD_OUT[0])}
    data = write_rows(tmp_path / "rows.jsonl", [problem(HELD_OUT[1]), weak, broken])
    eval_codegen.main(["--data", data, "--check_tests", "--confirm_run_unsafe_code"])
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    assert (result["reference"]["passed"], result["pass"]["passed"], result["constant"]["passed"]) == (2, 0, 1)
    assert [each["task_id"] for each in result["reference"]["unexpected"]] == ["broken"]
    assert {each["task_id"] for each in result["constant"]["unexpected"]} == {"weak"}
    assert "reference: 2 of 3 problems passed" in out and "problem weak: return True" in out


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([], "pass --confirm_run_unsafe_code if you agree"),
        (["--confirm_run_unsafe_code", "--k", "1,5"], "--k 5 needs at least as many samples; pass --num_samples 5"),
        (["--confirm_run_unsafe_code", "--k", "0"], "--k 0 is not a list of numbers"),
        (["--confirm_run_unsafe_code", "--k", "1;2"], "--k 1;2 is not a list of numbers"),
        (["--confirm_run_unsafe_code", "--check_tests"], "give either --model_dir"),
        (["--confirm_run_unsafe_code", "--split", "dev"], "has no problem of the dev part"),
    ],
)
def test_eval_refuses(tiny_base, val, capsys, flags, sentence):
    assert cli.run(eval_codegen.main, ["--data", val, "--model_dir", tiny_base, *flags]) == cli.BAD_INPUT
    told = capsys.readouterr()
    assert told.out == "" and sentence in told.err
