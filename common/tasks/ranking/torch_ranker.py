"""The label ranker on a torch model: log-likelihoods of a fixed label set, at the cost of one prefill.

How one forward pass is enough: rows of similar length share a left-padded batch under a token budget; the tokens that
all prompts start with are computed once and their key/value cache is reused; label tokens form a prefix tree, whose
inner nodes are appended to each row as extra columns that see the prompt and their own ancestors only (tree attention,
as in Miao et al. 2023, arXiv:2305.09781), so cost grows with distinct label tokens, not labels x forms; the LM head is
applied at the scoring columns alone.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from common.cli import UserError
from common.models import lora_inference, tokenizers
from common.models.batching import CPU_BATCH_TOKENS, MAX_BATCH_TOKENS, context_of, layer_kinds, window_of
from common.models.heads import exact_logits
from common.tasks.ranking.label_tree import LabelTree, label_tokens
from common.tasks.ranking.ranker import Ranker, Share, sizes_of
from common.tasks.ranking.task import LabelTask

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

ATTENTION = {"full_attention", "sliding_attention"}  # kinds of layers that see what a mask shows them


class PrefixLayer(DynamicLayer):
    """A layer's keys and values [1, heads, tokens, width] of what all rows start with; or [adapters, heads, ...], where
    the same tokens are read by several.

    A batch's own are appended for its attention alone and not kept: no token comes after them, and those of all layers
    would be most of what scoring needs beside the weights.

    Args:
        of_row: [rows] which of the adapters' each row starts with, where there are several.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, of_row: torch.Tensor | None = None) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values, self.of_row = keys, values, of_row

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """The prefix of every row with the `keys` and `values` [rows, heads, tokens, width] behind it."""

        def joined(prefix: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
            begun = prefix.expand(len(own), -1, -1, -1) if self.of_row is None else prefix[self.of_row]
            return torch.cat([begun, own], dim=-2)

        return joined(self.keys, keys), joined(self.values, values)


class TorchRanker(Ranker):
    """Scores rows against a task's labels with one model (see `Ranker`).

    A mask keeps the tree's branches apart only where layers look back by attention. Where one of them carries a state
    from token to token (recurrences, convolutions), the branches follow the prompts one after another, each from a copy
    of the state, and the rows of a batch are of one length, since such layers read padding too.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        task: LabelTask,
        max_batch_tokens: int = MAX_BATCH_TOKENS,
    ) -> None:
        if model.device.type == "cpu":
            max_batch_tokens = min(max_batch_tokens, CPU_BATCH_TOKENS)
        super().__init__(tokenizer, task, *sizes_of(model.config), max_batch_tokens)
        self.model, self.name = model, model.config.name_or_path
        self.precision = (str(model.dtype), bool(getattr(model, "is_loaded_in_4bit", False)))
        self.kinds, self.window = layer_kinds(model.config), window_of(model.config)
        self.stateful = is_stateful(model)
        if self.stateful and "past_key_values" not in inspect.signature(decoder_of(model).forward).parameters:
            raise UserError(f"labels of {model.config.model_type} models cannot be ranked; take another model")
        self.label_ids = sorted({token for words in self.tree.forms for word in words for f in word for _, token in f})

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        if not self.stateful:
            yield from super()._batches(lengths)
            return
        of_length: dict[int, list[int]] = defaultdict(list)
        for row, length in enumerate(lengths):
            of_length[length].append(row)
        for length, rows in of_length.items():
            for batch in super()._batches([length] * len(rows)):
                yield [rows[number] for number in batch]

    @torch.inference_mode()
    def _read_prefix(self, prefix: tuple[int, ...]) -> Cache:
        """A cache that holds `prefix`, for any number of rows, and stays as it is."""
        ids = torch.tensor([prefix], device=self.model.device)
        cache = self._empty_cache() if self.stateful else DynamicCache()
        decoder_of(self.model)(input_ids=ids, past_key_values=cache, use_cache=True)
        if self.stateful:
            return cache
        return Cache(layers=[PrefixLayer(layer.keys, layer.values) for layer in cache.layers])

    def _empty_cache(self) -> Cache:
        """One with a place for each layer's state."""
        return DynamicCache(config=self.model.config)

    @torch.inference_mode()
    def _score(self, prefix: tuple[int, ...], suffixes: Sequence[list[int]], owners: Sequence[Share]) -> np.ndarray:
        """See `Ranker`."""
        parts = [(share, len([*own])) for share, own in groupby(owners)]
        cache = _kept_by_each(parts, prefix) if prefix else None
        score = self._apart if self.stateful else self._together
        with exact_logits(self.model, self.label_ids), _adapted(parts):
            logits = score(prefix, suffixes, cache)
        return label_scores(self.tree, logits.float(), self.task.aggregate).cpu().numpy()

    def _together(self, prefix: tuple[int, ...], suffixes: Sequence[list[int]], cache: Cache | None) -> torch.Tensor:
        """Logits [rows, 1 + columns, vocabulary] of one pass: at the prompts' ends and the tree's columns."""
        ids, positions, real = tree_columns(self.tree, suffixes, self.tokenizer.pad_token_id, len(prefix))
        inputs = {"input_ids": ids, "position_ids": positions}
        beyond = self.window < len(prefix) + ids.shape[1]
        if self.tree.columns or beyond:
            sees = tree_mask(self.tree, real, len(prefix))
            inputs["attention_mask"] = additive(sees, self.model.dtype)
            if beyond:
                inputs["attention_mask"] = self._windowed(sees, positions, len(prefix))
        elif prefix or not real.all():
            visible = torch.cat([torch.ones(len(real), len(prefix), dtype=torch.bool), real], dim=1)
            inputs["attention_mask"] = visible.long()
        inputs = send_to_device(inputs, self.model.device)
        if prefix:
            inputs["past_key_values"] = cache
        return self.model(**inputs, use_cache=bool(prefix), logits_to_keep=self.tree.columns + 1).logits

    def _windowed(self, sees: torch.Tensor, positions: torch.Tensor, shared: int) -> Any:
        """The mask of layers that look back no further than the window, and beside it that of those that do."""
        keys = torch.cat([torch.arange(shared).expand(len(positions), -1), positions], dim=1)
        near = positions[:, :, None] - keys[:, None, :] < self.window
        windowed = additive(sees & near[:, None], self.model.dtype)
        if len(self.kinds) == 1:
            return windowed
        return {"full_attention": additive(sees, self.model.dtype), "sliding_attention": windowed}

    def _apart(self, prefix: tuple[int, ...], suffixes: Sequence[list[int]], cache: Cache | None) -> torch.Tensor:
        """As `_together`, for suffixes of one length, branch by branch."""
        rows, branches = len(suffixes), self.tree.branches()
        cache = copy.deepcopy(cache) if prefix else self._empty_cache()
        if prefix:
            cache.reorder_cache(torch.zeros(rows, dtype=torch.long, device=self.model.device))  # one copy for each row
        ends = self._continue(cache, torch.tensor(suffixes), 1)
        logits = ends.new_empty(rows, 1 + self.tree.columns, ends.shape[-1])
        logits[:, :1] = ends
        for branch in branches:
            state = cache if branch is branches[-1] else copy.deepcopy(cache)
            tokens = torch.tensor([self.tree.tokens[node] for node in branch])
            logits[:, branch] = self._continue(state, tokens.expand(rows, -1), len(branch))
        return logits

    def _continue(self, cache: Cache, ids: torch.Tensor, keep: int) -> torch.Tensor:
        """Logits of the last `keep` of `ids` [rows, tokens], read after what the cache holds."""
        ids = ids.to(self.model.device)
        return self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=keep).logits


