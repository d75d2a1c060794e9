"""A teacher that runs here: a model's answers to chats, written together and kept one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from common.cli import UserError
from common.generation.decoding import Decoding
from common.generation.generate import TextBatch
from common.models import tokenizers
from common.models.batching import context_of
from common.models.source import LoadedModel
from common.teachers.interview import Answer, NoAnswer, Question

DECIDING = ("max_new_tokens", "temperature", "top_p", "seed", "thinking")  # of a decoding, for an answer


class LocalTeacher:
    """See `interview.Teacher`.

    Args:
        loaded: the model.
        identity: what tells this model from another, and its precision, as JSON.
        decoding: how it writes; the seed counts up with the sample.
    """

    def __init__(self, loaded: LoadedModel, identity: Any, decoding: Decoding) -> None:
        self.loaded, self.decoding, kept = loaded, decoding, decoding.as_dict()
        self.key: Any = ["local", identity, {name: kept[name] for name in DECIDING if name in kept}]

    def ask(self, questions: Sequence[Question], keep: Callable[[int, Answer | NoAnswer], None]) -> None:
        """See `interview.Teacher`; a chat that does not fit the model's context gets no answer.

        Raises:
            UserError: none would fit.
        """
        context, budget = context_of(self.loaded.model.config), self.decoding.max_new_tokens
        room = context - budget
        if room <= 0:
            raise UserError(
                f"--max_new_tokens {budget} leaves nothing of the teacher's {context} for a prompt; lower it"
            )
        fitting = []
        for index, question in enumerate(questions):
            prompt = tokenizers.encode_chat(self.loaded.tokenizer, question.messages, thinking=self.decoding.thinking)
            if len(prompt) <= room:
                fitting.append((question, index, prompt))
            else:
                reason = f"{len(prompt)} tokens do not fit the {room} that --max_new_tokens {budget} leaves"
                keep(index, NoAnswer(reason, lasting=True))
        batch = TextBatch(self.loaded.model, self.loaded.tokenizer, self.loaded.max_batch_tokens)
        for question, index, prompt in sorted(fitting, key=lambda fitted: -len(fitted[2])):
            decoding = replace(self.decoding, seed=self.decoding.seed + question.sample)
            ends = None if decoding.thinking else question.ends  # a draft within the thinking ends nothing
            batch.ask((index, len(prompt)), prompt, decoding, stop=ends)
        for (index, length), _, answer in batch.run():
            keep(index, Answer(answer.text, answer.finished, length, len(answer.tokens)))
