"""The ranker against its definition: one forward pass per row, label and form."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from support.label_tasks import AWKWARD, TEXTS

from common.cli import UserError
from common.models import adapters, tokenizers
from common.models import loading as models
from common.models.source import ModelSource
from common.tasks.ranking import ranker
from common.tasks.ranking.creditmix import CREDITMIX
from common.tasks.ranking.label_tree import LabelTree
from common.tasks.ranking.ranker import Ranker, Share, cached_prior
from common.tasks.ranking.task import LabelTask
from common.tasks.ranking.torch_ranker import TorchRanker, label_scores, naive_scores

SIXTY = LabelTask("sixty", tuple(f"class number {i}" for i in range(60)), "Which class?", ("N/A",))

# The tests' tokenizer has phrases of CREDITMIX's prompts, each as a token: the start of one is a few tokens.
PLAIN = dataclasses.replace(
    CREDITMIX, instruction="Which of Good, Standard and Bad is it?", null_inputs=("N/A", "none")
)


@pytest.fixture(scope="module")
def model(tiny_base):
    return models.load_for_inference(ModelSource(tiny_base))[0]


def architecture(kind: str, tokenizer):
    torch.manual_seed(1)
    shape = {"vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": None}
    if kind == "llama":
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            **shape,
        )
        return LlamaForCausalLM(config).eval()
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=256, **shape)).eval()


@pytest.mark.parametrize("task", [CREDITMIX, AWKWARD, SIXTY], ids=lambda task: task.name)
def test_equals_the_naive_scorer(model, tokenizer, task):
    expected = naive_scores(model, tokenizer, task, TEXTS)
    assert np.abs(TorchRanker(model, tokenizer, task).raw_scores(TEXTS) - expected).max() < 1e-4


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("task", [CREDITMIX, AWKWARD], ids=lambda task: task.name)
def test_other_architectures(kind, task, tokenizer):
    model = architecture(kind, tokenizer)
    expected = naive_scores(model, tokenizer, task, TEXTS)
    assert np.abs(TorchRanker(model, tokenizer, task).raw_scores(TEXTS) - expected).max() < 1e-4


@pytest.mark.parametrize("task", [CREDITMIX, AWKWARD], ids=lambda task: task.name)
@pytest.mark.parametrize("budget", [1, 60, 100_000])
def test_independent_of_batches_and_order(model, tokenizer, task, budget):
    alone = np.concatenate([TorchRanker(model, tokenizer, task).raw_scores([text]) for text in TEXTS])
    together = TorchRanker(model, tokenizer, task, max_batch_tokens=budget).raw_scores(TEXTS[::-1])[::-1]
    assert np.abs(alone - together).max() < 1e-4


def test_windows_keep_the_order(model, tokenizer, monkeypatch):
    expected = TorchRanker(model, tokenizer, CREDITMIX).raw_scores(TEXTS)
    monkeypatch.setattr(ranker, "WINDOW_ROWS", 2)
    assert np.abs(TorchRanker(model, tokenizer, CREDITMIX).raw_scores(TEXTS) - expected).max() < 1e-4


def test_bfloat16_agrees_on_the_winner(tiny_base, tokenizer):
    rows = [f"Age: {age}, Occupation: Writer, Outstanding Debt: {13 * age}" for age in range(100, 300)]
    exact, half = (
        TorchRanker(models.load_base(ModelSource(tiny_base, dtype=dtype)).eval(), tokenizer, CREDITMIX).raw_scores(rows)
        for dtype in ("float32", "bfloat16")
    )
    best = np.sort(exact, axis=1)
    clear = best[:, -1] - best[:, -2] > 0.01  # random weights: near-ties mean nothing
    assert clear.sum() > 50
    assert (exact.argmax(1) == half.argmax(1))[clear].mean() >= 0.995


def test_tree_shares_tokens():
    tree = LabelTree([[[[5]]], [[[5, 6]]], [[[5, 6, 7], [8, 9]]]])
    assert tree.tokens[1:] == [5, 6, 8]  # inner nodes: 5, 5-6 and 8; the last token of a form costs no column
    assert tree.depths == [0, 1, 2, 1]
    assert tree.ancestors().tolist() == [[True, False, False], [True, True, False], [False, False, True]]
    assert tree.forms[2][0][0] == [(0, 5), (1, 6), (2, 7)]


def test_hand_computed_scores(tokenizer):
    """Two labels of one and two tokens on logits that are known."""
    tree = LabelTree([[[[0]]], [[[1, 2]]]])
    logits = torch.log(torch.tensor([[[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]]]))
    scores = label_scores(tree, logits, CREDITMIX.aggregate)
    assert scores[0, 0] == pytest.approx(np.log(0.5), abs=1e-6)
    assert scores[0, 1] == pytest.approx((np.log(0.25) + np.log(0.6)) / 2, abs=1e-6)


def test_prior_is_the_mean_over_null_inputs(model, tokenizer):
    ranker = TorchRanker(model, tokenizer, CREDITMIX)
    expected = naive_scores(model, tokenizer, CREDITMIX, CREDITMIX.null_inputs).mean(axis=0)
    assert np.abs(ranker.prior() - expected).max() < 1e-4


def test_prefixes_at_hand_are_few(model, tokenizer):
    """Equal long rows share all but their last token, and the keys and values of that are large."""
    ranker = TorchRanker(model, tokenizer, CREDITMIX)
    once = ranker.raw_scores(["Age: 1", "Age: 2"])
    for number in range(6):
        row = f"{number}" + " word" * (60 if number else 20)
        assert np.ptp(ranker.raw_scores([row, row]), axis=0).max() < 1e-5
        kept = [len(prefix) for prefix in ranker.prefixes]
        assert len(kept) == 1 or sum(kept) <= 512
    assert len(kept) == 1  # of the long ones there is room for one
    assert np.abs(ranker.raw_scores(["Age: 1", "Age: 2"]) - once).max() < 1e-5


@pytest.fixture
def read(model) -> Iterator[list[int]]:
    """Tokens of a row in each pass."""
    passes: list[int] = []
    hook = model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: passes.append(inputs[0].shape[1])
    )
    yield passes
    hook.remove()


@pytest.mark.parametrize("task", [PLAIN, AWKWARD], ids=lambda task: task.name)
def test_a_row_by_itself_is_read_behind_the_start_that_is_at_hand(model, tokenizer, task, read):
    """Kept of a batch, or of the prior; where nothing is, nothing is read for it."""
    prompts = [tokenizers.encode_prompt(tokenizer, task.prompt(text)) for text in TEXTS]
    ranker = TorchRanker(model, tokenizer, task)
    whole = [ranker.scores_of([prompt]) for prompt in prompts]
    assert read == [len(prompt) + ranker.tree.columns for prompt in prompts] and not ranker.prefixes
    expected = naive_scores(model, tokenizer, task, TEXTS)
    for ask in (lambda: ranker.raw_scores(TEXTS), ranker.prior):
        ranker.prefixes.clear()
        ask()
        (start,) = ranker.prefixes
        assert len(start) > 10
        read.clear()
        behind = [ranker.scores_of([prompt]) for prompt in prompts]
        assert read == [len(prompt) - len(start) + ranker.tree.columns for prompt in prompts]
        assert [*ranker.prefixes] == [start]
        assert np.abs(np.concatenate(behind) - expected).max() < 1e-4
        assert np.abs(np.concatenate(behind) - np.concatenate(whole)).max() < 1e-4
    long = " ".join(TEXTS) * 3  # a start of so little of it is not used
    read.clear()
    assert np.abs(ranker.raw_scores([long]) - naive_scores(model, tokenizer, task, [long])).max() < 1e-4
    assert read[0] == len(tokenizers.encode_prompt(tokenizer, task.prompt(long))) + ranker.tree.columns


def test_rows_one_by_one_have_a_start_that_null_prompts_have(model, tokenizer, read):
    """It is read once, from the first row on; what was asked before changes no answer."""
    ranker = TorchRanker(model, tokenizer, CREDITMIX)
    ranker.one_by_one = True
    rows = [f"Age: 23, Occupation: {kind}, Annual Income: 1" for kind in ("Writer", "Doctor", "Lawyer")]
    first = [ranker.raw_scores([row]) for row in rows]
    (start,) = ranker.prefixes
    whole = [len(tokenizers.encode_prompt(tokenizer, CREDITMIX.prompt(row))) for row in rows]
    assert len(start) > min(whole) / 3
    assert read == [len(start), *(length - len(start) + ranker.tree.columns for length in whole)]
    assert np.abs(np.concatenate(first) - naive_scores(model, tokenizer, CREDITMIX, rows)).max() < 1e-4
    ranker.raw_scores(rows)
    ranker.raw_scores(rows[:1] * 9)
    ranker.prior()
    assert max(map(len, ranker.prefixes)) > len(start)  # the row itself is at hand
    for row, scores in zip(rows, first, strict=True):
        assert np.abs(ranker.raw_scores([row]) - scores).max() < 1e-5
    for row in ("", "N/A", "(", *CREDITMIX.null_inputs):
        assert np.abs(ranker.raw_scores([row]) - naive_scores(model, tokenizer, CREDITMIX, [row])).max() < 1e-4


@pytest.fixture(scope="module")
def rankers(tiny_base, tokenizer, tmp_path_factory) -> dict[str | None, TorchRanker]:
    """Of two adapters on one model, and of it as it is."""
    from support.served import make_run

    model = models.load_base(ModelSource(tiny_base))
    for seed, name in enumerate(("one", "two")):
        folder = make_run(tmp_path_factory.mktemp("adapters") / name, tiny_base, seed)
        model = adapters.load_adapter(model, str(folder), name=name)
    return {name: TorchRanker(model.eval(), tokenizer, PLAIN) for name in ("one", "two", None)}


@pytest.fixture
def alone(rankers, tokenizer) -> dict[str | None, np.ndarray]:
    """The scores of `TEXTS` by each adapter, read by itself."""
    scores, model = {}, rankers[None].model
    for name in rankers:
        model.set_adapter(name or "one")
        with contextlib.nullcontext() if name else model.disable_adapter():
            scores[name] = naive_scores(model, tokenizer, PLAIN, TEXTS)
    assert np.abs(scores["one"] - scores["two"]).max() > 0.01
    return scores


def test_rows_of_several_rankers_have_the_scores_of_each(rankers, alone, tokenizer):
    prompts = [tokenizers.encode_prompt(tokenizer, PLAIN.prompt(text)) for text in TEXTS]
    shares = [Share(ranker, prompts[:count], name) for count, (name, ranker) in enumerate(rankers.items(), start=4)]
    with rankers[None].model.disable_adapter():
        for _ in range(2):  # the second time with what each has kept
            for share, scores in zip(shares, Ranker.scores_together(shares), strict=True):
                assert np.abs(scores - alone[share.adapter][: len(share.prompts)]).max() < 1e-4
    kept = [list(ranker.prefixes) for ranker in rankers.values()]
    assert kept[0] and kept == kept[:1] * 3


def test_a_row_that_several_rankers_read_is_read_once_by_each(rankers, alone, tokenizer):
    """And its longer start is no reason to read that by itself for each of them first."""
    prompts = [tokenizers.encode_prompt(tokenizer, PLAIN.prompt(text)) for text in TEXTS]
    for name in ("one", "two"):
        rankers[name].prefixes.clear()
        Ranker.scores_together([Share(rankers[name], prompts, name)])
    (start,) = rankers["one"].prefixes
    passes: list[tuple[int, ...]] = []
    embeddings = rankers["one"].model.get_input_embeddings()
    hook = embeddings.register_forward_hook(lambda module, inputs, output: passes.append(tuple(inputs[0].shape)))
    scores = Ranker.scores_together([Share(rankers[name], prompts[-1:], name) for name in ("one", "two")])
    hook.remove()
    assert passes == [(2, len(prompts[-1]) - len(start) + rankers["one"].tree.columns)]
    for name, own in zip(("one", "two"), scores, strict=True):
        assert np.abs(own - alone[name][-1:]).max() < 1e-4


def test_prior_cache(model, tokenizer, tmp_path, capsys):
    ranker = TorchRanker(model, tokenizer, CREDITMIX)
    prior = cached_prior(ranker, tmp_path, "hash-a")
    file = tmp_path / "prior.json"
    stored = json.loads(file.read_text())
    stored["prior"]["Good"] = 7.0
    file.write_text(json.dumps(stored))
    assert cached_prior(ranker, tmp_path, "hash-a")[0] == 7.0  # read, not computed
    assert cached_prior(ranker, tmp_path, "hash-b")[0] == pytest.approx(prior[0])  # another adapter
    fewer = dataclasses.replace(CREDITMIX, null_inputs=CREDITMIX.null_inputs[:2])
    of_fewer = cached_prior(TorchRanker(model, tokenizer, fewer), tmp_path, "hash-b")
    assert of_fewer[0] != pytest.approx(prior[0], abs=1e-7)
    file.write_text("{broken")
    assert cached_prior(ranker, tmp_path, "hash-a")[0] == pytest.approx(prior[0])
    assert "computing the prior again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [(("Good", ""), "has no tokens"), (("Good", " Good"), "are the same tokens")],
)
def test_bad_labels(model, tokenizer, labels, sentence):
    with pytest.raises(UserError, match=sentence):
        TorchRanker(model, tokenizer, dataclasses.replace(CREDITMIX, labels=labels))


def test_a_row_longer_than_the_context(model, tokenizer):
    with pytest.raises(UserError, match=r"row 2 .* does not fit the model's context of 2048"):
        TorchRanker(model, tokenizer, CREDITMIX).raw_scores(["short", "9" * 3000])


def test_nan_is_refused(tiny_base, tokenizer):
    model = models.load_base(ModelSource(tiny_base)).eval()
    model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(UserError, match="answers NaN for row 1"):
        TorchRanker(model, tokenizer, CREDITMIX).raw_scores(TEXTS)
