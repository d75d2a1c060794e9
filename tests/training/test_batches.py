"""Rows as batches: padding, the order of rows, rows that are too long."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from support.chat_templates import FAMILIES, SMOLLM3, tokenizer_of
from support.inputs import LABELS, write_rows
from support.models import distance
from support.training import train

import kd_train
from common.cli import UserError
from common.models import chats, tokenizers
from common.models import loading as models
from common.models.tokenizers import Encoded
from common.training import batches
from common.training.completion import completion_rows
from common.training.settings import TrainSettings
from common.training.trainer import fitted_trainer


def test_collate_pads_right_and_masks_prompts():
    batch = batches.collate([Encoded([5, 6, 7], 2), Encoded([8, 9], 1)], pad_id=3)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 7], [-100, 9, -100]]
    several = batches.collate([Encoded([5, 6, 7, 8, 9, 10], 2, ((3, 4), (4, 5)))], pad_id=3)  # answers of a chat
    assert several["labels"].tolist() == [[-100, -100, 7, -100, -100, 10]]


@pytest.mark.parametrize("rows", [1, 15, 16, 100, 3000])
def test_every_row_once_an_epoch(rows):
    order = batches.LengthGroupedOrder([row % 7 for row in range(rows)], 16, seed=3)
    epochs = []
    for epoch in range(3):
        order.set_epoch(epoch)
        epochs.append(list(order))
        assert sorted(epochs[-1]) == list(range(rows))
        again = batches.LengthGroupedOrder(order.lengths, 16, seed=3, epoch=epoch)
        assert list(again) == epochs[-1]
    other_seed = list(batches.LengthGroupedOrder(order.lengths, 16, seed=4))
    if rows > 1:
        assert epochs[0] != epochs[1] != epochs[2]
        assert other_seed != epochs[0]


def test_neighbours_are_of_similar_length():
    rng = random.Random(0)
    lengths = [rng.randrange(1, 1000) for _ in range(2048)]
    order = list(batches.LengthGroupedOrder(lengths, 16, seed=0))

    def spread(rows):
        steps = [[lengths[row] for row in rows[i : i + 16]] for i in range(0, len(rows), 16)]
        return sum(max(step) - min(step) for step in steps) / len(steps)

    assert spread(order) < 0.1 * spread(range(2048))


def test_order_does_not_depend_on_how_a_step_is_cut(tokenizer, base, tmp_path):
    rows = [Encoded([400] * (5 + i % 11) + [i + 1], 2) for i in range(40)]
    orders = []
    for size, accumulation in ((8, 1), (2, 4), (1, 8)):
        settings = TrainSettings(
            student=base,
            save_dir=str(tmp_path),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
        )
        student = models.load_base(settings.source, training=True)
        trainer = fitted_trainer(settings, student, tokenizer, completion_rows(rows, tokenizer, student))
        seen = [labels for batch in trainer.get_train_dataloader() for labels in batch["labels"]]
        orders.append([int(labels[labels != batches.IGNORE][-1]) for labels in seen])
    assert orders[0] == orders[1] == orders[2]
    assert sorted(orders[0]) == list(range(1, 41))


# Rows that are too long.


def test_the_prompt_is_cut_and_the_completion_is_not(tokenizer, capsys):
    pairs = [("Which? " + "word " * n, "Standard") for n in (1, 50, 500)] + [("Which? é日本" + "語" * 90, "Bad")]
    encoded = batches.encode_rows(tokenizer, "rows.jsonl", pairs, max_len=64, whole=False)
    frame = tokenizer.decode(tokenizers.encode_prompt(tokenizer, "\u2402"))
    before, after = frame.split("\u2402")
    for (prompt, completion), row in zip(pairs, encoded, strict=True):
        assert len(row.input_ids) <= 64
        assert tokenizer.decode(row.input_ids[row.prompt_length :]) == completion + "<|im_end|>"
        text = tokenizer.decode(row.input_ids[: row.prompt_length])
        assert text.startswith(before + "Which?")
        assert text.endswith(after)
        assert prompt.startswith(text.removeprefix(before).removesuffix(after))
    assert len(encoded[2].input_ids) > 60  # no more is cut than must be
    assert tokenizer.decode(encoded[0].input_ids).count("word") == 1
    assert "rows.jsonl: 3 of 4 prompts cut to fit --max_len 64" in capsys.readouterr().err


def test_a_row_that_thinks_is_cut_as_it_is_asked(capsys):
    """Behind the prompt of thinking, which is the longer one here."""
    tokenizer = tokenizer_of(
        replace(FAMILIES["smollm3"], template=SMOLLM3.replace("/think'", "/think " + "x " * 30 + "'"))
    )
    tokenizer = tokenizers.align(tokenizer)
    answer = "<think>\nSo.\n</think>\n\nGood"
    room = len(chats.encode(tokenizer, "Which? ", answer).input_ids) + 20
    pairs = [("Which? " + "word " * 50, answer)]
    (row,) = batches.encode_rows(tokenizer, "rows.jsonl", pairs, room, whole=False)
    assert room - 6 < len(row.input_ids) <= room
    assert "1 of 1 prompts cut" in capsys.readouterr().err


def test_a_row_without_room_for_its_completion_is_left_out(tokenizer, capsys):
    frame = len(tokenizers.encode_prompt(tokenizer, ""))
    answer = len(tokenizers.encode_completion(tokenizer, "9" * 40))
    pairs = [("7 7 7", "Bad"), ("7 7 7", "9" * 40), ("7 7 7 7", "9" * 80)]
    # exactly the frame and the completion: no prompt text would be left
    encoded = batches.encode_rows(tokenizer, "rows.jsonl", pairs, frame + answer, whole=False)
    assert [row is None for row in encoded] == [False, True, True]
    assert "2 of 3 rows left out, longer than --max_len" in capsys.readouterr().err
    encoded = batches.encode_rows(tokenizer, "rows.jsonl", pairs, frame + answer + 1, whole=False)
    assert [row is None for row in encoded] == [False, False, True]
    with pytest.raises(UserError, match="no row fits --max_len 8; raise it"):
        batches.encode_rows(tokenizer, "rows.jsonl", pairs, 8, whole=False)


@pytest.mark.processes
def test_idp_mode_leaves_long_rows_out(base, tmp_path, capsys):
    long, short = (" ".join("1234567890" for _ in range(n)) for n in (12, 1))
    every = [{"input": long if i in (2, 6) else short + str(i), "teacher_output": LABELS[i % 3]} for i in range(8)]
    kept = [row for i, row in enumerate(every) if i not in (2, 6)]
    limit = ("--idp_mode", "--max_len", 80, "--max_steps", 3, "--per_device_train_batch_size", 2)
    one = train(kd_train.main, base, write_rows(tmp_path / "a.jsonl", every), tmp_path / "a", *limit)
    told = capsys.readouterr().err
    assert "2 of 8 rows left out, longer than --max_len 80: rows 3, 7" in told
    assert "cut to fit" not in told
    other = train(kd_train.main, base, write_rows(tmp_path / "b.jsonl", kept), tmp_path / "b", *limit)
    assert distance(one, other) == 0