def _kept_by_each(parts: Sequence[tuple[Share, int]], prefix: tuple[int, ...]) -> Cache:
    """A cache that holds, for each row, what its share's adapter made of `prefix`.

    Args:
        parts: the shares in the order of their rows, and how many each has.
    """
    caches = []
    for share, _ in parts:
        with _adapted([(share, 1)]):
            caches.append(share.ranker.kept(prefix))
    if len(caches) == 1:
        return caches[0]
    device = caches[0].layers[0].keys.device
    of_row = torch.repeat_interleave(torch.tensor([rows for _, rows in parts], device=device))
    return Cache(
        layers=[
            PrefixLayer(torch.cat([own.keys for own in layers]), torch.cat([own.values for own in layers]), of_row)
            for layers in zip(*(cache.layers for cache in caches), strict=True)
        ]
    )


def _adapted(parts: Sequence[tuple[Share, int]]) -> contextlib.AbstractContextManager[None]:
    return lora_inference.adapted([(share.adapter, rows) for share, rows in parts])


def is_stateful(model: PreTrainedModel | PeftModel) -> bool:
    """Whether some layer is more than attention that a mask governs, and so would mix the branches of a tree."""
    return getattr(model, "_is_stateful", False) or not layer_kinds(model.config) <= ATTENTION


def tree_limit(config: PreTrainedConfig) -> int:
    """Tokens that a batch of `tree_columns` with a plain `tree_mask` may have in a model of this config.

    Raises:
        UserError: its layers would mix the branches of the tree.
    """
    if not layer_kinds(config) <= ATTENTION:
        raise UserError(
            f"{config.model_type} models carry a state from token to token and cannot learn label probabilities; train "
            "on the teacher's text instead (kd_train.py), or take a student with attention alone"
        )
    return min(context_of(config), window_of(config))


def additive(sees: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A boolean mask as one that is added to attention scores."""
    return torch.zeros(sees.shape, dtype=dtype).masked_fill_(~sees, torch.finfo(dtype).min)


def decoder_of(model: PreTrainedModel | PeftModel) -> torch.nn.Module:
    """The model without its LM head; the active adapter's layers are in it."""
    return (model.get_base_model() if hasattr(model, "get_base_model") else model).get_decoder()


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
