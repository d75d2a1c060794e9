"""CodeGen through its scripts: from problems to rows, from tasks to code, from code to figures."""

from __future__ import annotations

import io
import json
import random
import re
import shutil
from pathlib import Path

import pytest
from support.inputs import write_rows

import codegen_prepare
import eval_codegen
import infer_codegen
import tiny_student
from common import cli, run_record
from common.data import splits
from common.models import adapters
from common.sandbox import grading
from common.tasks.codegen import prompt as codegen
from common.tasks.codegen import rows as code_problems
from common.tasks.codegen import writer as code_writer
from common.tasks.codegen.writer import CodeAnswer, CodeWriter
from common.training import miniature


def problem(number: int) -> dict:
    """Add `number` to n; its group, and so its part, is that of the number."""
    return {
        "task_id": number,
        "prompt": f"Write plus{number}(n) that returns n plus {number}.",
        "solution": f"def plus{number}(n):\n    return n + {number}",
        "tests": [f"assert plus{number}(1) == {number + 1}", f"assert plus{number}(-2) == {number - 2}"],
        "group": splits.group_hash(str(number)),
    }


PARTS = {number: splits.part_of(problem(number)["group"]) for number in range(1, 31)}
HELD_OUT = [number for number, part in PARTS.items() if part == "validation"][:4]
TRAIN = [number for number, part in PARTS.items() if part == "train"][:4]


def right(number: int) -> str:
    return problem(number)["solution"]


def wrong(number: int) -> str:
    """Passes the second test only."""
    return f"def plus{number}(n):\n    return {number - 2}"


# Preparing.


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Rows of eight problems, of which one solution fails its tests."""
    folder = tmp_path_factory.mktemp("prepared")
    rows = [problem(number) for number in TRAIN + HELD_OUT]
    rows[1]["solution"] = rows[1]["solution"].replace("+", "-")
    source = write_rows(folder / "problems.jsonl", rows)
    for out in ("one", "two"):
        codegen_prepare.main(["--src", source, "--outdir", str(folder / out)])
    return folder


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_prepared_rows(prepared):
    good = [number for number in TRAIN if number != TRAIN[1]]
    sft, kd, dpo, val = (rows_of(prepared / f"one/codegen_{what}.jsonl") for what in ("sft", "kd", "dpo", "val"))
    expected = [
        pair
        for number in good
        for pair in codegen.training_pairs(problem(number)["prompt"], [f"Return n + {number}."], right(number))
    ]
    assert sorted((row["input"], row["output"]) for row in sft) == sorted(expected)
    assert [(row["input"], row["teacher_output"]) for row in kd] == [(row["input"], row["output"]) for row in sft]
    assert {row["group"] for row in sft} == {problem(number)["group"] for number in good}
    assert [row["task_id"] for row in val] == list(map(str, HELD_OUT))
    assert not {row["group"] for row in val} & {row["group"] for row in sft + kd + dpo}
    assert code_problems.read(prepared / "one/codegen_val.jsonl")[0].solution == right(HELD_OUT[0])
    assert len(dpo) == 2 * len(good)
    for row in dpo:
        number = next(n for n in good if problem(n)["group"] == row["group"])
        rejected = codegen.code_of(row["rejected"])
        assert codegen.code_of(row["chosen"]) == right(number) and codegen.compile_error(rejected) is None
        assert row["prompt"] in [prompt for prompt, _ in expected] and codegen.PLAN_REQUEST not in row["prompt"]
    tests = {problem(number)["group"]: grading.Tests(tuple(problem(number)["tests"])) for number in good}
    verdicts = grading.grade_many([(codegen.code_of(row["rejected"]), tests[row["group"]]) for row in dpo])
    assert not any(verdict.passed for verdict in verdicts)


def test_prepare_reports_what_it_left_out(prepared):
    manifest = json.loads((prepared / "one/codegen_manifest.json").read_text())
    (left_out,) = manifest["left_out"]
    assert (left_out["task_id"], left_out["error"]) == (str(TRAIN[1]), "assertion")
    assert manifest["problems"] == 8 and manifest["parts"]["train"] == {"groups": 3, "problems": 3}
    assert manifest["files"]["codegen_sft.jsonl"]["rows"] == 9
    for file in (prepared / "one").iterdir():
        assert file.read_bytes() == (prepared / "two" / file.name).read_bytes()


def test_prepare_refuses(tmp_path, capsys):
    def said(*argv: str) -> str:
        assert cli.run(codegen_prepare.main, argv) == cli.BAD_INPUT
        return capsys.readouterr().err.splitlines()[-1]

    bad = write_rows(tmp_path / "bad.jsonl", [problem(1) | {"solution": "def plus1(n):\n    return n"}])
    assert said("--src", bad, "--outdir", str(tmp_path)).startswith("error: none of the 1 solutions passes")
    few = write_rows(tmp_path / "few.jsonl", [problem(TRAIN[0])])
    assert "has no problem for the validation part (1 in all)" in said("--src", few, "--outdir", str(tmp_path))
    own = write_rows(tmp_path / "codegen_val.jsonl", [problem(1)])
    assert "would be overwritten" in said("--src", own, "--outdir", str(tmp_path))
    assert said("--outdir", str(tmp_path)).startswith("error: one of the arguments --src --synthesize is required")


def test_synthesized_problems_become_rows(tmp_path):
    codegen_prepare.main(["--synthesize", "12", "--seed", "4", "--outdir", str(tmp_path)])
    manifest = json.loads((tmp_path / "codegen_manifest.json").read_text())
    parts = {part: told["problems"] for part, told in manifest["parts"].items()}
    assert manifest["synthetic"] and sum(parts.values()) == 12
    assert len(rows_of(tmp_path / "codegen_sft.jsonl")) == 3 * parts["train"]
    assert len(rows_of(tmp_path / "codegen_dpo.jsonl")) == 2 * parts["train"]


# The writer.


def writer_of(model_dir: str, *flags: str) -> CodeWriter:
    args = eval_codegen.build_parser().parse_args(["--model_dir", model_dir, "--data", "x", *flags])
    return CodeWriter.from_flags(args, model_dir)


def declared_base(tiny_base: str, folder: Path, eos: str, generation_eos=None) -> str:
    """The tiny base as its files would declare another EOS."""
    shutil.copytree(tiny_base, folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": eos}))
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": generation_eos}))
    return str(folder)


def test_plain_base_models_are_told_from_trained_ones(tiny_base, tokenizer, tmp_path):
    """Qwen's base models declare <|endoftext|> as EOS, though their template ends turns with <|im_end|>."""
    turn, text = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>"))
    trained = writer_of(tiny_base)
    assert trained.style is codegen.CHAT and trained.tokenizer.eos_token_id == turn
    base = declared_base(tiny_base, tmp_path / "base", "<|endoftext|>", text)
    writer = writer_of(base)
    assert writer.style is codegen.COMPLETION
    assert writer.tokenizer.eos_token_id == writer.model.generation_config.eos_token_id == text
    assert writer_of(base, "--prompt_style", "chat").style is codegen.CHAT
    instruct = declared_base(tiny_base, tmp_path / "instruct", "<|endoftext|>", [text, turn])
    assert writer_of(instruct).style is codegen.CHAT
    assert writer_of(instruct, "--prompt_style", "completion").style is codegen.COMPLETION


