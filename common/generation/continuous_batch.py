"""Answers that are written together, in common forward passes: one that has ended makes room for one that waits.

    batch = ContinuousBatch(model, tokenizer, max_batch_tokens)
    batch.add(Wanted(key, prompt, max_new_tokens=512))
    for wanted, answer in batch.run():      # as they end; more may be added meanwhile
        ...

The answers share a cache whose columns are as many as the longest of them has tokens. What bounds them is what they
have, not what they may come to have: where they outgrow the budget, the one that has least is set aside, and goes on
later from the tokens it has. Each prompt is read by itself, so that only rounding in the last bits of a step's matrix
products can tell company from solitude.

A step reads each answer's newest token, and with it, where the model can, those that were forced since (a grammar left
no choice), and a draft of what may come next (`prompt_lookup`). Of a draft those tokens stay that would have been
written without it: each is chosen from the scores behind the one before, as if it alone had been read. So a step
writes a token of each answer, or several, and the same ones.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from common.generation.answer_row import Asker, Drawn, Row, Wanted
from common.generation.prompt_lookup import Record
from common.generation.result import Generation
from common.generation.rows import Advance, rows_of
from common.generation.steering import draw
from common.models.batching import MAX_BATCH_TOKENS
from common.models.tokenizers import decode, stop_ids

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from common.models.gguf_model import GgufModel

__all__ = ["Asker", "ContinuousBatch", "Drawn", "Wanted"]
EXPECTED_TOKENS = 128  # of an answer, until some have ended


class ContinuousBatch:
    """Writes answers with one model.

    Args:
        max_batch_tokens: bounds rows x columns of the answers that are written together; one always goes.

    Attributes:
        asker: of the answers that name no other; several adapters write only where a model's rows can be revised.
        steps: forward passes so far that went on with each row.
        prompts_read: forward passes so far that read a prompt.
        drafted, right: tokens of drafts so far, and how many of them stayed.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel | GgufModel,
        tokenizer: PreTrainedTokenizerBase,
        max_batch_tokens: int = MAX_BATCH_TOKENS,
    ) -> None:
        self.max_batch_tokens = max_batch_tokens
        self._in_model = rows_of(model)
        self.asker = asker_of(model, tokenizer)
        self.steps = self.prompts_read = self.drafted = self.right = 0
        self._drafts = Record()
        self._waiting: deque[Row] = deque()
        self._rows: list[Row] = []
        self._ended = self._ended_tokens = 0

    def add(self, wanted: Wanted, *, first: bool = False) -> None:
        """Have an answer written.

        Args:
            first: before all that wait.
        """
        row = Row(wanted, wanted.asker or self.asker, self._drafts)
        if wanted.streamer:
            wanted.streamer.put(torch.tensor([list(wanted.prompt)]))
        (self._waiting.appendleft if first else self._waiting.append)(row)

    def run(self, between: Callable[[], None] = lambda: None) -> Iterator[tuple[Wanted, Generation | Exception]]:
        """Each answer that was added, as it ends; those that are added meanwhile, too.

        In place of one whose own steering, stop or streamer has raised something, that: the others go on.

        Args:
            between: called before each step, and before the end; may add more.
        """
        between()
        while self._waiting or self._rows:
            yield from self._enter()
            self._set_aside()
            if self._rows:
                yield from self._step()
            between()

    def drop(self, asker: Asker) -> None:
        """Write no more of what one has asked for: called between steps."""
        self._waiting = deque(row for row in self._waiting if row.asker is not asker)
        kept = [row for row in self._rows if row.asker is not asker]
        if len(kept) < len(self._rows):
            self._keep(kept)

    # What of the answers is in the batch.

    def _fits(self, rows: Sequence[Row], more: int = 0) -> bool:
        """Whether rows that become longer by `more` tokens are within the budget."""
        columns = max(row.length for row in rows) + more
        return len(rows) == 1 or (len(rows) <= self._in_model.most and len(rows) * columns <= self.max_batch_tokens)

    def _set_aside(self) -> None:
        """Take out those that have written least, until the others fit; they are the next to enter."""
        kept = list(self._rows)
        while kept and not self._fits(kept):
            least = min(reversed(kept), key=lambda row: len(row.tokens))
            kept.remove(least)
            self._waiting.appendleft(least)
        if len(kept) < len(self._rows):
            self._keep(kept)

    def _keep(self, kept: list[Row]) -> None:
        indices = [index for index, row in enumerate(self._rows) if row in kept]
        self._in_model.keep(indices, [row.read for row in kept])
        self._rows = kept

    @torch.inference_mode()
    def _enter(self) -> list[tuple[Wanted, Generation | Exception]]:
        """Read the prompts of as many as there is room for; those that end with what follows at once."""
        if self._waiting and not self._rows:
            self._in_model.make_room([row.longest for row in self._waiting], self.max_batch_tokens)
        entering: list[Row] = []
        while self._waiting and self._has_room(entering):
            entering.append(row := self._waiting.popleft())
            with row.alone():
                if row.steering and self._in_model.several:
                    row.take_forced()
        read: dict[tuple[Any, ...], tuple[Any, torch.Tensor]] = {}  # once for several samples of a prompt
        keys = {row: (row.asker.adapter, row.ids, row.owed) for row in entering if not row.done}
        for row, key in keys.items():
            if key not in read:
                read[key] = self._in_model.read(row.ids, 1 + row.owed, row.asker.adapter)
                self.prompts_read += 1
            row.read = row.length
        if keys:
            self._go_on(list(keys), {}, [read[key][1] for key in keys.values()])
        joining = [row for row in keys if not row.done]
        states = [read[keys[row]][0] for row in joining]
        for state, _ in read.values():
            if state not in states:
                self._in_model.drop(state)
        if joining:
            self._in_model.join(states)
            self._rows += joining
        return self._answers([row for row in entering if row.done])

    def _has_room(self, entering: list[Row]) -> bool:
        """The next one that waits fits in, too, and all are likely to have room for what they have still to write."""
        if not self._in_model.admits(self._waiting[0].longest):
            return False
        together = [*self._rows, *entering, self._waiting[0]]
        least = min(row.wanted.max_new_tokens for row in together)
        expected = self._ended_tokens // self._ended if self._ended else EXPECTED_TOKENS
        return self._fits(together, max(1, min(least, expected)))

    # Forward passes, and what comes of them.

    @torch.inference_mode()
    def _step(self) -> list[tuple[Wanted, Generation | Exception]]:
        """Go on with each row; the answers that end with it."""
        self.steps += 1
        drafts = self._drafts_of_rows()
        going = []
        for row in self._rows:
            draft = drafts.get(row, [])
            going.append(Advance([*row.unread, *draft], row.read, 1 + row.owed + len(draft), row.asker.adapter))
        logits = self._in_model.step(going).split([row.wanted for row in going])
        for row in self._rows:
            row.read = row.length
        self._go_on(self._rows, drafts, logits)
        done = [row for row in self._rows if row.done]
        if done or drafts:
            self._keep([row for row in self._rows if not row.done])
        return self._answers(done)

    def _drafts_of_rows(self) -> dict[Row, list[int]]:
        """What may come next of some rows, as far as it pays and there is room.

        A token that is right spares its row's share of a step and being read later; one that is wrong was read for
        nothing.
        """
        if not self._in_model.several:
            return {}
        rows, room = len(self._rows), self.max_batch_tokens
        if rows > 1:
            room = room // rows - max(row.length for row in self._rows)
        least_right = self._in_model.second_token if rows == len(self._rows[0].unread) == 1 else 0.0
        least_share = rows / (rows + self._in_model.step_tokens)
        drafts: dict[Row, list[int]] = {}
        for row in self._rows:
            with row.alone():
                if draft := row.draft(room, least_share, least_right):
                    drafts[row] = draft
        return drafts

    def _go_on(self, rows: Sequence[Row], drafts: dict[Row, list[int]], logits: Sequence[torch.Tensor]) -> None:
        """Take the next token of each row, and go on as far as its draft is right.

        Args:
            logits: [tokens, columns] of each row, behind its last tokens and those of its draft; in front of these,
                behind as many more as it owes log-probabilities.
        """
        at = {row: len(own) - 1 - len(drafts.get(row, ())) for row, own in zip(rows, logits, strict=True)}
        own = dict(zip(rows, logits, strict=True))
        left = {row: drafts.get(row, []) for row in rows}
        active = [row for row in rows if row.ended is None]
        while active:
            chosen = _chosen(active, _steered(active, [own[row][at[row]] for row in active]))
            going = []
            for row, token in zip(active, chosen.tolist(), strict=True):
                before = len(row.tokens)
                with row.alone():
                    if not row.failure:
                        row.take(token)
                        if self._in_model.several:
                            row.take_forced()
                taken = row.tokens[before:]
                right = _same(taken, left[row])
                row.read, at[row], left[row] = row.read + right, at[row] + right, left[row][right:]
                if right == len(taken) and row.ended is None:
                    going.append(row)
            active = going
        self._add_logprobs(rows, own)
        for row, draft in drafts.items():
            right = len(draft) - len(left[row])
            row.drafted(len(draft), right)
            self.drafted, self.right = self.drafted + len(draft), self.right + right

    def _add_logprobs(self, rows: Sequence[Row], logits: dict[Row, torch.Tensor]) -> None:
        """Give the tokens of rows the log-probabilities that are wanted and known, before anything changed them."""
        values, tokens = [], []
        for row in rows:
            if row.wanted.logprobs:
                known = row.read + 1 - len(row.wanted.prompt)  # tokens that stand behind one that was read
                new = row.tokens[len(row.logprobs) : known]
                values.append(logits[row][: len(new)])
                tokens.append(new)
        if values:
            every = torch.cat(values).float()
            ids = torch.tensor([token for new in tokens for token in new], device=every.device)
            found = iter((every.gather(1, ids[:, None])[:, 0] - every.logsumexp(dim=1)).tolist())
            for row, new in zip((row for row in rows if row.wanted.logprobs), tokens, strict=True):
                row.logprobs += [next(found) for _ in new]

    def _answers(self, done: Sequence[Row]) -> list[tuple[Wanted, Generation | Exception]]:
        answers: list[tuple[Wanted, Generation | Exception]] = []
        for row in done:
            with row.alone():
                if not row.failure:
                    answers.append((row.wanted, self._answer_of(row)))
            if row.failure:
                answers.append((row.wanted, row.failure))
        return answers

    def _answer_of(self, row: Row) -> Generation:
        if row.wanted.streamer:
            row.wanted.streamer.end()
        self._ended += 1
        self._ended_tokens += len(row.tokens)
        tokens = row.tokens[:-1] if row.tokens[-1] in row.ends else row.tokens
        cut = not row.ended or bool(row.steering and row.steering.closed)
        text = row.wanted.text_of(decode(row.asker.tokenizer, tokens))
        return Generation(text, tokens, row.logprobs[: len(tokens)], row.ended, cut)


