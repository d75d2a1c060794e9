"""A model that writes code: prompts, decoding and reading of answers together, used by infer, eval and serve alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TextIO

from common import run_record
from common.cli import UserError, log
from common.data import task_record
from common.generation.decoding import Decoding
from common.models import adapters
from common.models import loading as models
from common.models.batching import by_token_budget, context_of
from common.models.source import LoadedModel, ModelSource
from common.tasks.codegen import answer
from common.tasks.codegen.prompt import PLAN_AGAIN_REQUEST, names_asked_for, plan_prompt
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
        cls, source: ModelSource, max_batch_tokens: int, *, prompt_style: str = "auto", auto_fit: bool = False
    ) -> CodeWriter:
        """The writer of a model, with as many tokens in a forward pass as the memory allows.

        Args:
            prompt_style: one of `PROMPT_STYLES`; "auto" is completion for a plain base model, chat for all others.
            auto_fit: where memory is short, take settings that fit.
        """
        loaded = vram.load_within_memory(source, max_batch_tokens, auto_fit=auto_fit)
        style, eos = style_of(source.model_dir, loaded.tokenizer, prompt_style, source.trust_remote_code)
        if eos is not None:
            loaded.tokenizer.eos_token = eos
            models.align_model(loaded.model, loaded.tokenizer)
        return cls(loaded, style)

    def plan(self, tasks: Sequence[str], decoding: Decoding) -> list[list[str]]:
        """`decoding.num_samples` plans for each task, [task][sample]; "" where the model writes none, asked twice."""

        def ends(number: int, text: str) -> bool:
            return self.style.plan_ends(text)

        generations = self._generate([self.style.plan(task) for task in tasks], decoding, stop=ends)
        plans = [[self.style.read_plan(generation.text) for generation in row] for row in generations]
        empty = [(index, sample) for index, row in enumerate(plans) for sample, plan in enumerate(row) if not plan]
        if empty and self.style.chat:
            log(f"{len(empty)} of {sum(map(len, plans))} plans came back empty; asking for them once more")
            for sample in sorted({sample for _, sample in empty}):
                rows = [index for index, other in empty if other == sample]
                prompts = [plan_prompt(tasks[index], PLAN_AGAIN_REQUEST) for index in rows]
                again = self._generate(
                    prompts, replace(decoding, num_samples=1, seed=decoding.seed + sample), stop=ends
                )
                for index, (generation,) in zip(rows, again, strict=True):
                    plans[index][sample] = self.style.read_plan(generation.text)
            if still := sum(not plan for row in plans for plan in row):
                log(f"{still} plans stayed empty; their code is written without one")
        return plans

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

        def stop(number: int, text: str) -> bool:
            return self.style.ends(tasks[number], text)

        if plans is None:
            prompts = [self.style.direct(task) for task in tasks]
            generations = self._generate(prompts, decoding, stop=stop, streamer=streamer)
            return [
                [self._answer(task, "", generation) for generation in row]
                for task, row in zip(tasks, generations, strict=True)
            ]
        answers: list[list[CodeAnswer]] = [[] for _ in tasks]
        for sample in range(decoding.num_samples):  # each with a seed of its own: equal plans may lead to other code
            of_sample = [row[sample] for row in plans]
            prompts = [
                self.style.code(task, plan) if plan else self.style.direct(task)
                for task, plan in zip(tasks, of_sample, strict=True)
            ]
            one = replace(decoding, num_samples=1, seed=decoding.seed + sample)
            generations = self._generate(prompts, one, stop=stop, streamer=streamer)
            for task, plan, (generation,), row in zip(tasks, of_sample, generations, answers, strict=True):
                row.append(self._answer(task, plan, generation))
        return answers

    def streamer(self, task: str, out: TextIO, *, thinking: bool = False) -> BaseStreamer | None:
        """Writes the code of one answer to `out` line by line; None for a model whose code is known at its end only.

        Args:
            thinking: the model is asked to think first, which is not written.
        """
        from common.models import chat_template, tokenizers

        if not self.style.chat:
            return None
        prompt = tokenizers.encode_prompt(self.tokenizer, task, thinking=thinking)
        opened = chat_template.THINK * chat_template.opens_thinking(self.tokenizer, prompt)
        return _code_streamer(self.tokenizer, task, out, opened)

    def write_each(
        self, tasks: Sequence[str], decoding: Decoding, plan_first: bool = False
    ) -> Iterator[tuple[int, list[CodeAnswer]]]:
        """(index of a task, its answers) as they are written: a batch at a time, the longest tasks first.

        Args:
            plan_first: write plans, and the code after them.
        """
        lengths = [len(self._encode(self.style.direct(task), decoding)) for task in tasks]
        budget = max(1, self.max_batch_tokens // decoding.num_samples)
        for batch in by_token_budget(lengths, budget, added=decoding.max_new_tokens):
            of_batch = [tasks[index] for index in batch]
            plans = self.plan(of_batch, decoding) if plan_first else None
            yield from zip(batch, self.write(of_batch, decoding, plans), strict=True)

    def _encode(self, text: str, decoding: Decoding) -> list[int]:
        from common.models import tokenizers

        if self.style.chat:
            return tokenizers.encode_prompt(self.tokenizer, text, thinking=decoding.thinking)
        return self.tokenizer.encode(text, split_special_tokens=True)

    def _generate(
        self,
        texts: Sequence[str],
        decoding: Decoding,
        stop: Callable[[int, str], bool],
        streamer: BaseStreamer | None = None,
    ) -> list[list[Generation]]:
        from common.generation import generate as generation

        return generation.generate(
            self.model,
            self.tokenizer,
            [self._encode(text, decoding) for text in texts],
            decoding,
            stop=None if decoding.thinking else stop,  # a draft within the thinking ends nothing
            streamer=streamer,
            max_batch_tokens=self.max_batch_tokens,
        )

    def _answer(self, task: str, plan: str, generation: Generation) -> CodeAnswer:
        code, cut = self.style.read(task, generation.text, generation.finished)
        return CodeAnswer(code, plan, generation.finished, len(generation.tokens), cut)


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


def _code_streamer(tokenizer: PreTrainedTokenizerBase, task: str, out: TextIO, opened: str) -> BaseStreamer:
    from transformers import TextStreamer

    names = names_asked_for(task)

    class CodeStreamer(TextStreamer):
        text, shown = opened, ""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.text += text
            code = answer.code_of(self.text, names) + "\n" if stream_end else answer.marked_lines(self.text, names)
            if code.startswith(self.shown):
                out.write(code[len(self.shown) :])
                self.shown = code
            elif stream_end:  # an import or a helper came later, and stands before what was shown
                out.write(f"\n\n# The whole answer:\n\n{code}")
            out.flush()

    return CodeStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
