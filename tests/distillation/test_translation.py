"""A teacher's distributions in the tokens of another vocabulary, against what can be worked out by hand."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch
from support.distillation import distill, loss_column
from support.inputs import CORPUS
from support.models import build_base

from common.cli import UserError
from common.distillation import rows as distill_rows
from common.distillation.alignment import Place, Vocabulary, places, same_text
from common.distillation.teacher_cache import row_key
from common.distillation.translation import FLOOR, Translation
from common.models import tokenizers
from common.models.tokenizers import Encoded

LETTERS = Vocabulary([b"a", b"b", b"c", b""], 3, [3])
MERGES = Vocabulary([b"a", b"b", b"c", b"ab", b"abc", b""], 5, [5])
P = {"letters": [0.5, 0.3, 0.1, 0.1], "merges": [0.2, 0.1, 0.1, 0.3, 0.2, 0.1]}


def row(vocabulary: Vocabulary, *words: str) -> Encoded:
    """A row that learns these words and the end of the turn, behind a prompt of one token."""
    return Encoded([0, *(vocabulary.ids[word.encode()] for word in words), vocabulary.end], 1)


def translated(teacher: Vocabulary, student: Vocabulary, theirs: Encoded, ours: Encoded, p: list[float]):
    """[learnt tokens, student's vocabulary], probabilities of a teacher that always has the distribution p."""
    translation = Translation(teacher, student, {row_key(ours): theirs})
    logits = torch.tensor(p).log().expand(len(theirs.learnt), -1)
    known = translation.outcomes([ours], lambda part: logits[part], len(student))
    dense = torch.zeros(len(ours.learnt), len(student)).scatter_(1, known["ids"], known["logprobs"].exp())
    assert torch.allclose(dense.sum(dim=1) + known["rest"], torch.ones(()), atol=1e-5)
    return [[value if value > 2 * FLOOR else 0 for value in line] for line in dense.tolist()]


def test_with_one_vocabulary_it_changes_nothing():
    same = row(MERGES, "ab", "c", "abc")
    for line in translated(MERGES, MERGES, same, same, P["merges"]):
        assert line == pytest.approx(P["merges"])


def test_a_student_of_longer_tokens_gets_the_product_along_its_own():
    found = translated(LETTERS, MERGES, row(LETTERS, "a", "b", "c", "b"), row(MERGES, "abc", "b"), P["letters"])
    a, b, c, end = P["letters"]
    assert found[0] == pytest.approx([a - a * b * c, b, c, 0, a * b * c, end])
    assert found[1] == pytest.approx([a, b, c, 0, 0, end])
    assert found[2] == pytest.approx([a, b, c, 0, 0, end])


def test_a_student_of_shorter_tokens_goes_through_those_of_the_teacher():
    found = translated(MERGES, LETTERS, row(MERGES, "abc", "c"), row(LETTERS, "a", "b", "c", "c"), P["merges"])
    a, b, c, ab, abc, end = P["merges"]
    assert found[0] == pytest.approx([a + ab + abc, b, c, end])
    assert found[1] == pytest.approx([0, 1, 0, 0])  # "a" has been said: ab and abc are left
    assert found[2] == pytest.approx([0, 0, 1, 0])
    assert found[3] == pytest.approx([a + ab + abc, b, c, end])
    assert found[4] == pytest.approx([a + ab + abc, b, c, end])


def test_tokens_that_overlap_on_both_sides():
    """The teacher says a|bc, the student ab|c."""
    teacher = Vocabulary([b"a", b"bc", b"b", b""], 3, [3])
    student = Vocabulary([b"ab", b"c", b"a", b"b", b""], 4, [4])
    ours, theirs = row(student, "ab", "c"), row(teacher, "a", "bc")
    theirs = Encoded([0, *theirs.input_ids[1:]], 1)
    assert places(student.runs(ours), teacher.runs(theirs)) == [
        Place(0, 0, b"", 1, b"b"),
        Place(1, 1, b"b", 1, b""),
        Place(4, 2, b"", 1, b""),
    ]
    found = translated(teacher, student, theirs, ours, [0.5, 0.2, 0.1, 0.2])
    assert found[0] == pytest.approx([0.5 * 0.3, 0, 0.5 * 0.7, 0.3, 0.2])  # what begins with b: bc and b
    assert found[1] == pytest.approx([0, 1, 0, 0, 0])


def test_what_the_student_cannot_say_is_in_the_rest():
    student = Vocabulary([b"a", b""], 1, [1])
    ours = Encoded([0, 0, 1], 1)
    translation = Translation(LETTERS, student, {row_key(ours): row(LETTERS, "a")})
    known = translation.outcomes([ours], lambda part: torch.tensor(P["letters"]).log().expand(2, -1)[part], 2)
    assert known["rest"].tolist() == pytest.approx([0.4, 0.4])  # b and c


def test_a_batch_in_pieces_is_the_batch_at_once(monkeypatch):
    ours = [row(MERGES, "abc", "b"), row(MERGES, "c", "ab", "ab")]
    theirs = [row(LETTERS, *"abcb"), row(LETTERS, *"cabab")]
    translation = Translation(LETTERS, MERGES, dict(zip(map(row_key, ours), theirs, strict=True)))
    logits = torch.randn(11, 4, generator=torch.Generator().manual_seed(0))
    whole = translation.outcomes(ours, lambda part: logits[part], 3)
    monkeypatch.setattr("common.distillation.translation.CHUNK_LOGITS", 1)
    pieces = translation.outcomes(ours, lambda part: logits[part], 3)
    assert len(whole["ids"]) == sum(len(row.learnt) for row in ours)
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)


