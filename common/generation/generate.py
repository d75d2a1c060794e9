"""Text from a model: batched, each answer independent of what else is in the batch, with the tokens' log-probabilities.

transformers' `generate` does the decoding. Sampling is done here, as a logits processor, because `generate` draws all
rows of a batch from one stream, so that an answer would depend on its neighbours.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence, Set
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from common.cli import UserError
from common.generation.decoding import Decoding
from common.generation.result import THINKING_ENDS, Generation, final_answer
from common.models import chat_template
from common.models.batching import MAX_BATCH_TOKENS, by_token_budget, context_of
from common.models.tokenizers import decode, stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.generation.streamers import BaseStreamer


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    processors: Callable[[list[int]], list[LogitsProcessor]] | None = None,
    stop: Callable[[int, str], bool] | None = None,
    streamer: BaseStreamer | None = None,
    whole: bool = False,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
    on_end: Callable[[int], None] | None = None,
) -> list[list[Generation]]:
    """`decoding.num_samples` answers to each prompt, [prompt][sample].

    An answer ends at any of the model's stop tokens (`tokenizers.stop_ids`); thinking before it is not part of it. A
    sample depends on the model, the prompt, its number and the seed alone, not on the batch.

    Args:
        prompts: token ids, as `tokenizers.encode_prompt` makes them.
        processors: called for every batch with the prompt number of each of its rows; returns processors of the scores
            of those rows, new ones each time; an `EndingProcessor` tells where it ended one. They see the scores before
            temperature and top_p. A text that they hold to a grammar is an answer as a whole: where `decoding.thinking`
            asks for it the model thinks before that, freely, within a budget of `decoding.max_new_tokens` of its own.
        stop: called with the number of a prompt and its answer so far after every token; True ends that.
        streamer: gets the tokens as they come; for one prompt and one sample.
        whole: the text is all that was written, its thinking included.
        max_batch_tokens: bounds rows x (longest prompt + max_new_tokens) of a batch; one row always goes.
        on_end: called with the number of a prompt whenever one of its answers has come to its end, while others of its
            batch are still being written.

    Raises:
        UserError: a prompt does not fit the model's context with `decoding.max_new_tokens`; a model is to think before
            JSON whose chat template knows no thinking.
    """
    max_new_tokens = decoding.max_new_tokens
    thinks_first = decoding.thinking and processors is not None
    _check_context(prompts, max_new_tokens * (1 + thinks_first), context_of(model.config))
    if thinks_first:
        prompts = _think(model, tokenizer, prompts, decoding, max_batch_tokens)
    answers: list[list[Generation]] = [[] for _ in prompts]
    ends = set(stop_ids(tokenizer, model.generation_config))

    opened = [decoding.thinking and chat_template.opens_thinking(tokenizer, prompt) for prompt in prompts]

    def read(row: int, tokens: Sequence[int]) -> str:
        text = decode(tokenizer, tokens)
        return text if processors or whole else final_answer(chat_template.THINK * opened[row] + text)

    wanted = [row for row in range(len(prompts)) for _ in range(decoding.num_samples)]  # samples of a prompt in order
    sample_numbers = [0] * len(prompts)
    for batch in by_token_budget([len(prompts[row]) for row in wanted], max_batch_tokens, added=max_new_tokens):
        rows = [wanted[number] for number in batch]
        chain: list[LogitsProcessor] = [recorder := _TokenLogprobs()]
        chain += (grammar := processors(rows) if processors else [])
        if decoding.temperature > 0:
            keys = []
            for row in rows:
                keys.append((decoding.seed, sample_numbers[row], prompts[row]))
                sample_numbers[row] += 1
            chain.append(_Sample(keys, decoding.temperature, decoding.top_p))
        asked = [prompts[row] for row in rows]
        stops = [partial(stop, row) for row in rows] if stop else [None] * len(rows)
        reads = [partial(read, row) for row in rows]
        criteria: list[StoppingCriteria] = [_StopText(reads, max(map(len, asked)), stops)] if stop else []
        if on_end:
            criteria.append(ending := _Ending(ends, lambda place, rows=rows: on_end(rows[place])))
        tokens = _generate_batch(model, tokenizer, asked, max_new_tokens, chain, criteria, streamer)
        if on_end:
            ending.finish()
        logprobs = recorder.finish(tokens)
        closed = {place for each in grammar if isinstance(each, EndingProcessor) for place in each.closed_rows()}
        for place, (row, ids, chances) in enumerate(zip(rows, tokens.tolist(), logprobs, strict=True)):
            answer = _answer(reads[place], ends, ids, chances, max_new_tokens, stops[place])
            answers[row].append(replace(answer, cut=place in closed or not answer.finished))
    return answers


class EndingProcessor(LogitsProcessor):
    """A processor that may bring a text to its end before the model would have ended it."""

    def closed_rows(self) -> list[int]:
        """The rows of the batch in which it has."""
        raise NotImplementedError


def _check_context(prompts: Sequence[Sequence[int]], new_tokens: int, context: int) -> None:
    for number, prompt in enumerate(prompts, start=1):
        if len(prompt) + new_tokens > context:
            raise UserError(
                f"prompt {number} has {len(prompt)} tokens and with {new_tokens} new ones does not fit the model's "
                f"context of {context}; shorten it, or lower --max_new_tokens"
            )


def _think(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    max_batch_tokens: int,
) -> list[list[int]]:
    """Each prompt with the model's thinking behind it, ended by one `</think>`: an answer can begin at its end.

    Thinking that the model does not end within the budget is ended for it. Samples of a prompt share one thinking.
    """
    if not chat_template.thinks(tokenizer):
        raise UserError("the model's chat template knows no thinking; ask without it")
    end = tokenizer.encode(f"\n{chat_template.THINK_END}\n\n", add_special_tokens=False)
    thoughts = generate(
        model,
        tokenizer,
        prompts,
        replace(decoding, max_new_tokens=max(1, decoding.max_new_tokens - len(end)), num_samples=1),
        stop=lambda _, text: THINKING_ENDS.search(text) is not None,
        whole=True,
        max_batch_tokens=max_batch_tokens,
    )
    closed = []
    for prompt, (thought,) in zip(prompts, thoughts, strict=True):
        text = THINKING_ENDS.split(thought.text)[0].rstrip()
        closed.append([*prompt, *tokenizer.encode(text, add_special_tokens=False), *end])
    return closed


@torch.inference_mode()
def _generate_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    chain: list[LogitsProcessor],
    criteria: list[StoppingCriteria],
    streamer: BaseStreamer | None,
) -> torch.Tensor:
    """New token ids [rows, at most max_new_tokens], padded after the end of an answer."""
    longest = max(map(len, prompts))
    input_ids = torch.full((len(prompts), longest), tokenizer.pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        attention_mask[row, longest - len(prompt) :] = 1
    output = model.generate(
        input_ids=input_ids.to(model.device),
        attention_mask=attention_mask.to(model.device),
        generation_config=GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,  # `_Sample` has drawn already
            num_beams=1,
            temperature=1.0,
            top_p=1.0,
            top_k=50,
            repetition_penalty=1.0,  # or the one of the model's own generation config
            eos_token_id=stop_ids(tokenizer, model.generation_config),
            pad_token_id=tokenizer.pad_token_id,
        ),
        logits_processor=LogitsProcessorList(chain),
        stopping_criteria=StoppingCriteriaList(criteria),
        streamer=streamer,
    )
    return output[:, longest:].cpu()


def _answer(
    read: Callable[[Sequence[int]], str],
    ends: Set[int],
    tokens: list[int],
    logprobs: list[float],
    max_new_tokens: int,
    stop: Callable[[str], bool] | None,
) -> Generation:
    length = next((index for index, token in enumerate(tokens) if token in ends), len(tokens))
    text = read(tokens[:length])
    finished = length < len(tokens) or len(tokens) < max_new_tokens or bool(stop and stop(text))
    return Generation(text, tokens[:length], logprobs[:length], finished)


class _TokenLogprobs(LogitsProcessor):
    """Keeps the log-probability of every token that was chosen; it comes first, and so sees the model's own scores."""

    def __init__(self) -> None:
        self.columns: list[torch.Tensor] = []
        self.last: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.last is not None:
            self._read(input_ids[:, -1])
        self.last = scores.clone()
        return scores

    def _read(self, tokens: torch.Tensor) -> None:
        scores = self.last.float()
        chosen = scores.gather(1, tokens[:, None].to(scores.device))[:, 0]
        self.columns.append((chosen - scores.logsumexp(dim=1)).cpu())

    def finish(self, tokens: torch.Tensor) -> list[list[float]]:
        """The log-probabilities [rows][new tokens] of the finished batch `tokens`, [rows, new tokens]."""
        self._read(tokens[:, -1])
        return torch.stack(self.columns, dim=1).tolist()


