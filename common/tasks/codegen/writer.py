"""A model that writes code: prompts, decoding and reading of answers together, used by infer, eval and serve alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

from common import run_record
from common.cli import UserError
from common.data import task_record
from common.generation.decoding import Decoding
from common.models import adapters
from common.models import loading as models
from common.models.batching import context_of
from common.models.source import LoadedModel, ModelSource
from common.tasks.codegen import answer
from common.tasks.codegen.code_batch import CodeBatch
from common.tasks.codegen.prompt import names_asked_for
from common.tasks.codegen.style import COMPLETION, UNTRAINED, Style, trained_style
from common.vram import preflight as vram

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from transformers.generation.streamers import BaseStreamer

    from common.generation.result import Generation

PROMPT_STYLES = ("auto", "chat", "completion")


@dataclass(frozen=True)
class CodeAnswer:
    """One answer.

    Attributes:
        code: the program.
        plan: what it follows; "" when none was asked for.
        finished: it ended by itself, not with its budget of tokens.
        tokens: tokens written.
        cut: the budget ended before all that was asked for was there; the code has whole statements all the same.
    """

    code: str
    plan: str
    finished: bool
    tokens: int
    cut: bool = False


class CodeWriter:
    """A model that writes code.

    Attributes:
        style: how it is asked (`style_of`).
    """

    def __init__(self, loaded: LoadedModel, style: Style) -> None:
        self.model, self.tokenizer, self.max_batch_tokens = loaded.model, loaded.tokenizer, loaded.max_batch_tokens
        self.style = style

    @classmethod
    def load(
        cls, source: ModelSource, max_batch_tokens: int | None, *, prompt_style: str = "auto", auto_fit: bool = False
    ) -> CodeWriter:
        """The writer of a model, with as many tokens in a forward pass as the memory allows.

        Args:
            max_batch_tokens: None: as `load_within_memory` chooses.
            prompt_style: one of `PROMPT_STYLES`; "auto" is completion for a plain base model, chat for all others.
            auto_fit: where memory is short, take settings that fit.
        """
        loaded = vram.load_within_memory(source, max_batch_tokens, auto_fit=auto_fit, text_only=True)
        style, eos = style_of(source.model_dir, loaded.tokenizer, prompt_style, source.trust_remote_code)
        if eos is not None:
            loaded.tokenizer.eos_token = eos
            models.align_model(loaded.model, loaded.tokenizer)
        return cls(loaded, style)

    def plan(self, tasks: Sequence[str], decoding: Decoding) -> list[list[str]]:
        """`decoding.num_samples` plans for each task, [task][sample]; "" where the model writes none, asked twice."""
        work = CodeBatch(self, dict(enumerate(tasks)), decoding)
        for index in range(len(tasks)):
            work.ask_plan(index)
        return _in_order(work.run(), len(tasks))

    def write(
        self,
        tasks: Sequence[str],
        decoding: Decoding,
        plans: Sequence[Sequence[str]] | None = None,
        *,
        streamer: BaseStreamer | None = None,
    ) -> list[list[CodeAnswer]]:
        """`decoding.num_samples` answers to each task, [task][sample], which do not depend on the other tasks.

        Args:
            plans: of each task a plan for each sample, which its code is to follow.
            streamer: gets the tokens of the code; for one task and one sample.

        Raises:
            UserError: a prompt does not fit the model's context.
        """
        work = CodeBatch(self, dict(enumerate(tasks)), decoding, streamer)
        for index in range(len(tasks)):
            if plans is None:
                work.ask_code(index)
            for sample, plan in enumerate(plans[index] if plans else ()):
                work.ask_code(index, sample, plan)
        return _in_order(work.run(), len(tasks))

    def write_each(
        self,
        tasks: Sequence[str],
        decoding: Decoding,
        plan_first: bool = False,
    ) -> Iterator[tuple[int, list[CodeAnswer]]]:
        """(index of a task, its answers) of each task, as they have been written; the longest tasks are begun first.

        Args:
            plan_first: write plans, and the code after them.

        Raises:
            UserError: a prompt does not fit the model's context.
        """
        work = CodeBatch(self, dict(enumerate(tasks)), decoding)
        answers: list[dict[int, CodeAnswer]] = [{} for _ in tasks]
        for index in sorted(range(len(tasks)), key=lambda index: -len(tasks[index])):
            (work.ask_plan if plan_first else work.ask_code)(index)
        for index, sample, written in work.run():
            if isinstance(written, str):
                work.ask_code(index, sample, written, first=True)
                continue
            of_task = answers[index]
            of_task[sample] = written
            if len(of_task) == decoding.num_samples:
                yield index, [of_task[number] for number in range(decoding.num_samples)]

    def streamer(self, task: str, out: TextIO, *, thinking: bool = False) -> BaseStreamer | None:
        """Writes the code of one answer to `out` line by line; None for a model whose code is known at its end only.

        Args:
            thinking: the model is asked to think first, which is not written.
        """
        from common.generation.answer_streamer import AnswerStreamer
        from common.models import chat_template, tokenizers

        if not self.style.chat:
            return None
        prompt = tokenizers.encode_prompt(self.tokenizer, task, thinking=thinking)
        opened = chat_template.THINK * chat_template.opens_thinking(self.tokenizer, prompt)
        return AnswerStreamer(self.tokenizer, _GrowingCode(task, out, opened).show)

    def encode(self, text: str, thinking: bool = False) -> list[int]:
        """The token ids of a prompt."""
        from common.models import tokenizers

        if self.style.chat:
            return tokenizers.encode_prompt(self.tokenizer, text, thinking=thinking)
        return self.tokenizer.encode(text, split_special_tokens=True)

    def read(self, task: str, plan: str, generation: Generation) -> CodeAnswer:
        """What a model has written for a task, after a plan or ""."""
        code, cut = self.style.read(task, generation.text, generation.finished)
        return CodeAnswer(code, plan, generation.finished, len(generation.tokens), cut)


def _in_order(values: Iterator[tuple[int, int, Any]], tasks: int) -> list[list[Any]]:
    """[task][sample] of what comes in any order."""
    of_tasks: list[dict[int, Any]] = [{} for _ in range(tasks)]
    for index, sample, value in values:
        of_tasks[index][sample] = value
    return [[of_task[sample] for sample in sorted(of_task)] for of_task in of_tasks]


def check_lengths(source: ModelSource, tasks: Sequence[str], max_new_tokens: int) -> None:
    """Refuse a task that is too long for a model before that is loaded, from its config alone where that will do.

    Raises:
        UserError: a task and its answer do not fit the model's context.
    """
    from common.models import tokenizers

    context = context_of(models.load_config(models.base_source(source).model_dir, source.trust_remote_code))
    room = context - max_new_tokens
    doubtful = [index for index, task in enumerate(tasks) if len(task.encode()) > room]  # a token has at least a byte
    if not doubtful:
        return
    folder = adapters.tokenizer_folder(source.model_dir, source.base)
    tokenizer = tokenizers.load_tokenizer(folder, trust_remote_code=source.trust_remote_code)
    for index in doubtful:
        if (count := len(tokenizer.encode(tasks[index], split_special_tokens=True))) > room:
            raise UserError(
                f"task {index + 1} has {count:,} tokens and with {max_new_tokens} new ones does not fit the model's "
                f"context of {context:,}; shorten it, or lower --max_new_tokens"
            )


def style_of(
    model_dir: str, tokenizer: PreTrainedTokenizerBase, prompt_style: str = "auto", trust_remote_code: bool = False
) -> tuple[Style, str | None]:
    """(how the model of a folder or a Hub id is asked, the EOS of its answers where that is not its tokenizer's).

    A trained one is asked as its training rows did, which its record tells.

    Args:
        tokenizer: the model's, aligned.
        prompt_style: one of `PROMPT_STYLES`.
    """
    trained = is_trained(model_dir)
    eos = None if trained else plain_base_eos(model_dir, tokenizer, trust_remote_code)
    if prompt_style == "completion" or (prompt_style == "auto" and eos is not None):
        return COMPLETION, eos
    return (trained_style(_prompt_endings(model_dir)) if trained else UNTRAINED), None


def is_trained(model_dir: str) -> bool:
    """Whether a model was trained by this toolkit, or is an adapter: its requests are those of its training."""
    return adapters.is_adapter(model_dir) or _run_of(model_dir) is not None or _task_of(model_dir) is not None


def _prompt_endings(model_dir: str) -> list[str] | None:
    """What a model's training prompts ended with; None where nothing says so."""
    known = [
        record["prompt_endings"]
        for record in (_task_of(model_dir), _run_of(model_dir))
        if record and "prompt_endings" in record
    ]
    return next((endings for endings in known if endings), known[0] if known else None)


def _task_of(model_dir: str) -> dict[str, Any] | None:
    try:
        return task_record.read(model_dir)
    except UserError:  # it answers all the same
        return None


def _run_of(model_dir: str) -> dict[str, Any] | None:
    """The record of the run that a model comes from; an empty one where it is broken, None where there is none."""
    try:
        return run_record.read(model_dir)
    except UserError:  # it answers all the same
        return {}


def plain_base_eos(name: str, tokenizer: PreTrainedTokenizerBase, trust_remote_code: bool = False) -> str | None:
    """The EOS of a plain base model, as its own files declare it; None for a model that was trained on turns.

    Qwen's base (non-Instruct) models bring a chat template whose end of turn they do not stop at: they declare
    `<|endoftext|>` alone as EOS. An Instruct model declares the end of its turn, in the tokenizer or among the EOS of
    its generation config.

    Args:
        tokenizer: the model's, aligned (`tokenizers.align`), so that its EOS is the end of the turn.
    """
    from transformers import AutoTokenizer, GenerationConfig
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    eos = get_tokenizer_config(name, trust_remote_code=trust_remote_code).get("eos_token")
    eos = eos["content"] if isinstance(eos, dict) else eos
    if eos is None:  # its class decides
        eos = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code).eos_token
    if not tokenizer.chat_template:
        return eos
    ends = {tokenizer.convert_tokens_to_ids(eos)}
    with suppress(OSError):  # it may have no generation config
        ids = GenerationConfig.from_pretrained(name).eos_token_id
        ends |= set(ids if isinstance(ids, list) else [ids])
    return None if tokenizer.eos_token_id in ends else eos


class _GrowingCode:
    """Writes the code of a growing answer line by line."""

    def __init__(self, task: str, out: TextIO, opened: str) -> None:
        self.names, self.out = names_asked_for(task), out
        self.text, self.shown = opened, ""

    def show(self, more: str, end: bool) -> None:
        self.text += more
        if not (end or "\n" in more):
            return
        code = answer.code_of(self.text, self.names) + "\n" if end else answer.marked_lines(self.text, self.names)
        if code.startswith(self.shown):
            self.out.write(code[len(self.shown) :])
            self.shown = code
        elif end:  # an import or a helper came later, and stands before what was shown
            self.out.write(f"\n\n# The whole answer:\n\n{code}")
        self.out.flush()
