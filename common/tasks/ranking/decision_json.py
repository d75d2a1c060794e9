"""The decision.json by which transformers' pipeline("decision") and `transformers serve` ask a run its own question.

transformers reads the logits of one token for each option, scaled by one temperature. So a label stands there for its
first token, and of what was fitted for the run neither the bias of each label nor the abstention can be written down.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.cli import UserError
from common.files import write_json
from common.models import chat_template
from common.tasks.ranking.calibration import fit_temperature
from common.tasks.ranking.ranker import Ranker
from common.tasks.ranking.rankers import ranker_of
from common.tasks.ranking.task import LabelTask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE = "decision.json"
MARK = "state 7f3a"  # where the text stands in a rendered prompt
TEMPLATE = """\
{%- set options = question.options if question.type == "choice" else question.descriptions -%}
{%- if options != labels or (question.instructions or own)|trim != own -%}
{{- raise_exception(refusal) -}}
{%- endif -%}
{{- head ~ (state if state is string else state|tojson) ~ tail -}}"""


def write(folder: str | Path, ranker: Ranker, texts: Sequence[str], y: np.ndarray) -> None:
    """Write `FILE` into a run's folder, with the temperature that fits dev rows best.

    Args:
        y: [n] label indices of `texts`.

    Raises:
        UserError: see `first_tokens` and `template`.
    """
    task, tokenizer = ranker.task, ranker.tokenizer
    tokens = first_tokens(tokenizer, task)
    by_token = replace(task, labels=tuple(tokens), verbalizers={})
    raw = ranker_of(ranker.model, tokenizer, by_token, ranker.max_batch_tokens).raw_scores(texts)
    temperature = round(fit_temperature(raw, y), 6)
    kinds = ("choice", "score")
    content = {
        "labels": dict.fromkeys(kinds, tokens),
        "temperature": dict.fromkeys(kinds, temperature),
        "chat_template": template(tokenizer, task),
    }
    write_json(Path(folder) / FILE, content)


def first_tokens(tokenizer: PreTrainedTokenizerBase, task: LabelTask) -> list[str]:
    """The text of each label's first token.

    Raises:
        UserError: two labels begin with the same token, or one with a part of a character.
    """
    tokens = []
    for label in task.labels:
        first = tokenizer.encode(label, add_special_tokens=False)[:1]
        tokens.append(tokenizer.decode(first))
        if tokenizer.encode(tokens[-1], add_special_tokens=False) != first or tokens[-1] in tokens[:-1]:
            raise UserError(
                f"transformers reads one token of each label, and that of '{label}' ('{tokens[-1]}') does not tell it "
                "from the others; leave --decision_json out, and serve the run with serve_creditmix.py"
            )
    return tokens


def template(tokenizer: PreTrainedTokenizerBase, task: LabelTask) -> str:
    """A Jinja template that writes the prompt that the run was trained on, and refuses any other question.

    Raises:
        UserError: the model has no chat template to write it with.
    """
    if not tokenizer.chat_template:
        raise UserError("the model has no chat template, which decision.json is made of; leave --decision_json out")
    rendered = chat_template.render(tokenizer, [{"role": "user", "content": task.prompt(MARK)}])
    head, _, tail = rendered.partition(MARK)
    refusal = f"this model answers one choice or score, whose options are {', '.join(task.labels)}, in this order"
    values = {"head": head, "tail": tail, "labels": task.labels, "own": task.instruction.strip(), "refusal": refusal}
    settings = (f"{{%- set {name} = {json.dumps(value, ensure_ascii=False)} -%}}\n" for name, value in values.items())
    return "".join(settings) + TEMPLATE