def test_rows_of_other_texts_are_told_apart():
    ours = MERGES.runs(row(MERGES, "ab", "c"))
    assert same_text(ours, LETTERS.runs(row(LETTERS, *"abc")))
    assert not same_text(ours, LETTERS.runs(row(LETTERS, *"abb")))
    unended = Encoded(row(LETTERS, *"abc").input_ids[:-1], 1)
    assert not same_text(ours, LETTERS.runs(unended))


@pytest.fixture(scope="module")
def strangers():
    from common.training import miniature

    return tokenizers.align(miniature.build_tokenizer([text.upper() for text in CORPUS], vocab_size=400))


def test_windows_of_running_text_end_at_characters(tokenizer, strangers):
    text = "Größe: 你好, naïve \U0001f600 texts. " * 4
    pairs = distill_rows.encode_for_both(tokenizer, strangers, "x", [{"text": text}], 23, False, context=99)
    student, teacher = Vocabulary.of(tokenizer), Vocabulary.of(strangers)
    assert len(pairs) > 3
    assert all(same_text(student.runs(ours), teacher.runs(theirs)) for ours, theirs in pairs)
    learnt = sum(len(ours.learnt) for ours, _ in pairs)
    assert learnt > 0.7 * len(tokenizer.encode(text))


def test_windows_that_are_longer_in_the_teacher_s_tokens_are_halved(tokenizer, strangers, capsys):
    """The teacher reads no more than its context, and no text is lost to that."""
    student, teacher = Vocabulary.of(tokenizer), Vocabulary.of(strangers)
    bos, text = tokenizer.convert_tokens_to_ids("<|im_start|>"), " ".join(CORPUS[:3])
    window = Encoded([bos, *tokenizer.encode(text)], 1)
    (whole,) = distill_rows.windows_for_both(window, strangers, student.words, teacher.words, 9999)
    context = len(whole[1].input_ids) // 3
    parts = list(distill_rows.windows_for_both(window, strangers, student.words, teacher.words, context))
    assert len(parts) == 4 and all(ours.input_ids[0] == bos for ours, _ in parts)
    assert all(len(theirs.input_ids) <= context for _, theirs in parts)
    assert all(same_text(student.runs(ours), teacher.runs(theirs)) for ours, theirs in parts)
    assert [token for ours, _ in parts for token in ours.input_ids[1:]] == window.input_ids[1:]
    limits = (64, False)
    distill_rows.encode_for_both(tokenizer, strangers, "x", [{"text": text + " \U0001f600" * 64}], *limits, context=64)
    said = capsys.readouterr().err
    assert re.search(r"x: \d+ of \d+ windows halved, longer than the teacher's 64 in its tokens", said)


@pytest.mark.processes
def test_a_student_learns_from_a_teacher_of_another_vocabulary(base, strangers, uneven, tmp_path):
    stranger = build_base(tmp_path / "stranger", strangers, 0.3, hidden=48, layers=4, seed=5)
    more = ("--data", uneven, "--teacher", stranger, "--forward_kl", 1, "--teacher_cache", tmp_path / "cache")
    losses = loss_column(distill(base, tmp_path / "run", *more))
    assert losses[-1] < losses[0] and all(map(math.isfinite, losses))
    again = loss_column(distill(base, tmp_path / "again", *more))  # from the cache
    assert again == losses


