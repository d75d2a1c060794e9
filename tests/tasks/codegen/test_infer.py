"""infer_codegen.py: code for tasks."""

from __future__ import annotations

import re

import pytest
from support.inputs import CORPUS, read_rows, write_rows

import infer_codegen
from common import cli
from common.generation.decoding import Decoding
from common.tasks.codegen import answer, repair
from common.tasks.codegen.style import COMPLETION, UNTRAINED
from common.tasks.codegen.writer import CodeAnswer, CodeWriter


def infer(capsys, *argv: str) -> tuple[int, str, str]:
    code = cli.run(infer_codegen.main, argv)
    told = capsys.readouterr()
    return code, told.out, told.err


def test_code_is_printed_alone(tiny_base, scripted, capsys):
    scripted({"Add.": ["def add(a, b):\n    return a + b", "def add("]})
    ask = ["--model_dir", tiny_base, "--prompt", "Add."]
    assert infer(capsys, *ask) == (0, "def add(a, b):\n    return a + b\n", "")
    assert infer(capsys, *ask, "--plan_then_code") == (0, "def add(a, b):\n    return a + b\n", "- Think.\n\n")
    code, out, err = infer(capsys, *ask, "--plan_then_code", "--show_plan")
    assert (code, out.splitlines()[0], err) == (0, "# - Think.", "")
    code, out, err = infer(capsys, *ask, "--num_samples", "2")
    assert code == cli.FAILED and err == "error: sample 2 does not compile (line 1: '(' was never closed)\n"
    assert out == "# sample 1 of 2\ndef add(a, b):\n    return a + b\n# sample 2 of 2\ndef add(\n"


def test_a_real_model_answers(base, capsys):
    """Random weights rarely write Python: the exit code says so; greedy is the same every time, a seed decides else."""
    argv = ["--model_dir", base, "--prompt", "Add a and b.", "--max_new_tokens", "12"]
    code, out, err = infer(capsys, *argv, "--plan_then_code")
    error = answer.compile_error(out)
    assert (error is not None) == (f"the code does not compile ({error})" in err)
    assert (code == cli.FAILED) == (error is not None or "the code is cut off after 12 tokens" in err)
    assert infer(capsys, *argv, "--plan_then_code")[:2] == (code, out)
    hot = [infer(capsys, *argv, "--temperature", "2", "--seed", seed)[1] for seed in "112"]
    assert hot[0] == hot[1] != hot[2]


def test_files_of_tasks(tiny_base, scripted, capsys, tmp_path):
    writer = scripted({"Add.": ["x = 1"], "Break.": ["def f(:"]})
    rows = write_rows(tmp_path / "tasks.jsonl", [{"prompt": "Add."}, {"input": "Break.", "id": 7}])
    ask = ["--model_dir", tiny_base, "--input", rows, "--output", str(tmp_path / "out" / "answers.jsonl")]
    code, out, err = infer(capsys, *ask, "--plan_then_code")
    assert (code, out) == (cli.FAILED, "") and "1 of 2 answers do not compile" in err
    first, second = read_rows(tmp_path / "out/answers.jsonl")
    assert first == {
        "model_name": tiny_base,
        "prompt": "Add.",
        "answers": [{"plan": "- Think.", "code": "x = 1", "error": None}],
    }
    assert second["answers"][0]["error"] == "line 1: invalid syntax" and writer.asked == 2
    bad = write_rows(tmp_path / "bad.jsonl", [{"prompt": "Add."}, {"text": "x"}])
    code, out, err = infer(capsys, "--model_dir", tiny_base, "--input", bad, "--output", str(tmp_path / "x.jsonl"))
    assert code == cli.BAD_INPUT and "bad.jsonl, line 2: no task under 'prompt' or 'input'" in err


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([], "give either --prompt, or --input and --output together"),
        (["--prompt", " "], "--prompt is empty"),
        (["--prompt", "x", "--input", "y"], "give either --prompt"),
        (["--input", "a.jsonl", "--output", "a.jsonl"], "would replace --input"),
        (["--prompt", "x", "--show_plan"], "--show_plan goes with --plan_then_code"),
        (["--prompt", "x", "--num_samples", "2", "--temperature", "0"], "needs a --temperature above 0"),
        (["--prompt", "x", "--temperature", "-1"], "--temperature must be 0 or more"),
        (["--prompt", "x", "--top_p", "0"], "--top_p above 0"),
        (["--prompt", "x", "--num_samples", "0"], "argument --num_samples"),
    ],
)
def test_infer_refuses(tiny_base, capsys, flags, sentence):
    code, out, err = infer(capsys, "--model_dir", tiny_base, *flags)
    assert (code, out) == (cli.BAD_INPUT, "") and sentence in err and err.count("\n") == 1


