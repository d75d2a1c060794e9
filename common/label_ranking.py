"""The calibrated label ranker's model side: log-likelihoods of a fixed label set, at the cost of one prefill.

A word (the label, or a verbalizer of it) scores as the better of its spellings with and without a leading space, each
by its mean token log-probability at the assistant turn (a relative of lm-evaluation-harness's acc_norm); raw(label) is
the max, or the mean, of its words. Everything that is subtracted or scaled afterwards is in `common.calibration`.

How one forward pass is enough: rows of similar length share a left-padded batch under a token budget; the tokens that
all prompts start with are computed once and their key/value cache is reused; label tokens form a prefix tree, whose
inner nodes are appended to each row as extra columns that see the prompt and their own ancestors only (tree attention,
as in Miao et al. 2023, arXiv:2305.09781), so cost grows with distinct label tokens, not labels x forms; the LM head is
applied at the scoring columns alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from common import records, tokenizers
from common.cli import UserError, log
from common.tasks import LabelTask

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

MAX_BATCH_TOKENS = 8192
WINDOW_ROWS = 4096  # rows that are sorted by length together; bounds memory on long files
MIN_PREFIX = 4  # a shorter shared start is not worth a cache


class LabelTree:
    """Surface forms of all labels' words as a prefix tree over tokens.

    Node 0 is the end of the prompt. `parents`, `tokens` and `depths` describe the inner nodes 1..N-1 (those that some
    form continues after), which are the columns fed after the prompt; `forms[label][word]` lists, for each surface
    form, the (node, next token) pairs whose log-probabilities make up its log-likelihood.
    """

    def __init__(self, token_lists: Sequence[Sequence[Sequence[Sequence[int]]]]) -> None:
        self.parents, self.tokens, self.depths = [-1], [-1], [0]
        children: dict[tuple[int, int], int] = {}

        def path_of(form: Sequence[int]) -> list[tuple[int, int]]:
            node, path = 0, []
            for position, token in enumerate(form):
                path.append((node, token))
                if position + 1 < len(form):  # the last token of a form needs no column of its own
                    if (node, token) not in children:
                        children[node, token] = len(self.parents)
                        self.parents.append(node)
                        self.tokens.append(token)
                        self.depths.append(self.depths[node] + 1)
                    node = children[node, token]
            return path

        self.forms = [[[path_of(form) for form in word] for word in words] for words in token_lists]

    @property
    def columns(self) -> int:
        """Columns appended to a prompt: inner nodes, the prompt's end not counted."""
        return len(self.parents) - 1

    def ancestors(self) -> torch.Tensor:
        """Boolean [columns, columns]: which appended columns each appended column sees, itself included."""
        sees = torch.zeros(self.columns, self.columns, dtype=torch.bool)
        for node in range(1, self.columns + 1):
            if self.parents[node] > 0:
                sees[node - 1] = sees[self.parents[node] - 1]
            sees[node - 1, node - 1] = True
        return sees


