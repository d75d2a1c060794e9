"""Shared prefixes: a batch as a tree has the loss and the gradients of the batch as rows, for any mix of rows."""

from __future__ import annotations

import random

import pytest
import torch
from torch.nn import functional

from common.models import adapters, loading, lora_training
from common.models.tokenizers import Encoded
from common.training import batches, prefix_tree, tree_attention
from common.training.hidden_states import predicted, scored
from common.training.prefix_tree import LEAST_SHARED, PrefixTree, Siblings


def model_of(kind: str, **more) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    shape = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    config = AutoConfig.for_model(kind, **(shape | heads | more))
    model = AutoModelForCausalLM.from_config(config).float()
    model.config.use_cache = False
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3.0)  # so that attention is far from uniform
    return model.requires_grad_(False)


def ids(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(1, 97) for _ in range(count)]


def mixes() -> dict[str, list[Encoded]]:
    rng = random.Random(0)
    instruction, schema = ids(rng, 30), ids(rng, 40)
    prompts = [instruction + ids(rng, 5 + 3 * i) for i in range(5)]

    def row(prompt: list[int], answer: int) -> Encoded:
        return Encoded(prompt + ids(rng, answer), len(prompt))

    return {
        "one instruction": [row(prompt, 1 + i % 3) for i, prompt in enumerate(prompts)],
        "pairs of answers": [row(prompt, answer) for prompt in prompts[:3] for answer in (4, 9)],
        "a prompt that begins another": [
            row(instruction, 3),
            row(instruction + schema, 2),
            row(instruction + schema, 5),
        ],
        "three levels": [row(instruction + schema + ids(rng, 20 + i), 4) for i in range(3)]
        + [row(instruction + ids(rng, 25), 4), row(instruction + ids(rng, 3), 6)],
        "two families and a stranger": [row(p, n) for p in (prompts[0], schema) for n in (2, 8)]
        + [row(ids(rng, 50), 7)],
        "nothing in common": [row(ids(rng, 12 + 9 * i), 2 + i) for i in range(4)],
        "the same row twice": [Encoded(prompts[1] + [5, 6, 7], len(prompts[1]))] * 2,
        "a single row": [row(prompts[2], 6)],
        "chats with several answers": [
            Encoded(prompts[0] + ids(rng, 20), len(prompts[0]), ((37, 41), (45, 46))),
            Encoded(prompts[0] + ids(rng, 9), len(prompts[0]), ((36, 40),)),
            row(prompts[0], 4),
        ],
        "running text": [Encoded(ids(rng, 40), 0), Encoded(ids(rng, 33), 0)],
    }


MIXES = mixes()