@pytest.mark.processes
def test_a_teacher_of_a_smaller_vocabulary_is_padded_with_a_token_of_its_own(base, uneven, tokenizer, tmp_path):
    from common.training import miniature

    fewer = tokenizers.align(miniature.build_tokenizer(["a b"], vocab_size=270))
    assert len(fewer) <= tokenizer.pad_token_id < len(tokenizer) or len(fewer) < len(tokenizer)
    small = build_base(tmp_path / "small", fewer, 0.3)
    larger = tokenizers.load_tokenizer(base)
    larger.pad_token = larger.convert_ids_to_tokens(len(larger) - 1)
    student = build_base(tmp_path / "student", larger, 0.3)
    assert tokenizers.load_tokenizer(student).pad_token_id >= len(fewer)
    more = ("--data", uneven, "--teacher", small, "--forward_kl", 1, "--teacher_cache", tmp_path / "cache")
    assert all(map(math.isfinite, loss_column(distill(student, tmp_path / "run", *more))))


def test_running_text_of_a_tokenizer_that_puts_a_space_before_it(tokenizer, strangers):
    from tokenizers.normalizers import Prepend

    spaced = copy.deepcopy(strangers)
    spaced.backend_tokenizer.normalizer = Prepend(" ")
    assert spaced.encode("x") != strangers.encode("x")
    student, teacher = Vocabulary.of(tokenizer), Vocabulary.of(spaced)
    pairs = distill_rows.encode_for_both(tokenizer, spaced, "x", [{"text": "The cat sat on the mat. " * 9}], 20, False,
                                         context=99)  # fmt: skip
    assert len(pairs) > 3 and all(same_text(student.runs(a), teacher.runs(b)) for a, b in pairs)


@pytest.mark.processes
def test_on_policy_rounds_under_a_teacher_of_another_vocabulary(base, strangers, uneven, tmp_path):
    stranger = build_base(tmp_path / "stranger", strangers, 0.3, hidden=48, layers=4, seed=5)
    more = (
        "--on_policy",
        "--max_new_tokens",
        12,
        "--max_steps",
        3,
        "--ignore_collapse",
        "--cache_k",
        16,
        "--rounds",
        2,
    )
    run = distill(base, tmp_path / "run", "--data", uneven, "--teacher", stranger, *more, "--lmbda", 0.5)
    losses = loss_column(run)
    assert len(losses) == 6 and all(map(math.isfinite, losses))
    assert min(losses) > 0


def test_the_student_s_own_token_is_kept():
    ours, theirs = row(MERGES, "abc", "c"), row(LETTERS, *"abcc")
    translation = Translation(LETTERS, MERGES, {row_key(ours): theirs})
    logits = torch.tensor(P["letters"]).log().expand(5, -1)
    known = translation.outcomes([ours], lambda part: logits[part], 2, own=True)
    assert known["ids"].tolist() == [[0, 4], [0, 2], [0, 5]]
    assert known["logprobs"].exp()[:, 1].tolist() == pytest.approx([0.015, 0.1, 0.1])


def test_answers_that_the_teacher_cannot_read_are_left_out(base, strangers, tokenizer, tmp_path, capsys):
    from common.distillation import vocabularies
    from common.distillation.settings import DistillSettings

    stranger = build_base(tmp_path / "stranger", strangers)
    settings = DistillSettings(student=base, save_dir="x", data="d.jsonl", teacher=stranger)
    prompt = tokenizers.encode_prompt(tokenizer, "Hi")
    word = tokenizer.encode("Good", add_special_tokens=False)
    cut, half = Encoded([*prompt, *word], len(prompt)), Encoded([*prompt, *tokenizer.encode("ö")[:1]], len(prompt))
    special = Encoded([*prompt, *word, tokenizer.pad_token_id, *word], len(prompt))
    answered = [("Hi", cut), ("Hi", half), ("Hi", special)]
    long = Encoded([*prompt, *word * 3000], len(prompt))
    kept, translation = vocabularies.translated_answers(settings, tokenizer, [*answered, ("Hi", long)])
    assert kept == [cut]
    assert "1 of 4 rows left out, longer than the teacher's 2048 in its tokens" in capsys.readouterr().err
    assert strangers.decode(translation.reading(cut).input_ids).endswith("Good")
    with pytest.raises(UserError, match="no row has the same text"):
        vocabularies.translated_answers(settings, tokenizer, [("Hi", half)])


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ((), r"different vocabularies \(.*\); three ways work: .*--teacher_cache.*kd_train.py.*--labels"),
        (("--teacher_cache", "CACHE", "--hidden_mse", 1), "leave --hidden_mse out"),
        (("--teacher_cache", "CACHE", "--temperature", 2), "needs --cache_targets topk and --temperature 1"),
    ],
)
def test_what_no_translation_gives_is_refused(more, words, base, strangers, uneven, tmp_path):
    stranger = build_base(tmp_path / "stranger", strangers)
    more = [str(tmp_path / "cache") if word == "CACHE" else word for word in more]
    with pytest.raises(UserError, match=words):
        distill(base, tmp_path / "run", "--data", uneven, "--teacher", stranger, *more)