def test_answers_do_not_depend_on_other_tasks(base):
    writer = writer_of(base)
    tasks = ["Add a and b.", "Write a function that sorts a list of numbers in place.", "Reverse."]
    decoding = {"num_samples": 2, "seed": 3, "max_new_tokens": 6, "temperature": 1.0, "top_p": 0.9}
    plans = writer.plan(tasks, **decoding)
    together = writer.write(tasks, plans, **decoding)
    for task, plan, answers in zip(tasks, plans, together, strict=True):
        assert writer.plan([task], **decoding) == [plan]
        assert writer.write([task], [plan], **decoding) == [answers]
        assert [answer.plan for answer in answers] == plan
    same_plan = writer.write(tasks, [["- Think."] * 2] * 3, **decoding)
    assert any(one.code != two.code for one, two in same_plan)
    assert writer.write(tasks, **decoding) != together


def test_code_is_streamed_as_it_stands(base):
    out = io.StringIO()
    writer = writer_of(base)
    streamer = writer.streamer(out)
    text = "Sure:\n```python\ndef add(a, b):\n    return a + b\n```\nDone.\n"
    tokens = writer.tokenizer.encode(text)
    streamer.put(writer.tokenizer("a prompt", return_tensors="pt")["input_ids"])
    seen = set()
    for token in tokens:
        streamer.put(torch_row(token))
        seen.add(out.getvalue())
    streamer.end()
    assert out.getvalue() == "def add(a, b):\n    return a + b\n"
    assert "def add(a, b):" in seen


def torch_row(token: int):
    import torch

    return torch.tensor([token])


# Code for tasks.


class Scripted:
    """A writer that answers from a list, in turn, and counts."""

    def __init__(self, answers: dict[str, list[str]], plan: str = "- Think.") -> None:
        self.answers, self.the_plan, self.asked = answers, plan, 0
        self.tokenizer = self.style = None

    def plan(self, tasks, *, num_samples=1, **decoding):
        return [[self.the_plan] * num_samples for _ in tasks]

    def write(self, tasks, plans=None, *, num_samples=1, streamer=None, **decoding):
        self.asked += len(tasks)
        planned = "" if plans is None else self.the_plan
        return [[CodeAnswer(code, planned, "unfinished" not in code, 9) for code in self.answers[task][:num_samples]]
                for task in tasks]  # fmt: skip


