"""The server's cascade: what a run is not sure of is asked of an endpoint, or of a larger run of the server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fastapi import Request

from common.data import task_record
from common.serving import label_tasks
from common.serving.run_registry import Version
from common.serving.sizes import estimate, estimate_row
from common.serving.work import Classify, Extract, WriteCode
from common.tasks.codegen.prompt import code_answer
from common.tasks.codegen.writer import CodeAnswer
from common.tasks.idp import prompt as idp_prompt
from common.tasks.idp.answer_form import form_of
from common.tasks.idp.extractor import Extraction
from common.tasks.ranking.task import LabelTask
from common.teachers.cascade import programs
from common.teachers.cascade.documents import Answered, DocumentCascade, is_unsure
from common.teachers.cascade.handing import Cascade, Reply, cascade_of, read
from common.teachers.cascade.labels import LabelAnswer, LabelCascade
from common.teachers.cascade.settings import CascadeSettings, RunTeacher
from common.teachers.interview import Answer
from common.teachers.tasks import Code, Documents, Item
from common.web.app import Problem

if TYPE_CHECKING:
    from common.serving.server import Server


class ServedCascade:
    """A cascade for all runs of a server."""

    def __init__(self, settings: CascadeSettings, server: Server) -> None:
        self.teacher, self.server = settings.teacher, server
        self.cascade: Cascade = cascade_of(settings, None)
        self.below = settings.below

    def close(self) -> None:
        """Ask the teacher for nothing more."""
        self.cascade.close()

    async def answers(
        self, request: Request, version: Version, task: LabelTask, texts: Sequence[str], answers: list[LabelAnswer]
    ) -> list[LabelAnswer]:
        """The answers of a run, the unsure ones after the teacher was asked, within the time-out."""
        labels = LabelCascade(self.cascade, task, version.model_dir)
        unsure = [] if self._is_teacher(version) else labels.unsure(answers)
        replies: list[Reply] = []
        if unsure and isinstance(self.teacher, RunTeacher):
            replies = await self._of_run(request, self.teacher.run, task, [texts[index] for index in unsure])
        elif unsure:
            replies = await self.cascade.replies_in_time(labels.teacher_task, labels.items(texts, unsure))
        self._count(version, replies)
        if not self.cascade.settings.keep:
            return labels.joined(texts, answers, unsure, replies)
        return await asyncio.to_thread(labels.joined, texts, answers, unsure, replies)

    async def extraction(
        self, request: Request, version: Version, work: Extract, text: str, extraction: Extraction
    ) -> Answered:
        """A document's extraction by a run, or the teacher's where that is unsure, within the time-out."""
        own = Answered(extraction, {"answered_by": version.model_dir})
        below = self.cascade.settings.below
        if self._is_teacher(version) or not is_unsure(extraction, below):
            return own
        schema, form = json.loads(work.schema), form_of(version.model_dir, work.typed_fields).typed_fields
        made = (self.cascade, schema, version.model_dir, form, below, work.reading)
        documents = await asyncio.to_thread(DocumentCascade, *made)
        items = await asyncio.to_thread(documents.items, [text])
        if isinstance(self.teacher, RunTeacher):
            replies = [await self._document_of_run(request, self.teacher.run, work, documents.task, items[0], text)]
        else:
            replies = await self.cascade.replies_in_time(documents.task, items)
        self._count(version, replies)
        (answered,) = await asyncio.to_thread(documents.joined, [text], [extraction], {0: replies[0]})
        return answered

    async def code(
        self, request: Request, version: Version, work: WriteCode, task: str, answer: CodeAnswer
    ) -> programs.AnsweredCode:
        """Code by a run, or the teacher's where that is no whole program, within the time-out."""
        cascade = programs.CodeCascade(self.cascade, version.model_dir)
        if self._is_teacher(version) or not programs.is_unsure(answer):
            return cascade.own(answer)
        item = cascade.item(0, task)
        if isinstance(self.teacher, RunTeacher):
            reply = await self._code_of_run(request, self.teacher.run, work, cascade.task, item, task)
        else:
            (reply,) = await self.cascade.replies_in_time(cascade.task, [item])
        self._count(version, [reply])
        return await asyncio.to_thread(cascade.joined, answer, item, reply)

    def _count(self, version: Version, replies: Sequence[Reply]) -> None:
        metrics = self.server.metrics
        for reply in replies:
            outcome = "unsure" if reply.answer is None else "teacher"
            metrics.child(metrics.cascade, version.name, outcome).inc()

    def _is_teacher(self, version: Version) -> bool:
        """Whether a run is itself the one that others are handed on to."""
        if not isinstance(self.teacher, RunTeacher):
            return False
        name = self.teacher.run.partition("@")[0]  # each of its versions is
        return self.server.registry.short.get(name, name) == version.name

    async def _of_run(self, request: Request, run: str, task: LabelTask, texts: Sequence[str]) -> list[Reply]:
        """What a run of this server answers; one that cannot be asked answers nothing."""
        replies, granted = self.cascade.opened(len(texts))
        if not granted:
            return replies
        answers = await self._in_time(self._ask_run(request, run, task, texts[:granted]))
        if isinstance(answers, Reply):
            return [answers] * granted + replies[granted:]
        for index, answer in enumerate(answers or []):
            label = answer["prediction"]
            replies[index] = Reply(label, None if label else "the teacher is not sure, either")
        return replies

    async def _document_of_run(
        self, request: Request, run: str, work: Extract, task: Documents, item: Item, text: str
    ) -> Reply:
        """What a run of this server makes of a document, as a training row would have it."""

        async def ask() -> Extraction:
            version = await self.server.find(run)
            label_tasks.check(version, task_record.IDP, idp_prompt.INSTRUCTION, "extracting fields from documents")
            work_of_run = replace(work, typed_fields=None)
            return await self.server.answer(request, version, work_of_run, text, tokens=estimate(text))

        def row(extraction: Extraction) -> str | Reply:
            if extraction.error or extraction.cut:
                return Reply(reason="the teacher has no whole, valid answer, either")
            return extraction.text

        return await self._written_by_run(ask, row, task, item)

    async def _code_of_run(
        self, request: Request, run: str, work: WriteCode, task: Code, item: Item, asked: str
    ) -> Reply:
        """What a run of this server programs, as a training row would have it."""

        async def ask() -> CodeAnswer:
            version = await self.server.find(run)
            label_tasks.check(version, task_record.CODEGEN, None, "writing code")
            work_of_run = replace(work, plan_then_code=False, stream=False)
            return await self.server.answer(request, version, work_of_run, asked, tokens=estimate(asked))

        def row(answer: CodeAnswer) -> str | Reply:
            if programs.is_unsure(answer):
                return Reply(reason="the teacher has no whole program, either")
            return code_answer(answer.code)

        return await self._written_by_run(ask, row, task, item)

    async def _written_by_run(
        self,
        ask: Callable[[], Coroutine[Any, Any, Any]],
        row: Callable[[Any], str | Reply],
        task: Documents | Code,
        item: Item,
    ) -> Reply:
        """What comes of asking a run, within budget and time.

        Args:
            row: of what it has written the text as in a training row, or a reply that says why there is none.
        """
        (reply,), granted = self.cascade.opened(1)
        if not granted:
            return reply
        written = await self._in_time(ask())
        if written is None or isinstance(written, Reply):
            return written or reply
        text = row(written)
        return text if isinstance(text, Reply) else await asyncio.to_thread(read, task, item, Answer(text))

    async def _in_time(self, asked: Coroutine[Any, Any, Any]) -> Any:
        """What a run answers; None where it is late, a Reply that says why where it cannot be asked."""
        try:
            return await asyncio.wait_for(asked, self.cascade.settings.timeout)
        except TimeoutError:
            return None
        except label_tasks.OtherTask as error:
            return Reply(reason=f"the teacher cannot be asked: {error}")
        except Problem as problem:
            if problem.status_code == 499:  # the client has gone
                raise
            return Reply(reason=f"the teacher cannot be asked: {problem.detail}")

    async def _ask_run(self, request: Request, run: str, task: LabelTask, texts: Sequence[str]) -> list[dict[str, Any]]:
        server = self.server
        version = await server.find(run)
        own = await server.label_task(version)
        if version.task is not None and set(own.labels) != set(task.labels):
            raise Problem(409, f"{run} was trained for {own.name}, not for {task.name}")
        asked = own if version.task is not None else task
        prompts = server.encode(version, [asked.prompt(text) for text in texts])
        tokens = sum(map(estimate_row, texts))
        return await server.answer(request, version, Classify(asked.text), prompts, rows=len(texts), tokens=tokens)
