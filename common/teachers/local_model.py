"""A teacher that runs here: a model's answers to chats, in batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from common.generation import generate as generation
from common.generation.decoding import Decoding
from common.models import tokenizers
from common.models.batching import context_of
from common.teachers.interview import Answer, NoAnswer, Request

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WINDOW = 64  # answers that are made, and then kept, together


class LocalTeacher:
    """See `teacher_answers.Teacher`.

    Args:
        identity: what tells this model from another, and its precision, as JSON.
        decoding: max_new_tokens, temperature, top_p and seed, as `Decoding` has them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        identity: Any,
        max_batch_tokens: int,
        **decoding: Any,
    ) -> None:
        self.model, self.tokenizer, self.max_batch_tokens = model, tokenizer, max_batch_tokens
        self.decoding = decoding
        self.key: Any = ["local", identity, decoding]

    def ask(self, requests: Sequence[Request], keep: Callable[[int, Answer | NoAnswer], None]) -> None:
        """See `teacher_answers.Teacher`; a chat that does not fit the model's context gets no answer."""
        context = context_of(self.model.config)
        room = context - self.decoding["max_new_tokens"]
        fitting = []
        for place, request in enumerate(requests):
            prompt = tokenizers.encode_chat(self.tokenizer, request.messages)
            if len(prompt) <= room:
                fitting.append((request.sample, place, prompt))
            else:
                reason = f"its {len(prompt)} tokens do not fit the {room} that the teacher has for them"
                keep(place, NoAnswer(reason, lasting=True))
        for sample, some in groupby(sorted(fitting), key=lambda each: each[0]):
            numbered = [(place, prompt) for _, place, prompt in some]
            for start in range(0, len(numbered), WINDOW):
                self._answer(sample, numbered[start : start + WINDOW], keep)

    def _answer(self, sample: int, numbered: list[tuple[int, list[int]]], keep: Callable) -> None:
        found = generation.generate(
            self.model,
            self.tokenizer,
            [prompt for _, prompt in numbered],
            Decoding(**self.decoding | {"seed": self.decoding["seed"] + sample}),
            max_batch_tokens=self.max_batch_tokens,
        )
        for (place, prompt), (answer,) in zip(numbered, found, strict=True):
            keep(place, Answer(answer.text, answer.finished, len(prompt), len(answer.tokens)))