@pytest.fixture
def scripted(monkeypatch):
    """`scripted({task: [code, ...]})`: all models answer so from now on; gives the writer."""

    def use(answers: dict[str, list[str]]) -> Scripted:
        writer = Scripted(answers)
        monkeypatch.setattr(code_writer.CodeWriter, "from_flags", classmethod(lambda cls, args, model_dir: writer))
        return writer

    return use


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
    error = codegen.compile_error(out)
    assert (code == cli.FAILED) == (error is not None) == (f"the code does not compile ({error})" in err)
    assert infer(capsys, *argv, "--plan_then_code") == (code, out, err)
    hot = [infer(capsys, *argv, "--temperature", "2", "--seed", seed)[1] for seed in "112"]
    assert hot[0] == hot[1] != hot[2]


def test_files_of_tasks(tiny_base, scripted, capsys, tmp_path):
    writer = scripted({"Add.": ["x = 1"], "Break.": ["def f(:"]})
    rows = write_rows(tmp_path / "tasks.jsonl", [{"prompt": "Add."}, {"input": "Break.", "id": 7}])
    ask = ["--model_dir", tiny_base, "--input", rows, "--output", str(tmp_path / "out" / "answers.jsonl")]
    code, out, err = infer(capsys, *ask, "--plan_then_code")
    assert (code, out) == (cli.FAILED, "") and "1 of 2 answers do not compile" in err
    first, second = rows_of(tmp_path / "out/answers.jsonl")
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


# Judging.


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
        def write(self, tasks, plans=None, **decoding):
            made = right if plans else wrong
            return [
                [CodeAnswer(made(number), "", True, 9)] for number in HELD_OUT if problem(number)["prompt"] in tasks
            ]

    monkeypatch.setattr(code_writer.CodeWriter, "from_flags", classmethod(lambda cls, args, model_dir: Planner({})))
    model = evaluate(tiny_base, "--plan_then_code")["models"][0]
    assert (model["pass_at_1"]["value"], model["plan_then_code"]["pass_at_1"]["value"]) == (0, 1)
    assert model["plan_difference"]["pass_at_1"] == {"value": 1, "low": 1, "high": 1}
    assert "plan_then_code" not in evaluate(tiny_base)["models"][0]


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


def test_trained_adapters_are_asked_in_turns(base, prepared, tmp_path):
    """SFT on prepared rows, then the writer: chat style, and the rows' groups on record."""
    import sft_train

    run = str(tmp_path / "run")
    data = str(prepared / "one/codegen_sft.jsonl")
    sft_train.main(["--student", base, "--data", data, "--save_dir", run, "--max_steps", "2", "--max_len", "512"])
    assert adapters.is_adapter(run) and writer_of(run).style is codegen.CHAT
    assert run_record.read_groups(run) == {row["group"] for row in rows_of(Path(data))}


# The base of the offline demo.


def test_texts_are_told_by_their_keywords():
    """Names, numbers and quoted words are exchanged alike in both; what is common to the texts is no keyword."""
    texts = [f"def name{i:04}(n):\n    return '{i % 7}' * n + {i % 30}" for i in range(600)]
    pairs = list(miniature.keyword_prompts(texts, random.Random(0)))
    assert pairs == list(miniature.keyword_prompts(texts, random.Random(0)))
    assert [text for _, text in pairs] != texts
    for prompt, text in pairs:
        name, quoted, number = re.fullmatch(r"def (\w+)\(n\):\n    return ('\d') \* n \+ (\d+)", text).groups()
        assert prompt == f"{miniature.KEYWORDS}{name} {quoted} {number}"


def test_the_coder_base_reads_prompts_and_answers_apart(tmp_path, prepared):
    data = str(prepared / "one/codegen_sft.jsonl")
    base = tmp_path / "coder"
    argv = ["--prompts", data, "--texts", data, "--save_dir", str(base), "--steps", "1", "--rows_per_step", "2"]
    tiny_student.main(argv)
    facts = json.loads((base / "base.json").read_text())
    assert facts["texts"] == facts["prompts"] != []
    source = miniature.SelfSupervision([row["input"] for row in rows_of(Path(data))], 0, ["x = 1", "y = 2"])
    assert all(source.answer(row["input"]) != row["output"] for row in rows_of(Path(data)))
    assert {source.answer(prompt) for prompt in source.texts} <= {"x = 1", "x = 2", "y = 1", "y = 2"}
