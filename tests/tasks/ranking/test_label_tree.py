"""Surface forms and their tree: what is shared, how a score is made, and labels that begin one another."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from common.generation.decoding import Decoding
from common.generation.generate import generate
from common.models import chats, loading, tokenizers
from common.models.source import ModelSource
from common.tasks.ranking import ranker as ranker_module
from common.tasks.ranking.creditmix import CREDITMIX
from common.tasks.ranking.label_tree import LabelTree, label_scores, label_tokens
from common.tasks.ranking.ranker import cached_prior
from common.tasks.ranking.task import LabelTask
from common.tasks.ranking.torch_ranker import TorchRanker, naive_scores

RISKS = LabelTask("risks", ("Low", "Low risk", "High"), "Rate the customer.")
RATINGS = LabelTask("ratings", ("1", "2", "10"), "Rate the answer.")
GRADES = LabelTask("grades", ("A", "A+", "B"), "Grade the answer.")
CODES = {"alpha": "Low", "beta": "Low risk", "gamma": "High"}


def forms_of(tokenizer, task: LabelTask) -> list[list[int]]:
    return [form for words in label_tokens(tokenizer, task) for word in words for form in word]


@pytest.mark.parametrize("task", [RISKS, RATINGS, GRADES], ids=lambda task: task.name)
def test_where_a_label_begins_another_all_forms_end_the_turn(task, tokenizer):
    forms = forms_of(tokenizer, task)
    assert all(form[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in form[:-1] for form in forms)
    spelled = {tokenizer.decode(form[:-1]).strip() for form in forms}
    assert spelled == set(task.labels)


def test_elsewhere_forms_are_their_own_tokens(tokenizer):
    """CreditMix's scores are as they were, and so are those of a label whose words begin one another."""
    within = LabelTask("within", ("Urgent", "Calm"), "Which?", verbalizers={"Urgent": ["Urgent now"]})
    for task in (CREDITMIX, within):
        for form in forms_of(tokenizer, task):
            assert tokenizer.eos_token_id not in form
            assert form == tokenizer.encode(tokenizer.decode(form), add_special_tokens=False)


def test_the_score_asks_whether_the_answer_ends():
    """Two labels, [1] and [1, 2], with their end 3: means of known log-probabilities."""
    tree = LabelTree([[[[1, 3]]], [[[1, 2, 3]]]])
    probabilities = np.array([[[0.1, 0.8, 0.05, 0.05], [0.1, 0.1, 0.7, 0.1], [0.05, 0.05, 0.0001, 0.8999]]])
    scores = label_scores(tree, np.log(probabilities), "max")
    assert scores[0] == pytest.approx(
        [np.mean(np.log([0.8, 0.1])), np.mean(np.log([0.8, 0.7, 0.8999]))], abs=1e-5
    )  # fmt: skip


def question(number: int) -> tuple[str, str]:
    code = list(CODES)[number % 3]
    return f"Customer {100 + 7 * number}, code {code}, age {20 + number % 50}", CODES[code]


@pytest.fixture(scope="module")
def answering(base, tokenizer):
    """A model that was trained until its own text is right: "Low" and its end, "Low risk" and its end, "High"."""
    torch.manual_seed(0)
    model = loading.load_base(ModelSource(base, dtype="float32"), training=True)
    loading.align_model(model, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rows = [chats.encode(tokenizer, RISKS.prompt(text), label) for text, label in map(question, range(24))]
    longest = max(len(row.input_ids) for row in rows)
    ids = torch.full((len(rows), longest), tokenizer.pad_token_id)
    labels = torch.full_like(ids, -100)
    for number, row in enumerate(rows):
        ids[number, : len(row.input_ids)] = torch.tensor(row.input_ids)
        labels[number, row.prompt_length : len(row.input_ids)] = torch.tensor(row.input_ids[row.prompt_length :])
    for _ in range(400):
        loss = model(input_ids=ids, labels=labels, attention_mask=(ids != tokenizer.pad_token_id).long()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss < 0.003:
            break
    return model.eval()


@pytest.mark.processes
def test_ranking_is_as_right_as_the_text(answering, tokenizer):
    texts, wanted = zip(*map(question, range(24)), strict=True)
    prompts = [tokenizers.encode_prompt(tokenizer, RISKS.prompt(text)) for text in texts]
    written = [answer.text for (answer,) in generate(answering, tokenizer, prompts, Decoding(max_new_tokens=8))]
    assert written == list(wanted)
    ranker = TorchRanker(answering, tokenizer, RISKS)
    scores = ranker.raw_scores(texts)
    assert [RISKS.labels[label] for label in scores.argmax(axis=1)] == list(wanted)
    assert np.abs(scores - naive_scores(answering, tokenizer, RISKS, texts)).max() < 1e-4


@pytest.mark.processes
def test_a_prior_from_before_ends_were_scored_is_made_again(answering, tokenizer, tmp_path, monkeypatch):
    ranker = TorchRanker(answering, tokenizer, RISKS)
    with monkeypatch.context() as patch:
        own_tokens = [[[form[:-1] for form in word] for word in words] for words in label_tokens(tokenizer, RISKS)]
        patch.setattr(ranker_module, "label_tokens", lambda tokenizer, task: own_tokens)
        before = cached_prior(TorchRanker(answering, tokenizer, RISKS), tmp_path, "hash")
    now = cached_prior(ranker, tmp_path, "hash")
    assert now == pytest.approx(ranker.prior(), abs=1e-6)
    assert now != pytest.approx(before, abs=1e-3)
