"""The tree of label tokens, and the score that a label has by the log-probabilities of its tokens.

A word (the label, or a verbalizer of it) scores as the better of its spellings with and without a leading space, each
by its mean token log-probability at the assistant turn (a relative of lm-evaluation-harness's acc_norm); raw(label) is
the max, or the mean, of its words. Where a form of one label begins a form of another ("Low", "Low risk"), all forms of
the task are scored with the token that ends the turn behind them: without it nobody asks whether the answer ends there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import logsumexp

from common.cli import UserError
from common.tasks.ranking.task import LabelTask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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

    def ancestors(self) -> np.ndarray:
        """Boolean [columns, columns]: which appended columns each appended column sees, itself included."""
        sees = np.zeros((self.columns, self.columns), dtype=bool)
        for node in range(1, self.columns + 1):
            if self.parents[node] > 0:
                sees[node - 1] = sees[self.parents[node] - 1]
            sees[node - 1, node - 1] = True
        return sees

    def branches(self) -> list[list[int]]:
        """The inner nodes from the root's children down to each that has no inner child, in the order of `tokens`."""
        leaves = [node for node in range(1, len(self.parents)) if node not in self.parents]
        branches = []
        for node in leaves:
            branch = [node]
            while self.parents[branch[0]] > 0:
                branch.insert(0, self.parents[branch[0]])
            branches.append(branch)
        return branches


def label_tokens(tokenizer: PreTrainedTokenizerBase, task: LabelTask) -> list[list[list[list[int]]]]:
    """Distinct token sequences of the surface forms of every label's words, [label][word][form][token].

    Where one label's form begins another's, each ends with EOS.

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
    if _one_begins_another(owners):
        return [[[[*form, tokenizer.eos_token_id] for form in forms] for forms in words] for words in lists]
    return lists


def _one_begins_another(owners: Mapping[tuple[int, ...], str]) -> bool:
    """Whether some form is the start of a form of another label; `owners` has the label of each form."""
    return any(
        owners.get(form[:length], label) != label for form, label in owners.items() for length in range(1, len(form))
    )


def label_scores(tree: LabelTree, logits: np.ndarray, aggregate: str) -> np.ndarray:
    """Raw scores [rows, labels] from logits [rows, 1 + columns, vocabulary] at the prompt's end and the tree's columns.

    The same as `common.tasks.ranking.torch_ranker.label_scores`, which is differentiable.
    """
    logits = logits.astype(np.float32, copy=False)
    norms = logsumexp(logits, axis=-1)
    scores = []
    for words in tree.forms:
        of_words = []
        for word in words:
            paths = (tuple(zip(*path, strict=True)) for path in word)
            means = [(logits[:, nodes, tokens] - norms[:, nodes]).mean(axis=1) for nodes, tokens in paths]
            of_words.append(np.max(means, axis=0))
        scores.append(np.max(of_words, axis=0) if aggregate == "max" else np.mean(of_words, axis=0))
    return np.stack(scores, axis=1)
