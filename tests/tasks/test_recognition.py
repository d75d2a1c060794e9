"""What training rows are of: by --task, by the manifest beside them, by their prompts, by the adapter before."""

from __future__ import annotations

import json

import pytest
from support.inputs import CORPUS, ROOT, write_rows

import creditmix_prepare
import idp_prepare
from common.cli import UserError
from common.data import squad, task_record
from common.tasks.codegen import prompt as codegen
from common.tasks.idp import prompt as idp_prompt
from common.tasks.ranking.creditmix import CREDITMIX
from common.tasks.ranking.loading import from_record, load_task
from common.tasks.recognition import record_of

YAML = str(ROOT / "recipes" / "ticket_severity.yaml")
TICKETS = load_task(YAML)
SCHEMA = {"type": "object", "properties": {"total": {"type": "number"}}}


def test_a_label_task_comes_back_as_it_was():
    for task in (TICKETS, CREDITMIX):
        kept = json.loads(json.dumps(task.record()))
        again = from_record(kept, "run")
        assert (again, type(again), again.text) == (task, type(task), task.text)
    broken = TICKETS.record() | {"verbalizers": {"Low": ["High"]}}
    with pytest.raises(UserError, match=r"run/task\.json: labels have 'High' twice"):
        from_record(broken, "run")


def test_by_the_prompts():
    assert record_of(None, None, CORPUS[:8]) == CREDITMIX.record()
    idp = [idp_prompt.user_turn(f"Total {i}", SCHEMA, "held") for i in range(4)]
    assert record_of(None, None, idp) == {
        "kind": "idp", "name": "idp", "instruction": idp_prompt.INSTRUCTION, "schema": SCHEMA, "typed_fields": "held",
        "beginnings": [idp_prompt.INSTRUCTION], "prompt_endings": []}  # fmt: skip
    several = record_of(None, None, [*idp, idp_prompt.user_turn("x", {"type": "array"}, "held")])
    assert (several["schema"], several["typed_fields"]) == (None, "held")
    written = record_of(None, None, [idp_prompt.user_turn("x", SCHEMA, "written")] * 2)
    assert (written["schema"], written["typed_fields"]) == (None, "written")  # what it shows is not the schema itself
    assert record_of(None, None, [squad.prompt("When?", f"In {i}.") for i in range(3)])["kind"] == "squad"
    code = [pair[0] for i in range(4) for pair in codegen.training_pairs(f"Return {i}.", ["Do it."], "x = 1")]
    found = record_of(None, None, code)
    assert found["kind"] == "codegen"
    assert set(found["prompt_endings"]) == {codegen.PLAN_REQUEST, codegen.CODE_REQUEST}


def test_rows_of_several_tasks_and_of_none():
    mixed = record_of(None, None, [*CORPUS[:8], *(TICKETS.prompt(f"Mail {i}") for i in range(8))])
    assert (mixed["kind"], set(mixed["beginnings"])) == ("rows", {CREDITMIX.instruction, TICKETS.instruction})
    text = record_of(None, None, [])
    assert (text["kind"], text["beginnings"]) == ("rows", [])


def test_the_last_question_of_a_chat_is_held_to_the_flag():
    system = {"role": "system", "content": "Be brief."}
    chat = [system, {"role": "user", "content": TICKETS.prompt("Mail")}]
    assert record_of(YAML, "rows.jsonl", [TICKETS.prompt("Phone"), chat]) == TICKETS.record()
    other = [*chat, {"role": "assistant", "content": "Low"}, {"role": "user", "content": "Sure?"}]
    with pytest.raises(UserError, match=r"the last question of row 2 of rows\.jsonl does not begin"):
        record_of(YAML, "rows.jsonl", [TICKETS.prompt("Phone"), other])
    assert record_of(None, None, [chat])["kind"] == "rows"


def test_by_the_flag():
    prompts = [TICKETS.prompt("Mail"), TICKETS.prompt("Phone")]
    assert record_of(YAML, "rows.jsonl", prompts) == TICKETS.record()
    assert record_of("creditmix", "rows.jsonl", CORPUS[:3]) == CREDITMIX.record()
    with pytest.raises(UserError, match=r"--task .*: the prompt of row 3 of rows\.jsonl does not begin with its instr"):
        record_of(YAML, "rows.jsonl", [*prompts, CORPUS[0]])


def test_by_the_adapter_before_where_the_rows_show_nothing(tmp_path):
    task_record.write(tmp_path, TICKETS.record())
    assert record_of(None, None, ["one prompt"], str(tmp_path)) == TICKETS.record()
    assert record_of(None, None, CORPUS[:8], str(tmp_path)) == CREDITMIX.record()


@pytest.mark.processes
def test_by_the_manifests_that_are_written(tmp_path):
    rows = [{"ticket": f"Mail {i}", "severity": TICKETS.labels[i % 4], "customer": f"c{i}"} for i in range(400)]
    source = write_rows(tmp_path / "tickets.jsonl", rows)
    creditmix_prepare.main(["--task", YAML, "--src", source, "--outdir", str(tmp_path / "data")])
    for kind in ("sft", "kd", "dpo"):
        data = tmp_path / "data" / f"ticket_severity_{kind}.jsonl"
        assert record_of(None, str(data), ["whatever they show"]) == TICKETS.record()
    idp_prepare.main(["--synthesize", "40", "--outdir", str(tmp_path / "data")])
    found = record_of(None, str(tmp_path / "data" / "idp_dpo.jsonl"), [])
    assert (found["kind"], found["schema"]) == ("idp", json.loads((tmp_path / "data" / "idp_schema.json").read_text()))
