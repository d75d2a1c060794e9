"""A model that writes code: prompts, decoding and reading of answers together, used by infer, eval and serve alike."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

from common import cli
from common.models import adapters
from common.models import loading as models
from common.models.flags import add_model_flags, source_of
from common.tasks.codegen import prompt as codegen
from common.vram import preflight as vram

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.generation.streamers import BaseStreamer

    from common.generation.result import Generation

TEMPERATURE, TOP_P = 0.8, 0.95  # of several samples a task (Chen et al. 2021, arXiv:2107.03374)


@dataclass(frozen=True)
class CodeAnswer:
    """One answer: the code, the plan it follows ("" when none was asked for), and whether it ended by itself."""

    code: str
    plan: str
    finished: bool
    tokens: int


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of everything that writes code: decoding, prompts and the model's precision."""
    decoding = parser.add_argument_group("decoding")
    decoding.add_argument("--num_samples", type=cli.positive_int, default=1, help="answers to each task")
    decoding.add_argument("--temperature", type=float, help=f"default: 0 (greedy), or {TEMPERATURE} of several samples")
    decoding.add_argument("--top_p", type=float, default=TOP_P, help="probability that sampling stays within")
    decoding.add_argument("--seed", type=int, default=0)
    decoding.add_argument("--max_new_tokens", type=cli.positive_int, default=512, help="of a plan, and of the code")
    decoding.add_argument(
        "--prompt_style",
        choices=("auto", "chat", "completion"),
        default="auto",
        help="auto: completion for a plain base model, which was not trained on turns; chat for all others",
    )
    add_model_flags(parser)


def check_flags(args: argparse.Namespace) -> None:
    """Refuse decoding flags that cannot work, and settle the temperature.

    Raises:
        UserError: a value out of range, or several samples that would all be the same.
    """
    if args.temperature is None:
        args.temperature = TEMPERATURE if args.num_samples > 1 else 0.0
    if args.temperature < 0 or not 0 < args.top_p <= 1:
        raise cli.UserError("--temperature must be 0 or more, --top_p above 0 and at most 1")
    if args.num_samples > 1 and args.temperature == 0:
        raise cli.UserError("--num_samples above 1 needs a --temperature above 0: greedy answers are all the same")


def decoding(args: argparse.Namespace) -> dict[str, Any]:
    """The keywords of `CodeWriter.plan` and `CodeWriter.write` that a command's flags ask for."""
    return {
        "num_samples": args.num_samples,
        "seed": args.seed,
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "top_p": args.top_p,
    }


