"""The label ranker on a torch model: log-likelihoods of a fixed label set, at the cost of one prefill.

How one forward pass is enough: rows of similar length share a left-padded batch under a token budget; the tokens that
all prompts start with are computed once and their key/value cache is reused; label tokens form a prefix tree, whose
inner nodes are appended to each row as extra columns that see the prompt and their own ancestors only (tree attention,
as in Miao et al. 2023, arXiv:2305.09781), so cost grows with distinct label tokens, not labels x forms; the LM head is
applied at the scoring columns alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from common.models import tokenizers
from common.models.batching import CPU_BATCH_TOKENS, MAX_BATCH_TOKENS
from common.tasks.ranking.label_tree import LabelTree, label_tokens
from common.tasks.ranking.ranker import Ranker, sizes_of
from common.tasks.ranking.task import LabelTask

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class PrefixLayer(DynamicLayer):
    """A layer's keys and values [1, heads, tokens, width] of what all rows start with.

    A batch's own are appended for its attention alone and not kept: no token comes after them, and those of all layers
    would be most of what scoring needs beside the weights.
    """

    def __init__(self, prefix: DynamicLayer) -> None:
        super().__init__()
        self.lazy_initialization(prefix.keys, prefix.values)
        self.keys, self.values = prefix.keys, prefix.values

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """The prefix of every row with the `keys` and `values` [rows, heads, tokens, width] behind it."""

        def joined(prefix: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
            return torch.cat([prefix.expand(len(own), -1, -1, -1), own], dim=-2)

        return joined(self.keys, keys), joined(self.values, values)


class TorchRanker(Ranker):
    """Scores rows against a task's labels with one model (see `Ranker`)."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        task: LabelTask,
        max_batch_tokens: int = MAX_BATCH_TOKENS,
    ) -> None:
        if model.device.type == "cpu":
            max_batch_tokens = min(max_batch_tokens, CPU_BATCH_TOKENS)
        super().__init__(tokenizer, task, *sizes_of(model.config), max_batch_tokens)
        self.model, self.name = model, model.config.name_or_path
        self.precision = (str(model.dtype), bool(getattr(model, "is_loaded_in_4bit", False)))

    def _read_prefix(self, prefix: tuple[int, ...]) -> Cache:
        """A key/value cache that holds `prefix`, for any number of rows, and stays as it is."""
        ids = torch.tensor([prefix], device=self.model.device)
        cache = DynamicCache()
        self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return Cache(layers=[PrefixLayer(layer) for layer in cache.layers])

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
            inputs["past_key_values"] = self._cached(prefix)
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
    sees[:, longest:, shared + longest :] = torch.from_numpy(tree.ancestors())
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


def naive_scores(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: LabelTask, texts: Sequence[str]
) -> np.ndarray:
    """The definition, one full forward pass per row, label and form: what `TorchRanker` is tested and timed against."""
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