def asker_of(model: PreTrainedModel | PeftModel | GgufModel, tokenizer: PreTrainedTokenizerBase, **how) -> Asker:
    """Who asks a model in a tokenizer's tokens."""
    return Asker(tokenizer, set(stop_ids(tokenizer, model.generation_config)), **how)


def _same(tokens: Sequence[int], others: Sequence[int]) -> int:
    """How many of two texts' first tokens are the same."""
    unlike = (place for place, pair in enumerate(zip(tokens, others, strict=False)) if pair[0] != pair[1])
    return next(unlike, min(len(tokens), len(others)))


def _steered(rows: Sequence[Row], logits: Sequence[torch.Tensor]) -> torch.Tensor:
    """The scores [rows, columns] that each row's steering makes of its logits [columns].

    Rows of a kind and a tokenizer are steered together; where that fails, each by itself, so that one fails alone.
    """
    scores = torch.stack([*logits]).float()
    of_rows = [row.steering and (type(row.steering), row.asker.tokenizer) for row in rows]
    for kind, tokenizer in {of_row for of_row in of_rows if of_row}:
        indices = [index for index, of_row in enumerate(of_rows) if of_row == (kind, tokenizer)]
        steerings = [rows[index].steering for index in indices]
        with contextlib.suppress(Exception):  # it comes again from the row that it is of
            if len(indices) == len(rows):
                scores = kind.change_all(steerings, scores)
            else:
                scores[indices] = kind.change_all(steerings, scores[indices])
            continue
        for index, steering in zip(indices, steerings, strict=True):
            with rows[index].alone():
                scores[index] = steering.change(logits[index].to(torch.float32, copy=True))
    return scores


def _chosen(rows: Sequence[Row], scores: torch.Tensor) -> torch.Tensor:
    """The next token [rows] of each row: the likeliest, or a draw."""
    chosen = scores.argmax(dim=1)
    kinds = {(row.wanted.drawn.temperature, row.wanted.drawn.top_p) for row in rows if row.wanted.drawn}
    for kind in kinds:
        indices = [
            index
            for index, row in enumerate(rows)
            if row.wanted.drawn and (row.wanted.drawn.temperature, row.wanted.drawn.top_p) == kind
        ]
        chosen[indices] = draw(scores[indices], [rows[index].stream(scores.shape[1]) for index in indices], *kind)
    return chosen
