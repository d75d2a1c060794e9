"""Text from a model: many answers at a time, each independent of what else is being written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from common.cli import UserError
from common.generation.continuous_batch import ContinuousBatch, Drawn, Wanted, asker_of
from common.generation.decoding import Decoding
from common.generation.result import THINKING_ENDS, Generation, final_answer
from common.generation.steering import Steering
from common.models import chat_template
from common.models.batching import MAX_BATCH_TOKENS, context_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.generation.streamers import BaseStreamer


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    **how,
) -> list[list[Generation]]:
    """`decoding.num_samples` answers to each prompt, [prompt][sample]; see `generate_each`."""
    answers: list[dict[int, Generation]] = [{} for _ in prompts]
    for number, sample, answer in generate_each(model, tokenizer, prompts, decoding, **how):
        answers[number][sample] = answer
    return [[of_prompt[sample] for sample in range(decoding.num_samples)] for of_prompt in answers]


def generate_each(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    steering: Callable[[int], Steering] | None = None,
    stop: Callable[[int, str], bool] | None = None,
    streamer: BaseStreamer | None = None,
    whole: bool = False,
    logprobs: bool = False,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
) -> Iterator[tuple[int, int, Generation]]:
    """(number of a prompt, number of a sample, the answer) of each answer, as it ends.

    An answer ends at any of the model's stop tokens (`tokenizers.stop_ids`); thinking before it is not part of it. A
    sample depends on the model, the prompt, its number and the seed alone, not on what is written beside it.

    Args:
        prompts: token ids, as `tokenizers.encode_prompt` makes them.
        steering: called with the number of a prompt when an answer to it begins; what it returns changes the scores
            before temperature and top_p. A text that is held to a grammar is an answer as a whole: where
            `decoding.thinking` asks for it the model thinks before that, freely, within a budget of
            `decoding.max_new_tokens` of its own.
        stop: called with the number of a prompt and its answer so far after every token; True ends that.
        streamer: gets the tokens as they come; for one prompt and one sample.
        whole: the text is all that was written, its thinking included.
        logprobs: with the log-probability of each token.
        max_batch_tokens: see `ContinuousBatch`.

    Raises:
        UserError: a prompt does not fit the model's context with `decoding.max_new_tokens`; a model is to think before
            JSON whose chat template knows no thinking.
    """
    batch = TextBatch(model, tokenizer, max_batch_tokens)
    thinks_first = decoding.thinking and steering is not None
    check_context(prompts, decoding.max_new_tokens * (1 + thinks_first), context_of(model.config))
    for number in sorted(range(len(prompts)), key=lambda number: -len(prompts[number])):
        batch.ask(
            number,
            prompts[number],
            decoding,
            steering=partial(steering, number) if steering else None,
            stop=partial(stop, number) if stop else None,
            streamer=streamer,
            whole=whole,
            logprobs=logprobs,
        )
    yield from batch.run()


@dataclass(frozen=True)
class _Asked:
    """What a prompt is asked for."""

    key: Any
    prompt: Sequence[int]
    decoding: Decoding
    how: dict[str, Any]


class TextBatch:
    """Answers to prompts in one continuous batch; prompts may be added while answers come.

    Args:
        max_batch_tokens: see `ContinuousBatch`.
        shared: a batch that others ask, too. Whoever runs it gives each answer to the `take` of its asker.
        adapter: see `Asker`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        max_batch_tokens: int = MAX_BATCH_TOKENS,
        *,
        shared: ContinuousBatch | None = None,
        adapter: str | None = None,
    ) -> None:
        self.tokenizer, self.asker = tokenizer, asker_of(model, tokenizer, adapter=adapter)
        self.batch = shared or ContinuousBatch(model, tokenizer, max_batch_tokens)

    def ask(
        self,
        key: Any,
        prompt: Sequence[int],
        decoding: Decoding,
        *,
        steering: Callable[[], Steering] | None = None,
        stop: Callable[[str], bool] | None = None,
        streamer: BaseStreamer | None = None,
        whole: bool = False,
        logprobs: bool = False,
        first: bool = False,
    ) -> None:
        """Have `decoding.num_samples` answers to a prompt written; the rest is as in `generate_each`.

        Args:
            key: the asker's name for the prompt.
            first: before all that wait.

        Raises:
            UserError: the model is to think before JSON, and its chat template knows no thinking.
        """
        how = {"steering": steering, "stop": stop, "streamer": streamer, "logprobs": logprobs}
        how |= {"lookup": decoding.prompt_lookup_num_tokens, "asker": self.asker}
        asked = _Asked(key, prompt, decoding, how | {"text_of": self._reader(prompt, decoding, whole or steering)})
        if decoding.thinking and steering is not None:
            self.batch.add(self._thought(asked), first=first)
        else:
            self._add_samples(asked, prompt, first)

    def run(self, between: Callable[[], None] = lambda: None) -> Iterator[tuple[Any, int, Generation]]:
        """(key of a prompt, number of a sample, the answer) of each answer, as it ends.

        Args:
            between: called before each step, and before the end; may ask for more.
        """
        for wanted, answer in self.batch.run(between):
            yield from self.take(wanted, answer)

    def take(self, wanted: Wanted, answer: Generation | Exception) -> list[tuple[Any, int, Generation]]:
        """As in `run`, of what the batch has written; none where it goes on from that, since it was a thought.

        Raises:
            Exception: the answer is one (see `ContinuousBatch.run`).
        """
        if isinstance(answer, Exception):
            raise answer
        asked, sample = wanted.key
        if sample is not None:
            return [(asked.key, sample, answer)]
        self._add_samples(asked, self._thought_through(asked.prompt, answer.text), first=True)
        return []

    def _reader(self, prompt: Sequence[int], decoding: Decoding, whole: Any) -> Callable[[str], str]:
        """What tells the answer from the thinking before it, which the prompt may have begun."""
        if whole:
            return str
        opened = decoding.thinking and chat_template.opens_thinking(self.tokenizer, prompt)
        return partial(_answer_behind, chat_template.THINK * opened)

    def _add_samples(self, asked: _Asked, prompt: Sequence[int], first: bool) -> None:
        decoding = asked.decoding
        samples = range(decoding.num_samples)
        for sample in reversed(samples) if first else samples:
            drawn = None if decoding.greedy else Drawn(decoding.temperature, decoding.top_p, decoding.seed, sample)
            wanted = Wanted((asked, sample), prompt, decoding.max_new_tokens, drawn, **asked.how)
            self.batch.add(wanted, first=first)

    def _thought(self, asked: _Asked) -> Wanted:
        """What the model thinks before it answers, which all samples of a prompt share."""
        if not chat_template.thinks(self.tokenizer):
            raise UserError("the model's chat template knows no thinking; ask without it")
        decoding = asked.decoding
        budget = max(1, decoding.max_new_tokens - len(self._end_of_thinking()))
        drawn = None if decoding.greedy else Drawn(decoding.temperature, decoding.top_p, decoding.seed)
        return Wanted(
            (asked, None),
            asked.prompt,
            budget,
            drawn,
            stop=lambda text: bool(THINKING_ENDS.search(text)),
            lookup=decoding.prompt_lookup_num_tokens,
            asker=self.asker,
        )

    def _thought_through(self, prompt: Sequence[int], thought: str) -> list[int]:
        """A prompt with the model's thinking behind it, ended by one `</think>`: an answer can begin at its end.

        Thinking that the model did not end within the budget is ended for it.
        """
        text = THINKING_ENDS.split(thought)[0].rstrip()
        return [*prompt, *self.tokenizer.encode(text, add_special_tokens=False), *self._end_of_thinking()]

    def _end_of_thinking(self) -> list[int]:
        return self.tokenizer.encode(f"\n{chat_template.THINK_END}\n\n", add_special_tokens=False)


def _answer_behind(opened: str, text: str) -> str:
    return final_answer(opened + text)


def check_context(
    prompts: Sequence[Sequence[int]], new_tokens: int, context: int, budget: str = "--max_new_tokens"
) -> None:
    """Raises UserError where a prompt does not fit a model's context with so many new tokens, as `budget` is to say."""
    for number, prompt in enumerate(prompts, start=1):
        if len(prompt) + new_tokens > context:
            raise UserError(
                f"prompt {number} has {len(prompt)} tokens and with {new_tokens} new ones does not fit the model's "
                f"context of {context}; shorten it, or lower {budget}"
            )