def loss_and_gradients(student, batch: dict) -> tuple[float, list[torch.Tensor]]:
    """Of a batch, as rows or as a tree, by one plain formula."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    model = student.get_base_model()
    states = scored(model.get_decoder()(**inputs, use_cache=False).last_hidden_state, batch)
    targets = batch["labels"][:, 1:][predicted(batch)]
    loss = functional.cross_entropy(model.get_output_embeddings()(states), targets, reduction="sum")
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return float(loss.detach()), list(torch.autograd.grad(loss, learnt))


def equal(ours: tuple[float, list[torch.Tensor]], theirs: tuple[float, list[torch.Tensor]]) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=1e-6)
    largest = max(float(gradient.abs().max()) for gradient in theirs[1])
    for one, other in zip(ours[1], theirs[1], strict=True):
        assert float((one - other).abs().max()) < 1e-5 * max(1.0, largest)


def adapted(model: torch.nn.Module):
    """A student whose adapter already does something."""
    student = adapters.add_lora(model, r=4, alpha=8, dropout=0.0, seed=0)
    for name, parameter in student.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    return student


@pytest.mark.parametrize(
    ("kind", "queries"),
    [*((kind, 128) for kind in loading.READ_PREFIX_TREES), ("llama", 32), ("llama", 64)],
)
@pytest.mark.parametrize("mix", MIXES)
def test_the_tree_has_the_gradients_of_the_rows(kind, mix, queries, monkeypatch):
    monkeypatch.setattr(tree_attention, "QUERIES", queries)
    model = model_of(kind, **({"sliding_window": None} if kind == "mistral" else {}))
    student = adapted(model)
    plain = loss_and_gradients(student, batches.collate(MIXES[mix], 0))
    assert prefix_tree.install(model)
    equal(loss_and_gradients(student, prefix_tree.collate(MIXES[mix], 0)), plain)


@pytest.mark.parametrize(("maps", "long"), [(1, 1000), (4 * 60 * 60 * 2, 1000), (1 << 22, 40), (1 << 22, 1)])
def test_attention_in_parts_changes_nothing(maps, long, monkeypatch):
    model = model_of("llama")
    student = adapted(model)
    rows = MIXES["three levels"] + MIXES["pairs of answers"]
    plain = loss_and_gradients(student, batches.collate(rows, 0))
    prefix_tree.install(model)
    monkeypatch.setattr(prefix_tree, "MAPS_AT_ONCE", maps)
    monkeypatch.setattr(prefix_tree, "LONG", long)
    batch = prefix_tree.collate(rows, 0)
    assert len(batch["prefix_tree"].parts(4)) > len(batch["prefix_tree"].groups)
    equal(loss_and_gradients(student, batch), plain)


def test_very_long_rows_make_no_tree(monkeypatch):
    monkeypatch.setattr(prefix_tree, "LONGEST", 70)
    assert "prefix_tree" in prefix_tree.collate(MIXES["one instruction"], 0)
    assert prefix_tree.collate(MIXES["three levels"], 0).keys() == {"input_ids", "attention_mask", "labels"}


@pytest.mark.parametrize("mix", MIXES)
def test_every_prediction_of_the_rows_is_in_the_tree_once(mix):
    rows = MIXES[mix]
    tree = PrefixTree.of(rows)
    predictions = [(row, index) for row in rows for index in row.learnt if index]
    for source, (row, index) in zip(tree.sources, predictions, strict=True):  # of the token before each
        assert (tree.ids[source], tree.positions[source]) == (row.input_ids[index - 1], index - 1)
    assert len(tree.ids) == len(tree.positions) == sum(sum(group.lengths) for group in tree.groups)
    assert len(tree.ids) <= sum(len(row.input_ids) for row in rows)
    for row in rows:  # each can be read off from the root on
        assert any(is_path(tree, row, group, index) for group in tree.groups for index in range(len(group.lengths)))


def is_path(tree: PrefixTree, row: Encoded, group: Siblings, index: int) -> bool:
    start = group.start + sum(group.lengths[:index])
    spans = [*group.ancestors, (start, start + group.lengths[index])]
    positions = [position for first, last in spans for position in tree.positions[first:last]]
    return [token for first, last in spans for token in tree.ids[first:last]] == row.input_ids and positions == list(
        range(len(row.input_ids))
    )


def test_what_is_shared_is_there_once():
    rng = random.Random(1)
    instruction, prompt = ids(rng, 50), ids(rng, 20)
    rows = [Encoded(instruction + prompt + ids(rng, 3), 70) for _ in range(2)]
    rows += [Encoded(instruction + ids(rng, 10), 58)]
    tree = PrefixTree.of(rows)
    assert [group.lengths for group in tree.groups] == [(50,), (10, 20), (3, 3)]
    assert tree.groups[2].ancestors == ((0, 50), (60, 80))
    short = [Encoded(prompt[: LEAST_SHARED - 1] + ids(rng, 5), 18) for _ in range(2)]
    assert [group.lengths for group in PrefixTree.of(short).groups] == [(20, 20)]  # not worth it


def test_without_a_tree_nothing_changes():
    model = model_of("qwen2")
    batch = batches.collate(MIXES["one instruction"], 0)
    batch.pop("labels")
    real = batch["attention_mask"].bool()
    before = model(**batch).logits[real]
    assert prefix_tree.install(model)
    assert torch.equal(model(**batch).logits[real], before)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("gemma2", {"head_dim": 8}),
        ("mistral", {"sliding_window": 16}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    ],
)
def test_windows_and_other_architectures_are_left_alone(kind, more):
    model = model_of(kind, **more)
    before = model.config._attn_implementation
    assert not prefix_tree.install(model)
    assert model.config._attn_implementation == before


def test_an_adapter_is_short_and_a_tree_at_once():
    """What a training of a real base uses: both together, against neither."""
    rows, model = MIXES["three levels"], model_of("llama")
    student = adapted(model)
    plain = loss_and_gradients(student, batches.collate(rows, 0))
    lora_training.install(student)
    prefix_tree.install(model)
    equal(loss_and_gradients(student, prefix_tree.collate(rows, 0)), plain)


def test_long_siblings_are_alone():
    parts = list(Siblings(((0, 20),), 20, (30, 40, 50, prefix_tree.LONG, 400)).parts(4))
    assert [part.lengths for part in parts] == [(30, 40, 50), (prefix_tree.LONG,), (400,)]
    assert [(part.start, part.end) for part in parts] == [(20, 140), (140, 332), (332, 732)]
    assert {part.ancestors for part in parts} == {((0, 20),)}


def test_neighbours_are_of_like_length():
    rows = [Encoded(list(range(1, 21)) + [30 + i] * n, 20) for i, n in enumerate((9, 2, 5))]
    assert [group.lengths for group in PrefixTree.of(rows).groups] == [(20,), (2, 5, 9)]