class _Sample(LogitsProcessor):
    """Draws by the Gumbel-max trick: the argmax of log-probabilities plus Gumbel noise is a sample of the distribution.

    Each row has a stream of its own.

    Args:
        keys: for each row what its stream is seeded with: (seed, sample number, prompt's token ids).
    """

    def __init__(self, keys: Sequence[tuple[int, int, Sequence[int]]], temperature: float, top_p: float) -> None:
        self.temperature, self.top_p = temperature, top_p
        self.streams = []
        for key in keys:
            digest = hashlib.sha256(repr((*key[:2], list(key[2]))).encode()).digest()
            self.streams.append(torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True)))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        logits = scores.float() / self.temperature
        if self.top_p < 1:
            ordered, indices = logits.sort(dim=1, descending=True)
            probabilities = ordered.softmax(dim=1)
            beyond = probabilities.cumsum(dim=1) - probabilities >= self.top_p  # the best token always stays
            logits = logits.masked_fill(beyond.scatter(1, indices, beyond), float("-inf"))
        noise = torch.stack([torch.rand(scores.shape[1], generator=stream) for stream in self.streams])
        gumbel = -torch.log(-torch.log(noise.clamp(min=1e-20, max=1 - 1e-7)))
        return logits + gumbel.to(logits.device)


class _StopText(StoppingCriteria):
    """Ends each row whose text satisfies its `stops`."""

    def __init__(
        self,
        reads: Sequence[Callable[[Sequence[int]], str]],
        prompt_length: int,
        stops: Sequence[Callable[[str], bool]],
    ) -> None:
        self.reads, self.prompt_length, self.stops = reads, prompt_length, stops

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        rows = zip(self.stops, self.reads, input_ids[:, self.prompt_length :].tolist(), strict=True)
        return torch.tensor([stop(read(tokens)) for stop, read, tokens in rows], device=input_ids.device)


class _Ending(StoppingCriteria):
    """Ends nothing, but tells of each row of a batch when it has ended."""

    def __init__(self, ends: Set[int], tell: Callable[[int], None]) -> None:
        self.ends, self.tell = ends, tell
        self.open: set[int] | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        last = input_ids[:, -1].tolist()
        self.open = set(range(len(last))) if self.open is None else self.open
        for row in [row for row in sorted(self.open) if last[row] in self.ends]:
            self.open.remove(row)
            self.tell(row)
        return torch.zeros(len(last), dtype=torch.bool, device=input_ids.device)

    def finish(self) -> None:
        """The batch is done: so are the rows that the budget, or a text to stop at, has ended."""
        for row in sorted(self.open or ()):
            self.tell(row)