class CodeWriter:
    """A model that writes code.

    Attributes:
        style: how it is asked: `codegen.CHAT`, or `codegen.COMPLETION` for a plain base model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        style: codegen.Style,
        max_batch_tokens: int = 8192,
    ) -> None:
        self.model, self.tokenizer, self.style, self.max_batch_tokens = model, tokenizer, style, max_batch_tokens

    @classmethod
    def from_flags(cls, args: argparse.Namespace, model_dir: str) -> CodeWriter:
        """The writer that a command's flags ask for (`add_flags`)."""
        loaded = vram.load_within_memory(source_of(args, model_dir), args.max_batch_tokens, auto_fit=args.auto_fit)
        model, tokenizer = loaded.model, loaded.tokenizer
        eos = None if adapters.is_adapter(model_dir) else plain_base_eos(model_dir, tokenizer, args.trust_remote_code)
        if args.prompt_style == "chat" or (args.prompt_style == "auto" and eos is None):
            return cls(model, tokenizer, codegen.CHAT, loaded.max_batch_tokens)
        if eos is not None:
            tokenizer.eos_token = eos
            models.align_model(model, tokenizer)
        return cls(model, tokenizer, codegen.COMPLETION, loaded.max_batch_tokens)

    def plan(self, tasks: Sequence[str], *, num_samples: int = 1, **decoding) -> list[list[str]]:
        """`num_samples` plans for each task, [task][sample]; `decoding` as in `write`."""
        prompts = [self.style.plan(task) for task in tasks]
        found = self._generate(prompts, stop=self.style.plan_ends, num_samples=num_samples, **decoding)
        return [[self.style.read_plan(one.text) for one in row] for row in found]

    def write(
        self,
        tasks: Sequence[str],
        plans: Sequence[Sequence[str]] | None = None,
        *,
        num_samples: int = 1,
        seed: int = 0,
        streamer: BaseStreamer | None = None,
        **decoding,
    ) -> list[list[CodeAnswer]]:
        """`num_samples` answers to each task, [task][sample]; an answer does not depend on the other tasks.

        Args:
            plans: of each task a plan for each sample, which its code is to follow.
            streamer: gets the tokens of the code; for one task and one sample.
            decoding: `max_new_tokens`, `temperature` and `top_p` of `generation.generate`.

        Raises:
            UserError: a prompt does not fit the model's context.
        """
        settings = {"stop": self.style.ends, "streamer": streamer, **decoding}
        if plans is None:
            prompts = [self.style.direct(task) for task in tasks]
            found = self._generate(prompts, num_samples=num_samples, seed=seed, **settings)
            return [[self._answer(task, "", one) for one in row] for task, row in zip(tasks, found, strict=True)]
        answers: list[list[CodeAnswer]] = [[] for _ in tasks]
        for sample in range(num_samples):  # each with a seed of its own: two equal plans may lead to different code
            chosen = [row[sample] for row in plans]
            prompts = [self.style.code(task, plan) for task, plan in zip(tasks, chosen, strict=True)]
            found = self._generate(prompts, seed=seed + sample, **settings)
            for task, plan, (one,), row in zip(tasks, chosen, found, answers, strict=True):
                row.append(self._answer(task, plan, one))
        return answers

    def streamer(self, out: TextIO) -> BaseStreamer | None:
        """Writes the code of one answer to `out` line by line; None for a model whose code is known at its end only."""
        return _code_streamer(self.tokenizer, out) if self.style is codegen.CHAT else None

    def _generate(self, texts: Sequence[str], **decoding) -> list[list[Generation]]:
        from common.generation import generate as generation
        from common.models import tokenizers

        if self.style is codegen.CHAT:
            prompts = [tokenizers.encode_prompt(self.tokenizer, text) for text in texts]
        else:
            prompts = [self.tokenizer.encode(text, split_special_tokens=True) for text in texts]
        return generation.generate(
            self.model, self.tokenizer, prompts, max_batch_tokens=self.max_batch_tokens, **decoding
        )

    def _answer(self, task: str, plan: str, found: Generation) -> CodeAnswer:
        code = self.style.read(task, found.text, found.finished)
        return CodeAnswer(code, plan, found.finished, len(found.tokens))


def plain_base_eos(name: str, tokenizer: PreTrainedTokenizerBase, trust_remote_code: bool = False) -> str | None:
    """The EOS of a plain base model, as its own files declare it; None for a model that was trained on turns.

    Qwen's base (non-Instruct) models bring a chat template whose end of turn they do not stop at: they declare
    `<|endoftext|>` alone as EOS. An Instruct model declares the end of its turn, in the tokenizer or among the EOS of
    its generation config.

    Args:
        tokenizer: the model's, aligned (`tokenizers.align`), so that its EOS is the end of the turn.
    """
    from transformers import AutoTokenizer, GenerationConfig

    declared = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    if not tokenizer.chat_template:
        return declared.eos_token
    ends = {declared.eos_token_id}
    with suppress(OSError):  # it may have no generation config
        ids = GenerationConfig.from_pretrained(name).eos_token_id
        ends |= set(ids if isinstance(ids, list) else [ids])
    return None if tokenizer.eos_token_id in ends else declared.eos_token


def _code_streamer(tokenizer: PreTrainedTokenizerBase, out: TextIO) -> BaseStreamer:
    from transformers import TextStreamer

    class CodeStreamer(TextStreamer):
        text = shown = ""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.text += text
            code = codegen.code_of(self.text) + "\n" if stream_end else codegen.marked_lines(self.text)
            out.write(code[len(self.shown) :])
            out.flush()
            self.shown = code

    return CodeStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
