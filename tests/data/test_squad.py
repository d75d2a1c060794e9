"""SQuAD's rows, their split by article, and the official score."""

from __future__ import annotations

import re
import string
from collections import Counter

import pytest
from support.inputs import SHARED, write_squad

from common.cli import UserError
from common.data import splits, squad

REAL = SHARED / "data/squad/squad-v1.1.json"


def test_a_row_has_prompt_answers_and_its_articles_hash(tmp_path):
    row = squad.rows(write_squad(tmp_path / "s.json"))[3]
    assert row == {
        "id": "1-0",
        "input": "Answer the question with a few words copied from the passage. Return only the answer.\n\n"
        "Question: When was it founded?\n\nPassage: Town 1 was founded in 1801 by the Smiths.",
        "output": "1801",
        "answers": ["1801", "in 1801"],
        "group": splits.group_hash("Town 1"),
    }


def test_the_parts_share_no_article_and_make_up_the_file(tmp_path):
    path = write_squad(tmp_path / "s.json", articles=60)
    parts = {part: squad.rows(path, part) for part in splits.PARTS}
    groups = [{row["group"] for row in rows} for rows in parts.values()]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 60
    assert sorted(row["id"] for rows in parts.values() for row in rows) == sorted(r["id"] for r in squad.rows(path))
    assert all(splits.part_of(row["group"]) == part for part, rows in parts.items() for row in rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answers": []}, "question 1: 'output' must be a non-empty string"),
        ({"answers": "1801"}, "not SQuAD v1.1"),
        ({"question": None}, "not SQuAD v1.1"),
    ],
)
def test_a_bad_question_is_named(tmp_path, change, message):
    with pytest.raises(UserError, match=re.escape(message)):
        squad.rows(write_squad(tmp_path / "s.json", **change))


def test_unanswerable_questions_can_be_left_out(tmp_path, capsys):
    path = write_squad(tmp_path / "s.json", answers=[])
    assert len(squad.rows(path, skip_bad_rows=True)) == 12 * 3 - 1
    assert "1 bad rows skipped, 35 kept" in capsys.readouterr().err


@pytest.mark.parametrize("content", ['{"rows": []}', "[1]", '{"data": [{"title": "x"}]}', '{"data": 3}'])
def test_another_json_is_refused_with_the_shape_that_is_needed(tmp_path, content):
    path = tmp_path / "s.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r'not SQuAD v1\.1 .* needs {"data"'):
        squad.rows(path)


def test_a_part_without_articles_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no article of the dev part among its 1;"):
        squad.rows(write_squad(tmp_path / "s.json", articles=1), "dev")


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Nobel Prize.", "nobel prize"),
        ("an  apple\ta day", "apple day"),
        ("U.S.", "us"),
        ("theatre and another", "theatre and another"),  # articles are whole words
        ("twenty-one", "twentyone"),
        ("«the» – 5", "« » – 5"),  # only ASCII punctuation goes
        ("A", ""),
    ],
)
def test_normalisation_is_the_official_one(text, normal):
    assert squad.normalise(text) == normal


@pytest.mark.parametrize(
    ("prediction", "answers", "em", "f1"),
    [
        ("the Norman conquest", ["Norman conquest!"], 1, 1),
        ("Denmark", ["Denmark, Iceland and Norway"], 0, 2 * 1 * 0.25 / 1.25),
        ("in the 10th century", ["10th and 11th centuries", "10th century"], 0, 2 * (2 / 3) * 1 / (5 / 3)),
        ("to be or not to be", ["to be"], 0, 2 * (2 / 6) * 1 / (8 / 6)),  # a bag: each word as often as it occurs
        ("Paris", ["London"], 0, 0),
        ("", ["London"], 0, 0),
        ("the", ["a"], 1, 0),  # both empty in normal form: as the official script has it
    ],
)
def test_exact_match_and_f1_are_the_official_ones(prediction, answers, em, f1):
    assert squad.exact_match(prediction, answers) == em
    assert squad.f1(prediction, answers) == pytest.approx(f1)


def defined_f1(prediction: str, answer: str) -> float:
    """F1 by the paper's definition, word by word: lower case, no punctuation, no articles."""

    def words(text: str) -> Counter:
        bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
        return Counter(word for word in re.sub(r"\b(a|an|the)\b", " ", bare).split())

    found, gold = words(prediction), words(answer)
    shared = sum(min(found[word], gold[word]) for word in found)
    if not shared:
        return 0.0
    precision, recall = shared / sum(found.values()), shared / sum(gold.values())
    return 2 * precision * recall / (precision + recall)


@pytest.mark.skipif(not REAL.is_file(), reason="needs SQuAD")
def test_real_squad():
    validation = squad.rows(REAL, "validation")
    assert {row["group"] for row in validation}.isdisjoint(row["group"] for row in squad.rows(REAL, "train"))
    assert len({row["id"] for row in validation}) == len(validation)
    for row in validation[::50]:
        assert squad.exact_match(row["output"], row["answers"]) == squad.f1(row["output"], row["answers"]) == 1
        passage = row["input"].partition("Passage: ")[2]
        guess = " ".join(passage.split()[:8])
        assert squad.f1(guess, row["answers"]) == pytest.approx(
            max(defined_f1(guess, answer) for answer in row["answers"])
        )