def test_a_task_that_is_too_long_is_refused_before_the_model_loads(
    tiny_base, tokenizer, scripted, capsys, tmp_path, monkeypatch
):
    task = "Add a and b. " * 1500
    monkeypatch.setattr(CodeWriter, "load", classmethod(lambda cls, *source, **how: pytest.fail("it was loaded")))
    rows = write_rows(tmp_path / "tasks.jsonl", [{"prompt": "Add."}, {"prompt": task}])
    for flags in (["--prompt", task], ["--input", rows, "--output", str(tmp_path / "out.jsonl")]):
        code, out, err = infer(capsys, "--model_dir", tiny_base, *flags)
        assert (code, out) == (cli.BAD_INPUT, "")
        number = 1 if flags[0] == "--prompt" else 2
        assert re.search(rf"task {number} has [\d,]+ tokens and with 512 new ones does not fit .* of 2,048;", err)
    task = CORPUS[0] * 11
    assert len(tokenizer.encode(task)) + 512 < 2048 < len(task.encode()) + 512  # its bytes alone do not tell
    scripted({task: ["y = 1"]})
    assert infer(capsys, "--model_dir", tiny_base, "--prompt", task)[:2] == (0, "y = 1\n")


# Code that is tried.

ADD, SUB = "def add(a, b):\n    return a + b", "def add(a, b):\n    return a - b"
TRY = ["--prompt", "Write add(a, b).", "--confirm_run_unsafe_code", "--test", "assert add(1, 2) == 3"]


@pytest.fixture
def tried(monkeypatch):
    """`tried([code, ...])`: a model answers so, in turn; gives the list of what it was asked."""

    def use(codes: list[str], chat: bool = True) -> list[tuple[str, Decoding]]:
        asked: list[tuple[str, Decoding]] = []

        class Writer:
            style = UNTRAINED if chat else COMPLETION

            def write(self, tasks, decoding, plans=None):
                asked.append((tasks[0], decoding))
                return [[CodeAnswer(codes[len(asked) - 1], "", True, 9)]]

        monkeypatch.setattr(CodeWriter, "load", classmethod(lambda cls, *source, **how: Writer()))
        return asked

    return use


def test_code_is_tried_until_it_passes(tiny_base, tried, capsys):
    asked = tried([SUB, f"{ADD}\n\nprint(add(x, y))", "never"])
    code, out, err = infer(capsys, "--model_dir", tiny_base, *TRY)
    assert (code, out) == (0, f"{ADD}\n\nprint(add(x, y))\n")
    assert "try 1 of 3 fails (assertion: assert add(1, 2) == 3)\ntry 2 of 3 passes\n" in err
    (first, _), (second, decoding) = asked
    assert first == "Write add(a, b).\nIt must pass this test:\nassert add(1, 2) == 3"
    assert second.startswith(first) and SUB in second and "assertion: assert add(1, 2) == 3" in second
    assert decoding.seed == 1 and decoding.temperature == 0


def test_the_last_try_is_shown_and_fails(tiny_base, tried, capsys):
    tried([SUB, "def add(a, b):\n    return c"], chat=False)
    code, out, err = infer(capsys, "--model_dir", tiny_base, *TRY, "--max_tries", "2")
    assert (code, out) == (cli.FAILED, "def add(a, b):\n    return c\n") and "NameError" in err


def test_a_model_that_takes_no_turns_is_sampled_again(tiny_base, tried, capsys):
    asked = tried([SUB, ADD], chat=False)
    assert infer(capsys, "--model_dir", tiny_base, *TRY)[0] == 0
    assert [text for text, _ in asked] == [asked[0][0]] * 2
    assert [decoding.temperature for _, decoding in asked] == [0, repair.TEMPERATURE]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (TRY[:2] + TRY[3:], "pass --confirm_run_unsafe_code if you agree"),
        ([*TRY, "--plan_then_code"], "--test goes with --prompt alone"),
        ([*TRY[:-1], "assert ("], "is not Python"),
    ],
)
def test_tries_are_refused(tiny_base, capsys, flags, sentence):
    code, out, err = infer(capsys, "--model_dir", tiny_base, *flags)
    assert (code, out) == (cli.BAD_INPUT, "") and sentence in err


def test_code_that_is_cut_off_is_said(tiny_base, monkeypatch, capsys, tmp_path):
    class Writer:
        def write(self, tasks, decoding, plans=None, streamer=None):
            return [[CodeAnswer("def f():\n    x = 1", "", False, 12, cut=True)] for _ in tasks]

        def write_each(self, tasks, decoding, plan_first=False):
            return enumerate(self.write(tasks, decoding))

    monkeypatch.setattr(CodeWriter, "load", classmethod(lambda cls, *source, **how: Writer()))
    code, _, err = infer(capsys, "--model_dir", tiny_base, "--prompt", "Write f().")
    assert code == cli.FAILED and "the code is cut off after 12 tokens; raise --max_new_tokens" in err
    rows = write_rows(tmp_path / "tasks.jsonl", [{"prompt": "Write f()."}])
    out = tmp_path / "out.jsonl"
    code, _, err = infer(capsys, "--model_dir", tiny_base, "--input", rows, "--output", str(out))
    assert code == cli.FAILED and "1 of 1 answers are cut off" in err
    assert read_rows(out)[0]["answers"] == [{"plan": "", "code": "def f():\n    x = 1", "error": None, "cut": True}]
