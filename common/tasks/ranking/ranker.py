"""The calibrated label ranker without its model: prompts in batches, scores and their prior.

`label_tree` says what a label's score is. Everything that is subtracted or scaled afterwards is in `calibration`.

The log-probabilities come from torch (`torch_ranker`), from ONNX Runtime (`onnx_ranker`), or from llama.cpp or
onnxruntime-genai (`row_ranker`); nothing here imports any of them.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.cli import UserError, log
from common.files import write_json
from common.models import tokenizers
from common.models.batching import (
    KEPT_TOKENS,
    LOGITS_AT_ONCE,
    MAX_BATCH_TOKENS,
    by_token_budget,
    context_of,
)
from common.tasks.ranking.label_tree import LabelTree, label_tokens
from common.tasks.ranking.row_check import length_fault, longest_prompt
from common.tasks.ranking.task import LabelTask

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

WINDOW_ROWS = 4096  # rows that are sorted by length together; bounds memory on long files
MIN_PREFIX = 4  # a shorter shared start is not worth a cache
LEAST_SHARE = 8  # a start of less than an eighth of a prompt by itself costs more than it spares, too
PRIOR = "prior"  # what a model's folder keeps of a task, by `LabelTask.file_in`


@dataclass(frozen=True, eq=False)
class Share:
    """Rows that a ranker scores in passes which it may share with others.

    Attributes:
        prompts: as token ids.
        adapter: the name within PEFT of the one that scores, which `lora_inference.can_share` passes; None: what is
            active.
    """

    ranker: Ranker
    prompts: Sequence[list[int]]
    adapter: str | None = None


class Ranker:
    """Scores rows against a task's labels with one model.

    Attributes:
        name: of the model.
        precision: what else its scores depend on: the data type, and whether its weights are in 4 bits.
        context: tokens that a prompt and its longest label may have.
        vocabulary: columns of the logits.
        prefixes: what is kept of token sequences that prompts start with (`_read_prefix`), used last at the end.
        one_by_one: prompts keep coming by themselves, so that their start is worth to be read and kept for one, too.

    Raises:
        UserError: a label without text, or two labels that are the same tokens.
    """

    name: str
    precision: tuple[str, bool]

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        task: LabelTask,
        context: int,
        vocabulary: int,
        max_batch_tokens: int = MAX_BATCH_TOKENS,
    ) -> None:
        self.tokenizer, self.task, self.context, self.vocabulary = tokenizer, task, context, vocabulary
        self.max_batch_tokens = max_batch_tokens
        self.tree = LabelTree(label_tokens(tokenizer, task))
        self.prefixes: OrderedDict[tuple[int, ...], Any] = OrderedDict()
        self.one_by_one = False

    def _score(self, prefix: tuple[int, ...], suffixes: Sequence[list[int]], owners: Sequence[Share]) -> np.ndarray:
        """[rows, labels] of prompts that are `prefix` and then each of `suffixes`.

        Args:
            owners: of each row, those of one side by side; several are for `TorchRanker` alone.
        """
        raise NotImplementedError

    def _read_prefix(self, prefix: tuple[int, ...]) -> Any:
        """Keys and values of the tokens that prompts start with, for `_score`."""
        raise NotImplementedError

    def kept(self, prefix: tuple[int, ...]) -> Any:
        """What this ranker makes of a prefix (`_read_prefix`); read once, and then kept."""
        if prefix not in self.prefixes:
            self.prefixes[prefix] = self._read_prefix(prefix)
        self.prefixes.move_to_end(prefix)
        while len(self.prefixes) > 1 and sum(map(len, self.prefixes)) > KEPT_TOKENS:
            self.prefixes.popitem(last=False)
        return self.prefixes[prefix]

    def raw_scores(self, texts: Sequence[str]) -> np.ndarray:
        """Raw label scores [rows, labels] in nats a token, float32, in the order of `texts`.

        Raises:
            UserError: a row does not fit the context with its longest label, or the model answers NaN.
        """
        scores = [np.empty((0, len(self.task.labels)), dtype=np.float32)]
        for start in range(0, len(texts), WINDOW_ROWS):
            window = texts[start : start + WINDOW_ROWS]
            prompts = [tokenizers.encode_prompt(self.tokenizer, self.task.prompt(text)) for text in window]
            scores.append(self.scores_of(prompts, start))
        return np.concatenate(scores)

    def scores_of(self, prompts: Sequence[list[int]], start: int = 0) -> np.ndarray:
        """As `raw_scores`, of prompts that are token ids already; in errors, the first is row `start` + 1."""
        (scores,) = self.scores_together([Share(self, prompts)], start)
        return scores

    @staticmethod
    def scores_together(shares: Sequence[Share], start: int = 0) -> list[np.ndarray]:
        """`scores_of` each share's prompts, from passes over the rows of all.

        Args:
            shares: several are for torch models without a state (`torch_ranker.is_stateful`), and have the same base,
                tokenizer and task.

        Raises:
            UserError: see `raw_scores`; some row is at fault.
        """
        first, prompts = shares[0].ranker, [prompt for share in shares for prompt in share.prompts]
        owner = [number for number, share in enumerate(shares) for _ in share.prompts]
        scores = np.empty((len(prompts), len(first.task.labels)), dtype=np.float32)
        if fault := first.too_long(prompts, start):
            raise fault
        prefix = first._shared_prefix(prompts, len(shares)) if prompts else ()
        for batch in first._batches([len(prompt) - len(prefix) for prompt in prompts]):
            rows = sorted(batch, key=owner.__getitem__)
            suffixes = [prompts[row][len(prefix) :] for row in rows]
            scores[rows] = first._score(prefix, suffixes, [shares[owner[row]] for row in rows])
        first._check_scores(scores, start)
        return np.split(scores, np.cumsum([len(share.prompts) for share in shares])[:-1])

    def prior(self, num_null_prompts: int | None = None) -> np.ndarray:
        """Mean raw score of the task's first content-free inputs [labels] (contextual calibration, Zhao et al. 2021).

        Args:
            num_null_prompts: how many of them; None: all.
        """
        return self.raw_scores(self.task.null_inputs[:num_null_prompts]).mean(axis=0)

    def too_long(self, prompts: Sequence[list[int]], start: int = 0) -> UserError | None:
        """What `scores_of` these would raise for the first of them that does not fit the context; None where all do."""
        most = longest_prompt(self.tree, self.context)
        for row, prompt in enumerate(prompts, start=start + 1):
            if len(prompt) > most:
                return UserError(f"row {row} {length_fault(len(prompt), self.context)}; shorten the row")
        return None

    def _check_scores(self, scores: np.ndarray, start: int) -> None:
        if not np.isfinite(scores).all():
            row = start + int(np.flatnonzero(~np.isfinite(scores).all(axis=1))[0]) + 1
            raise UserError(f"the model answers NaN for row {row}; use --dtype float32, or train the adapter again")

    def _shared_prefix(self, prompts: Sequence[list[int]], readers: int = 1) -> tuple[int, ...]:
        """Tokens that all prompts start with, short of the last one; () where a cache would not pay.

        A shorter start that is at hand is taken instead, where reading this one would take more tokens than it saves.

        Args:
            readers: how many rankers would have to read it.
        """
        first = prompts[0]
        if len(prompts) == 1:
            return self._start_of(first)
        shared = common_start(prompts)
        at_hand = [len(known) for known in self.prefixes if len(known) <= shared and starts_with(first, known)]
        if at_hand and (shared - max(at_hand)) * len(prompts) <= shared * readers:
            shared = max(at_hand)
        return tuple(first[:shared]) if shared >= MIN_PREFIX else ()

    def _start_of(self, prompt: list[int]) -> tuple[int, ...]:
        """What a prompt by itself is read behind: the longest start at hand, or, where it pays (`one_by_one`), the one
        that it has in common with a null prompt, as most texts have."""
        starts = [known for known in self.prefixes if starts_with(prompt, known)]
        if self.one_by_one:
            starts += [tuple(prompt[: common_start([prompt, null])]) for null in self._null_prompts]
        start = max(starts, key=len, default=())
        return start if len(start) * LEAST_SHARE >= len(prompt) else ()

    @cached_property
    def _null_prompts(self) -> list[list[int]]:
        return [tokenizers.encode_prompt(self.tokenizer, self.task.prompt(text)) for text in self.task.null_inputs]

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Rows sorted by length, cut where rows x longest would pass the token budget, or the logits theirs."""
        most_rows = LOGITS_AT_ONCE // (self.vocabulary * (1 + self.tree.columns))
        return by_token_budget(lengths, self.max_batch_tokens, added=self.tree.columns, most_rows=most_rows)


