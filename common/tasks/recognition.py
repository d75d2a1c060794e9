"""What training rows are of: as the command says, as the manifest beside them says, or as their prompts show."""

from __future__ import annotations

import json
from collections.abc import Sequence

from common.cli import UserError
from common.data import squad, task_record
from common.models.chats import Prompt, question_of
from common.tasks.codegen.prompt import CODE_REQUEST, PLAN_REQUEST
from common.tasks.idp import prompt as idp_prompt
from common.tasks.ranking.creditmix import CREDITMIX
from common.tasks.ranking.loading import load_task


def record_of(
    named: str | None, data: str | None, prompts: Sequence[Prompt], init_adapter: str | None = None
) -> task_record.Record:
    """What a training is for, as its run keeps it.

    Args:
        named: --task; None where the command names none.
        data: the file of the rows.
        prompts: of the rows, of which some may be chats; none where they are running text.
        init_adapter: the adapter that the training starts from.

    Raises:
        UserError: the rows are not of the task that is named.
    """
    if named:
        return _named(named, data, prompts)
    if data and (record := task_record.beside(data)):
        return record
    prompts = [prompt for prompt in prompts if isinstance(prompt, str)]  # a chat is of no task of its own
    endings = task_record.prompt_endings(prompts)
    if prompts and _all_begin(prompts, CREDITMIX.prompt("")):
        return CREDITMIX.record()
    if prompts and _all_begin(prompts, idp_prompt.INSTRUCTION):
        facts = {"instruction": idp_prompt.INSTRUCTION} | _common_form(prompts)
        return task_record.of_prompts(task_record.IDP, "idp", prompts, **facts)
    if prompts and _all_begin(prompts, squad.INSTRUCTION):
        facts = {"instruction": squad.INSTRUCTION}
        return task_record.of_prompts(task_record.SQUAD, "squad", prompts, **facts)
    if {PLAN_REQUEST, CODE_REQUEST} & set(endings):
        return task_record.of_prompts(task_record.CODEGEN, "codegen", prompts)
    record = task_record.of_prompts(task_record.ROWS, "rows", prompts)
    started_from = task_record.read(init_adapter) if init_adapter else None
    return started_from if started_from and not record["beginnings"] else record


def _named(named: str, data: str | None, prompts: Sequence[Prompt]) -> task_record.Record:
    task = load_task(named)
    for number, prompt in enumerate(prompts, start=1):
        what = "prompt" if isinstance(prompt, str) else "last question"
        if not question_of(prompt).startswith(task.prompt("").rstrip()):
            raise UserError(
                f"--task {named}: the {what} of row {number} of {data} does not begin with its instruction; prepare "
                "the rows with creditmix_prepare.py --task, or leave --task out"
            )
    return task.record()


def _all_begin(prompts: Sequence[str], start: str) -> bool:
    return all(prompt.startswith(start) for prompt in prompts)


def _common_form(prompts: Sequence[str]) -> dict:
    """ "typed_fields" and "schema" as all prompts of documents have them.

    The schema is None where they show several, or one that has text in place of typed fields.
    """
    forms = [idp_prompt.shown(prompt) for prompt in prompts]
    kinds, texts = ({form[part] if form else None for form in forms} for part in (0, 1))
    typed_fields = kinds.pop() if len(kinds) == 1 else None
    try:
        schema = json.loads(texts.pop()) if len(texts) == 1 and typed_fields == "held" else None
    except (ValueError, RecursionError):
        schema = None
    return {"typed_fields": typed_fields, "schema": schema if isinstance(schema, dict) else None}
