"""Rows of every shape as trainers read them, and the sentence for every one that they do not take."""

from __future__ import annotations

import json

import pytest
from support.inputs import write_rows

from common.cli import UserError
from common.data import shapes, tables, training_files
from common.data.shapes import DISTILL, DPO, KD, LABELS, ON_POLICY, SFT

HI = {"role": "user", "content": "Hi"}
HELLO = {"role": "assistant", "content": "Hello"}
WHAT = {"role": "assistant", "content": "What?"}
MORE = {"role": "user", "content": "More"}
BRIEF = {"role": "system", "content": "Be brief."}
BASIC = {"input": "Hi", "output": "Hello"}
PAIR = {"prompt": "Hi", "chosen": "Hello", "rejected": "What?"}
READ_ONLY = HELLO | {"weight": 0}

COMPLETIONS = [
    (BASIC, BASIC),
    ({"messages": [HI, HELLO]}, BASIC),
    ({"messages": [HI, HELLO | {"weight": 1}]}, BASIC),
    ({"messages": [HI, HELLO | {"content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]}]}, BASIC),
    ({"messages": [BRIEF, HI, HELLO]}, {"input": [BRIEF, HI], "output": "Hello"}),
    ({"messages": [BRIEF | {"role": "developer"}, HI, HELLO]}, {"input": [BRIEF, HI], "output": "Hello"}),
    ({"messages": [BRIEF | {"content": ""}, HI, HELLO]}, BASIC),
    ({"messages": [HI, HELLO, MORE, WHAT]}, {"input": [HI, HELLO, MORE], "output": "What?"}),
    ({"messages": [HI, READ_ONLY, MORE, WHAT]}, {"input": [HI, READ_ONLY, MORE], "output": "What?"}),
    ({"messages": [HI, HELLO, MORE, WHAT | {"weight": 0}]}, BASIC),  # what follows the last answer learnt says nothing
    ({"messages": [HI, HELLO, MORE]}, BASIC),
    ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, BASIC),
    ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "system": "Be brief."},
     {"input": [BRIEF, HI], "output": "Hello"}),
    ({"conversations": [HI, HELLO]}, BASIC),
    ({"instruction": "Hi", "input": "", "output": "Hello"}, BASIC),
    ({"instruction": "Hi", "input": None, "output": "Hello"}, BASIC),
    ({"instruction": "Hi", "output": "Hello"}, BASIC),
    ({"instruction": "Translate.", "input": "Hi", "output": "Hello"}, {"input": "Translate.\n\nHi", "output": "Hello"}),
    ({"instruction": "Hi", "output": "Hello", "system": "Be brief."}, {"input": [BRIEF, HI], "output": "Hello"}),
    ({"prompt": "Hi", "completion": "Hello"}, BASIC),
    ({"prompt": [HI], "completion": [HELLO]}, BASIC),
    ({"prompt": [HI, HELLO, MORE], "completion": [WHAT]}, {"input": [HI, READ_ONLY, MORE], "output": "What?"}),
    ({"prompt": [HI], "completion": [HELLO, MORE, WHAT]}, {"input": [HI, HELLO, MORE], "output": "What?"}),
]  # fmt: skip
TEACHERS = [
    ({"input": "Hi", "teacher_output": "Hello", "output": "gold"}, BASIC),
    ({"instruction": "Translate.", "input": "Hi", "teacher_output": "Hello"},
     {"input": "Translate.\n\nHi", "output": "Hello"}),
]  # fmt: skip
ASKED = {"messages": [BRIEF, HI, HELLO, MORE], "tools": [], "parallel_tool_calls": True}
PREFERENCES = [
    (PAIR, PAIR),
    ({"input": {"messages": [HI]}, "preferred_output": [HELLO], "non_preferred_output": [WHAT]}, PAIR),
    ({"input": ASKED, "preferred_output": [HELLO], "non_preferred_output": [WHAT]},
     PAIR | {"prompt": [BRIEF, HI, READ_ONLY, MORE]}),
    ({"prompt": [HI], "chosen": [HELLO], "rejected": [WHAT]}, PAIR),
    ({"prompt": [BRIEF, HI], "chosen": "Hello", "rejected": "What?"}, PAIR | {"prompt": [BRIEF, HI]}),
    ({"chosen": [HI, HELLO], "rejected": [HI, WHAT]}, PAIR),
    ({"prompt": "Hi", "chosen": [HI, HELLO], "rejected": [HI, WHAT]}, PAIR),
    ({"prompt": "Hi", "chosen": [HI, HELLO, MORE, HELLO], "rejected": [HI, HELLO, MORE, WHAT]},
     PAIR | {"prompt": [HI, READ_ONLY, MORE]}),
    ({"system": "Be brief.", "prompt": "Hi", "chosen": [HI, HELLO], "rejected": [HI, WHAT]},
     PAIR | {"prompt": [BRIEF, HI]}),
    ({"prompt": [BRIEF, HI, HELLO, MORE], "chosen": [MORE, HELLO], "rejected": [MORE, WHAT]},
     PAIR | {"prompt": [BRIEF, HI, READ_ONLY, MORE]}),
    ({"prompt": "Hi", "chosen": [BRIEF, HI, HELLO], "rejected": [BRIEF, HI, WHAT]}, PAIR | {"prompt": [BRIEF, HI]}),
    ({"conversations": [{"from": "human", "value": "Hi"}], "chosen": {"from": "gpt", "value": "Hello"},
      "rejected": {"from": "gpt", "value": "What?"}}, PAIR),
    ({"instruction": "Translate.", "input": "Hi", "chosen": "Hello", "rejected": "What?"},
     PAIR | {"prompt": "Translate.\n\nHi"}),
]  # fmt: skip
TAKEN = [
    *((trainer, *case) for trainer in (SFT, KD, DISTILL, ON_POLICY) for case in COMPLETIONS),
    *((trainer, *case) for trainer in (KD, DISTILL) for case in TEACHERS),
    *((DPO, *case) for case in PREFERENCES),
    (SFT, BASIC | {"teacher_output": "other"}, BASIC),
    (ON_POLICY, {"input": "Hi"}, {"input": "Hi"}),
    (ON_POLICY, {"input": "Hi", "output": None}, {"input": "Hi"}),
    (ON_POLICY, {"prompt": [BRIEF, HI]}, {"input": [BRIEF, HI]}),
    (DISTILL, {"text": "Hi. Hello."}, {"text": "Hi. Hello."}),
]


@pytest.mark.parametrize(("trainer", "row", "expected"), TAKEN)
def test_rows_of_every_shape_become_one(trainer, row, expected, tmp_path):
    path = write_rows(tmp_path / "rows", [row | {"group": "a" * 16}])
    assert training_files.read(path, trainer) == [expected | {"group": "a" * 16}]


@pytest.mark.parametrize("shape", shapes.SHAPES, ids=lambda shape: shape.name)
def test_the_example_of_a_shape_is_of_that_shape(shape):
    row = json.loads(shape.example)
    assert shapes.shape_of(row, (shape.kind,)) is shape
    assert shape.read(row)


@pytest.mark.parametrize("form", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("row", [COMPLETIONS[8][0], COMPLETIONS[12][0], COMPLETIONS[17][0]])
def test_chats_come_back_from_every_form(row, form, tmp_path):
    path = tmp_path / "rows.data"  # the content says what it is
    rows = [row, row]
    path.write_bytes(json.dumps(rows, indent=1).encode() if form == "json" else tables.packed(rows, form))
    expected = next(expected for given, expected in COMPLETIONS if given == row)
    assert training_files.read(path, SFT) == [expected] * 2


def test_tables_have_rows_too(tmp_path):
    (tmp_path / "a.csv").write_text("instruction;input;output\nTranslate.;Hi;Hello\nHi;;Hello\n")
    assert training_files.read(tmp_path / "a.csv", SFT) == [{"input": "Translate.\n\nHi", "output": "Hello"}, BASIC]


def test_a_file_may_mix_shapes(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [row for row, _ in COMPLETIONS])
    assert training_files.read(path, SFT) == [expected for _, expected in COMPLETIONS]


def test_keys_that_are_not_read_are_named_once(tmp_path, capsys):
    rows = [BASIC | {"id": 1, "context": "x"}, BASIC | {"context": "y", "tools": [1]}, BASIC | {"tools": []}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    training_files.read(path, SFT)
    warning = "keys that are not read: 'context' (2 of 3 rows), 'tools' (1 of 3 rows)"
    assert capsys.readouterr().err == f"{path}: {warning}\n"
    assert training_files.inspect(path, SFT).warning == warning


def test_tools_that_are_only_offered_are_named_wherever_they_stand(tmp_path):
    pair = {"preferred_output": [HELLO], "non_preferred_output": [HELLO | {"content": "What?"}]}
    offered = {"messages": [HI], "tools": [1], "parallel_tool_calls": True}
    path = write_rows(tmp_path / "rows.jsonl", [pair | {"input": given} for given in (offered, {"messages": [HI]})])
    found = training_files.inspect(path, DPO)
    assert (found.good, found.warning) == (
        2, "keys that are not read: 'input.tools' (1 of 2 rows), 'input.parallel_tool_calls' (1 of 2 rows)",
    )  # fmt: skip


BAD = [
    ({"messages": [BRIEF | {"content": ""}]}, "'messages' has no turn with a text"),
    ({"messages": []}, "'messages' must be a list of turns"),
    ({"messages": "Hi"}, "'messages' must be a list of turns"),
    ({"messages": [HI, "Hello"]}, "turn 2 of 'messages' needs a role and a content, or from and value"),
    ({"messages": [HI]}, "no turn is the assistant's"),
    ({"messages": [HELLO, HI]}, "the assistant's turn follows no other"),
    ({"messages": [HI, READ_ONLY]}, "every answer has the weight 0"),
    ({"messages": [HI, HELLO | {"weight": 0.5}]}, "turn 2 of 'messages': 'weight' must be 0 or 1, on an assistant's"),
    ({"messages": [HI, HELLO | {"weight": "1"}]}, "'weight' must be 0 or 1"),
    ({"messages": [HI | {"weight": 1}, HELLO]}, "turn 1 of 'messages': 'weight' must be 0 or 1"),
    ({"messages": [HI, HELLO | {"content": " "}]}, "turn 2 of 'messages': 'content' must be a non-empty string"),
    ({"messages": [HI, HELLO | {"content": None}]}, "turn 2 of 'messages': 'content' must be a non-empty string"),
    ({"messages": [HI, {"role": "assistant"}]}, "turn 2 of 'messages': 'content' must be a non-empty string"),
    ({"messages": [HI, {"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "turn 2 of 'messages' calls a tool"),
    ({"messages": [HI, HELLO, {"role": "tool", "content": "1"}]}, "turn 3 of 'messages' is of the role 'tool'"),
    ({"messages": [HI, HELLO, {"role": ["x"], "content": "1"}]}, "turn 3 of 'messages' is of the role"),
    ({"messages": [HI | {"content": [{"type": "image_url", "image_url": {"url": "x"}}]}, HELLO]},
     "turn 1 of 'messages' holds something else than text"),
    ({"messages": [HI, HELLO | {"content": "\ud800"}]}, "holds half a character"),
    ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": ""}]}, "'value' must be a"),
    ({"messages": [BRIEF | {"content": 5}, HI, HELLO]}, "turn 1 of 'messages': 'content' must be a non-empty string"),
    ({"conversations": [HI, HELLO], "system": 5}, "'system' must be a list of turns"),
    ({"instruction": " ", "input": "Hi", "output": "Hello"}, "'instruction' must be a non-empty string"),
    ({"instruction": "Hi", "input": 5, "output": "Hello"}, "'input' must be a string"),
    ({"prompt": "Hi", "completion": 5}, "'completion' must be a list of turns"),
    ({"input": "Hi"}, "key 'output' is missing"),
    ({"input": "Hi", "output": None}, "'output' must be a non-empty string"),
    (5, "a JSON object is needed, not int"),
]  # fmt: skip
BAD_PAIRS = [
    (PAIR | {"rejected": "Hello"}, "the chosen and the rejected answer are the same"),
    ({"chosen": "Hello", "rejected": "What?"}, "key 'prompt' is missing"),
    ({"prompt": "Hi", "chosen": "Hello"}, "key 'rejected' is missing"),
    ({"prompt": "Hi", "chosen": [MORE, HELLO], "rejected": [MORE, WHAT]}, "'chosen' begins with other turns than"),
    ({"chosen": [HI, HELLO], "rejected": [MORE, WHAT]}, "'chosen' and 'rejected' differ before their last turn"),
    ({"prompt": "Hi", "chosen": [BRIEF | {"content": " "}], "rejected": [WHAT]}, "'chosen' has no turn with a text"),
    ({"chosen": [HI], "rejected": [HI]}, "the last turn of 'chosen' is not the assistant's"),
    ({"input": "Hi", "preferred_output": [HELLO], "non_preferred_output": [WHAT]}, "'input' must be an object"),
    ({"input": {"messages": [HI]}, "preferred_output": [HELLO], "non_preferred_output": 5}, "'non_preferred_output' m"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("trainer", "row", "fault"), [*((SFT, *case) for case in BAD), *((DPO, *case) for case in BAD_PAIRS)]
)
def test_bad_rows_are_named_by_line(trainer, row, fault, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [row])
    with pytest.raises(UserError) as error:
        training_files.read(path, trainer)
    assert str(error.value).startswith(f"{path}, line 1: ") and fault in str(error.value)
    good = PAIR if trainer == DPO else BASIC
    path = write_rows(tmp_path / "rows.jsonl", [good, row, good])
    assert training_files.read(path, trainer, skip_bad_rows=True) == [good] * 2
    inspection = training_files.inspect(path, trainer)
    assert (inspection.good, inspection.bad, inspection.faults[0][0]) == (2, 1, 2)
    assert fault in inspection.faults[0][1]


REFUSED = [
    (SFT, PAIR, "has preferences, which sft_train.py does not take; train them with dpo_train.py"),
    (KD, PREFERENCES[1][0], "has OpenAI's preferences, which kd_train.py does not take; train them with dpo"),
    (DISTILL, PAIR, "train them with dpo_train.py"),
    (SFT, {"input": "Hi", "teacher_output": "Hello"}, "has a teacher's answers, which sft_train.py does not take; "
     "train them with kd_train.py"),
    (SFT, {"input": "Hi", "probabilities": {"a": 1}}, "train them with distill_train.py --labels"),
    (DPO, BASIC, "has inputs and outputs, which dpo_train.py does not take; train them with sft_train.py"),
    (DPO, {"messages": [HI, HELLO]}, "has chats, which dpo_train.py does not take; train them with sft_train.py"),
    (DPO, {"conversations": [HI, HELLO]}, "has ShareGPT chats, which dpo_train.py does not take"),
    (DPO, {"instruction": "Hi", "output": "Hello"}, "has Alpaca rows, which dpo_train.py does not take"),
    (LABELS, PAIR, "which distill_train.py --labels does not take; train them with dpo_train.py"),
    (SFT, {"text": "Hi"}, "has running text, which sft_train.py does not take; train on it with distill_train"),
    (SFT, {"prompt": "Hi", "completion": "What?", "label": False}, "has unpaired preferences"),
    (KD, {"document": "x", "fields": {}}, "documents with their fields; idp_prepare.py makes training rows of them"),
    (SFT, {"prompt": "x", "solution": "y", "tests": []}, "code problems; codegen_prepare.py makes training rows"),
    (SFT, {"text": "x", "code": "y", "test_list": []}, "code problems; codegen_prepare.py makes training rows"),
    (SFT, {"question": "x", "answer": "y"}, "questions and answers; rename the keys to input and output"),
    (SFT, {"text": "x", "label": "y"}, "texts with labels; creditmix_prepare.py --task makes training rows"),
    (SFT, {"a": 1, "b": 2}, "has rows with 'a', 'b', which no trainer takes; docs/formats.md has the rows"),
]  # fmt: skip


@pytest.mark.parametrize(("trainer", "row", "sentence"), REFUSED)
def test_a_file_of_another_shape_is_refused_by_what_takes_it(trainer, row, sentence, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [row, row])
    for ask in (training_files.read, training_files.inspect):
        with pytest.raises(UserError) as error:
            ask(path, trainer)
        assert sentence in str(error.value) and str(error.value).startswith(path)


def test_one_question_stands_as_it_was_asked():
    """What asks a teacher, or compares exports, takes texts."""
    assert training_files.as_question({"messages": [HI, HELLO], "id": 1})["input"] == "Hi"
    for row in ({"messages": [BRIEF, HI, HELLO]}, {"messages": [HI]}, {"input": "Hi"}, {"document": "x"}, ValueError()):
        assert training_files.as_question(row) == row


def test_files_without_rows_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("input,output\n")
    (tmp_path / "squad.json").write_text(json.dumps({"version": "1.1", "data": []}, indent=1))
    (tmp_path / "empty.json").write_text("[]")
    for name, sentence in [
        ("a.csv", "no rows"),
        ("squad.json", "SQuAD's JSON is for distill_train.py"),
        ("empty.json", "no (usable )?rows"),
    ]:
        for ask in (training_files.read, training_files.inspect):
            with pytest.raises(UserError, match=sentence):
                ask(tmp_path / name, SFT)
