"""Plans and code for tasks, written together: each answer as it ends, and what follows from it next."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from common.cli import UserError, log
from common.generation.decoding import Decoding
from common.models.batching import context_of
from common.tasks.codegen.prompt import PLAN_AGAIN_REQUEST, plan_prompt

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer

    from common.generation.generate import TextBatch
    from common.generation.result import Generation
    from common.tasks.codegen.writer import CodeAnswer, CodeWriter

PLAN, PLAN_AGAIN, CODE = "plan", "plan again", "code"


@dataclass(frozen=True, eq=False)
class _Question:
    """What is asked for a task; `sample`: of which sample, None for all of them. Code follows a plan, or ""."""

    kind: str
    index: int
    sample: int | None = None
    plan: str = ""


class CodeBatch:
    """What one model writes for some tasks.

    Args:
        tasks: by their indices; more may be put in meanwhile.
        decoding: the second of several samples that are asked for by themselves has the next seed, and so on.
        streamer: gets the tokens of the code; for one task and one sample.
        numbered: a sentence about a task says which one it is.
        batch: where texts are asked for, if others ask there, too; who runs it gives each answer to `take`.
    """

    def __init__(
        self,
        writer: CodeWriter,
        tasks: dict[int, str],
        decoding: Decoding,
        streamer: BaseStreamer | None = None,
        *,
        numbered: bool = True,
        batch: TextBatch | None = None,
    ) -> None:
        from common.generation.generate import TextBatch

        self.writer, self.tasks, self.decoding, self.streamer = writer, tasks, decoding, streamer
        self.numbered = numbered
        self.batch = batch or TextBatch(writer.model, writer.tokenizer, writer.max_batch_tokens)
        self.plans = self.asked_again = self.stayed_empty = 0

    def ask_plan(self, index: int) -> None:
        """Have plans for a task written, one for each sample."""
        self._ask(_Question(PLAN, index), self.writer.style.plan(self.tasks[index]), self._plan_ends)

    def ask_code(self, index: int, sample: int | None = None, plan: str = "", *, first: bool = False) -> None:
        """Have code for a task written: all samples of it, or one that follows a plan if there is one.

        Args:
            first: before all that wait.

        Raises:
            UserError: the prompt does not fit the model's context.
        """
        style, task = self.writer.style, self.tasks[index]
        text = style.code(task, plan) if plan else style.direct(task)
        self._ask(_Question(CODE, index, sample, plan), text, partial(style.ends, task), first=first)

    def run(self) -> Iterator[tuple[int, int, str | CodeAnswer]]:
        """(index of a task, number of a sample, a plan or code) of each, as it ends.

        A plan that is empty is asked for once more, of a model that takes turns; then "" is what there is.
        """
        for written in self.batch.run():
            yield from self.take(*written)
        if self.asked_again:
            log(
                f"{self.asked_again} of {self.plans} plans came back empty and were asked for once more; "
                f"{self.stayed_empty} stayed empty, and their code is written without one"
            )

    def take(self, question: _Question, number: int, generation: Generation) -> list[tuple[int, int, str | CodeAnswer]]:
        """As in `run`, of what the batch has written; none where a plan is asked for once more."""
        sample = number if question.sample is None else question.sample
        if question.kind == CODE:
            code = self.writer.read(self.tasks[question.index], question.plan, generation)
            return [(question.index, sample, code)]
        plan = self.writer.style.read_plan(generation.text)
        self.plans += question.kind == PLAN
        if not plan and question.kind == PLAN and self.writer.style.chat:
            self.asked_again += 1
            text = plan_prompt(self.tasks[question.index], PLAN_AGAIN_REQUEST)
            with suppress(UserError):  # the longer request may not fit
                self._ask(_Question(PLAN_AGAIN, question.index, sample), text, self._plan_ends, first=True)
                return []
        self.stayed_empty += not plan
        return [(question.index, sample, plan)]

    def _plan_ends(self, text: str) -> bool:
        return self.writer.style.plan_ends(text)

    def _ask(self, question: _Question, text: str, ends: Callable[[str], bool], *, first: bool = False) -> None:
        decoding = self.decoding
        if question.sample is not None:  # equal prompts may lead to other answers all the same
            decoding = replace(decoding, num_samples=1, seed=decoding.seed + question.sample)
        prompt = self.writer.encode(text, decoding.thinking)
        context = context_of(self.writer.model.config)
        if len(prompt) + decoding.max_new_tokens > context:
            which = f"the prompt of task {question.index + 1}" if self.numbered else "the prompt"
            raise UserError(
                f"{which} has {len(prompt)} tokens and with {decoding.max_new_tokens} new ones does not fit the "
                f"model's context of {context}; shorten it, or lower --max_new_tokens"
            )
        self.batch.ask(
            question,
            prompt,
            decoding,
            stop=None if decoding.thinking else ends,  # a draft within the thinking ends nothing
            streamer=self.streamer if question.kind == CODE else None,
            first=first,
        )