class LabelRanker:
    """Scores rows against a task's labels with one model.

    Raises:
        UserError: a label without text, two labels that are the same tokens, a model whose sliding window is too short.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        task: LabelTask,
        max_batch_tokens: int = MAX_BATCH_TOKENS,
    ) -> None:
        self.model, self.tokenizer, self.task = model, tokenizer, task
        self.max_batch_tokens = max_batch_tokens
        self.tree = LabelTree(label_tokens(tokenizer, task))
        config = model.config.get_text_config()
        self.context = getattr(config, "max_position_embeddings", None) or 1 << 30
        if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
            self.context = min(self.context, config.sliding_window)  # within it, full attention is the same
        self._prefix: tuple[int, ...] = ()
        self._prefix_cache: DynamicCache | None = None

    def raw_scores(self, texts: Sequence[str]) -> np.ndarray:
        """Raw label scores [rows, labels] in nats a token, float32, in the order of `texts`.

        Raises:
            UserError: a row does not fit the context with its longest label, or the model answers NaN.
        """
        scores = np.empty((len(texts), len(self.task.labels)), dtype=np.float32)
        for start in range(0, len(texts), WINDOW_ROWS):
            window = texts[start : start + WINDOW_ROWS]
            prompts = [tokenizers.encode_prompt(self.tokenizer, self.task.prompt(text)) for text in window]
            self._check_lengths(prompts, start)
            prefix = self._shared_prefix(prompts)
            for rows in self._batches([len(prompt) - len(prefix) for prompt in prompts]):
                suffixes = [prompts[row][len(prefix) :] for row in rows]
                scores[[start + row for row in rows]] = self._score(prefix, suffixes)
        if not np.isfinite(scores).all():
            row = int(np.flatnonzero(~np.isfinite(scores).all(axis=1))[0]) + 1
            raise UserError(f"the model answers NaN for row {row}; use --dtype float32, or train the adapter again")
        return scores

    def prior(self, num_null_prompts: int | None = None) -> np.ndarray:
        """Mean raw score of the task's first content-free inputs [labels] (contextual calibration, Zhao et al. 2021).

        Args:
            num_null_prompts: how many of them; None: all.
        """
        return self.raw_scores(self.task.null_inputs[:num_null_prompts]).mean(axis=0)

    def _check_lengths(self, prompts: Sequence[list[int]], start: int) -> None:
        room = self.context - max(self.tree.depths) - 1
        for row, prompt in enumerate(prompts, start=start + 1):
            if len(prompt) > room:
                raise UserError(
                    f"row {row} has {len(prompt)} tokens and with its longest label does not fit the model's context "
                    f"of {self.context}; shorten the row"
                )

    def _shared_prefix(self, prompts: Sequence[list[int]]) -> tuple[int, ...]:
        """Tokens that all prompts start with, short of the last one; () where a cache would not pay."""
        first, last = min(prompts), max(prompts)
        limit = min(map(len, prompts)) - 1
        shared = 0
        while shared < limit and first[shared] == last[shared]:
            shared += 1
        return tuple(first[:shared]) if len(prompts) > 1 and shared >= MIN_PREFIX else ()

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Rows sorted by length, cut where rows x longest would pass the token budget (one row always goes)."""
        order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
        while order:
            rows = max(1, self.max_batch_tokens // (lengths[order[0]] + self.tree.columns))
            yield order[:rows]
            order = order[rows:]

    def _cache(self, prefix: tuple[int, ...], rows: int) -> DynamicCache:
        """A key/value cache that holds `prefix` for `rows` rows, as views of one copy: appending copies anyway."""
        from transformers import DynamicCache

        if prefix != self._prefix or self._prefix_cache is None:
            ids = torch.tensor([prefix], device=self.model.device)
            self._prefix_cache = DynamicCache()
            self.model(input_ids=ids, past_key_values=self._prefix_cache, use_cache=True, logits_to_keep=1)
            self._prefix = prefix
        cache = DynamicCache()
        for index, layer in enumerate(self._prefix_cache.layers):
            cache.update(layer.keys.expand(rows, -1, -1, -1), layer.values.expand(rows, -1, -1, -1), index)
        return cache

    @torch.inference_mode()
    def _score(self, prefix: tuple[int, ...], suffixes: Sequence[list[int]]) -> np.ndarray:
        ids, positions, real = tree_columns(self.tree, suffixes, self.tokenizer.pad_token_id, len(prefix))
        inputs = {"input_ids": ids, "position_ids": positions}
        if self.tree.columns:
            sees = tree_mask(self.tree, real, len(prefix))
            dtype = self.model.dtype
            inputs["attention_mask"] = torch.zeros(sees.shape, dtype=dtype).masked_fill_(~sees, torch.finfo(dtype).min)
        elif prefix or not real.all():
            visible = torch.cat([torch.ones(len(real), len(prefix), dtype=torch.bool), real], dim=1)
            inputs["attention_mask"] = visible.long()
        inputs = {name: tensor.to(self.model.device) for name, tensor in inputs.items()}
        if prefix:
            inputs["past_key_values"] = self._cache(prefix, len(suffixes))
        output = self.model(**inputs, use_cache=bool(prefix), logits_to_keep=self.tree.columns + 1)
        return label_scores(self.tree, output.logits.float(), self.task.aggregate).cpu().numpy()


def tree_columns(
    tree: LabelTree, prompts: Sequence[list[int]], pad_id: int, shared: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Left-padded prompts with the tree's columns behind them.

    Args:
        shared: tokens before each prompt that a key/value cache holds.

    Returns:
        Ids and positions, each [rows, longest + columns], and which prompt columns are not padding [rows, longest].
    """
    longest = max(map(len, prompts))
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    ids = torch.full((len(prompts), longest + tree.columns), pad_id)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) : longest] = torch.tensor(prompt)
    ids[:, longest:] = torch.tensor(tree.tokens[1:], dtype=torch.long)
    real = torch.arange(longest)[None] >= longest - lengths[:, None]
    prompt_positions = shared + (real.cumsum(1) - 1).clamp(min=0)
    label_positions = shared + lengths[:, None] - 1 + torch.tensor(tree.depths[1:], dtype=torch.long)[None]
    return ids, torch.cat([prompt_positions, label_positions], dim=1), real


def tree_mask(tree: LabelTree, real: torch.Tensor, shared: int = 0) -> torch.Tensor:
    """What each query sees, boolean [rows, 1, queries, shared + queries], in a batch of `tree_columns`."""
    rows, longest = real.shape
    queries = longest + tree.columns
    sees = torch.zeros(rows, queries, shared + queries, dtype=torch.bool)
    sees[:, :, :shared] = True
    causal = torch.ones(longest, longest, dtype=torch.bool).tril()
    sees[:, :longest, shared : shared + longest] = causal & real[:, None, :]
    sees[:, longest:, shared : shared + longest] = real[:, None, :]
    sees[:, longest:, shared + longest :] = tree.ancestors()
    return sees[:, None]


def label_scores(tree: LabelTree, logits: torch.Tensor, aggregate: str) -> torch.Tensor:
    """Raw scores [rows, labels] from logits [rows, 1 + columns, vocabulary] at the prompt's end and the tree's columns.

    A form's score is the mean over its tokens; see `label_score` for the rest. Differentiable.
    """
    norms = logits.logsumexp(dim=-1)
    scores = []
    for words in tree.forms:
        means = []
        for word in words:
            means.append([])
            for path in word:
                nodes, tokens = zip(*path, strict=True)
                means[-1].append((logits[:, nodes, tokens] - norms[:, nodes]).mean(dim=1))
        scores.append(label_score(means, aggregate))
    return torch.stack(scores, dim=1)


def label_score(forms: Sequence[Sequence[torch.Tensor]], aggregate: str) -> torch.Tensor:
    """A label's score from those of its surface forms, [word][form]: the better form of each word, then `aggregate`."""
    words = torch.stack([torch.stack(list(word)).amax(dim=0) for word in forms])
    return words.amax(dim=0) if aggregate == "max" else words.mean(dim=0)


def label_tokens(tokenizer: PreTrainedTokenizerBase, task: LabelTask) -> list[list[list[list[int]]]]:
    """Distinct token sequences of the surface forms of every label's words, [label][word][form][token].

    Raises:
        UserError: a form without tokens, or one sequence that stands for two labels.
    """
    owners: dict[tuple[int, ...], str] = {}
    lists = []
    for label in task.labels:
        lists.append([])
        for word in task.words(label):
            forms: dict[tuple[int, ...], None] = {}
            for form in (word, " " + word):
                ids = tuple(tokenizer.encode(form, add_special_tokens=False))
                if not ids:
                    raise UserError(f"label '{label}' has no tokens; give every label a text")
                if owners.setdefault(ids, label) != label:
                    raise UserError(f"labels '{owners[ids]}' and '{label}' are the same tokens; rename one")
                forms[ids] = None
            lists[-1].append([list(form) for form in forms])
    return lists


def naive_scores(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: LabelTask, texts: Sequence[str]
) -> np.ndarray:
    """The definition, one full forward pass per row, label and form: what `LabelRanker` is tested and timed against."""
    scores = np.empty((len(texts), len(task.labels)), dtype=np.float32)
    with torch.inference_mode():
        for row, text in enumerate(texts):
            prompt = tokenizers.encode_prompt(tokenizer, task.prompt(text))
            for label, words in enumerate(label_tokens(tokenizer, task)):
                means = [[_mean_logprob(model, prompt, form) for form in word] for word in words]
                scores[row, label] = label_score(means, task.aggregate).item()
    return scores


def _mean_logprob(model: PreTrainedModel, prompt: list[int], form: list[int]) -> torch.Tensor:
    logits = model(input_ids=torch.tensor([prompt + form], device=model.device)).logits[0].float()
    return logits[len(prompt) - 1 : -1].log_softmax(dim=-1)[range(len(form)), form].mean()


def cached_prior(
    ranker: LabelRanker, folder: str | Path, model_hash: str, num_null_prompts: int | None = None
) -> np.ndarray:
    """The ranker's prior [labels], from `folder`/prior.json when nothing it depends on has changed, else computed.

    The key covers the model's name, the adapter's hash, precision, the chat template, labels, surface forms, their
    aggregate and the null prompts. An unreadable cache is rebuilt with a warning; a folder that cannot be written to
    is no error.
    """
    task = ranker.task
    null_inputs = task.null_inputs[:num_null_prompts]
    null_ids = [tokenizers.encode_prompt(ranker.tokenizer, task.prompt(text)) for text in null_inputs]
    facts = [
        ranker.model.config.name_or_path,
        model_hash,
        str(ranker.model.dtype),
        bool(getattr(ranker.model, "is_loaded_in_4bit", False)),
        task.labels,
        label_tokens(ranker.tokenizer, task),
        task.aggregate,
        null_ids,
    ]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    path = Path(folder) / "prior.json"
    if path.is_file():
        try:
            entry = json.loads(path.read_text())
            if entry["key"] == key:
                return np.array([entry["prior"][label] for label in task.labels], dtype=np.float32)
        except (ValueError, KeyError, TypeError, OSError) as error:
            log(f"{path} is unreadable ({error}); computing the prior again")
    prior = ranker.prior(num_null_prompts)
    if Path(folder).is_dir():
        try:
            named = dict(zip(task.labels, map(float, prior), strict=True))
            records.write_json(path, {"key": key, "prior": named, "null_inputs": null_inputs})
        except OSError as error:
            log(f"the prior could not be kept in {path} ({error.strerror}); it is computed at every start")
    return prior