def common_start(prompts: Sequence[list[int]]) -> int:
    """How many tokens all prompts start with, short of the last one of each."""
    first, last = min(prompts), max(prompts)
    limit = min(map(len, prompts)) - 1
    shared = 0
    while shared < limit and first[shared] == last[shared]:
        shared += 1
    return shared


def starts_with(prompt: list[int], prefix: tuple[int, ...]) -> bool:
    """Whether a prompt is `prefix` and more."""
    return len(prompt) > len(prefix) and tuple(prompt[: len(prefix)]) == prefix


def sizes_of(config: PreTrainedConfig) -> tuple[int, int]:
    """(context, vocabulary) of a `Ranker` on a model of this config."""
    return context_of(config), config.get_text_config().vocab_size


def cached_prior(
    ranker: Ranker, folder: str | Path, model_hash: str, num_null_prompts: int | None = None
) -> np.ndarray:
    """The ranker's prior [labels]: the task's in `folder` when nothing it depends on has changed, else computed.

    The key covers the model's name, the adapter's hash, precision, the chat template, labels, surface forms, their
    aggregate and the null prompts. An unreadable cache is rebuilt with a warning; a folder that cannot be written to
    is no error.
    """
    task = ranker.task
    null_inputs = task.null_inputs[:num_null_prompts]
    null_ids = [tokenizers.encode_prompt(ranker.tokenizer, task.prompt(text)) for text in null_inputs]
    facts = [
        ranker.name,
        model_hash,
        *ranker.precision,
        task.labels,
        label_tokens(ranker.tokenizer, task),
        task.aggregate,
        null_ids,
    ]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    path, kept = task.file_in(folder, PRIOR), task.kept_file(folder, PRIOR)
    if kept.is_file():
        try:
            entry = json.loads(kept.read_text())
            if entry["key"] == key:
                return np.array([entry["prior"][label] for label in task.labels], dtype=np.float32)
        except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
            log(f"{kept} is unreadable ({error}); computing the prior again")
    prior = ranker.prior(num_null_prompts)
    if Path(folder).is_dir():
        try:
            named = dict(zip(task.labels, map(float, prior), strict=True))
            write_json(path, {"key": key, "prior": named, "null_inputs": null_inputs})
        except OSError as error:
            log(f"the prior could not be kept in {path} ({error.strerror}); it is computed at every start")
    return prior
