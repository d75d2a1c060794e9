"""The teacher cache: what goes in comes out, by content; nothing stale, nothing half-written, nothing lost."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from common.cli import UserError
from common.distillation import teacher_cache
from common.distillation.teacher_cache import TeacherCache, pack, record_type, unpack
from common.models.tokenizers import Encoded

FACTS = {"teacher": "abc", "temperature": 1.0}
ROWS = [Encoded(list(range(i, i + n)), prompt) for i, (n, prompt) in enumerate(((9, 4), (5, 1), (7, 0), (4, 3)))]


def outcomes(row: Encoded, k: int = 4, seed: int = 0) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    n = teacher_cache.completion_tokens(row)
    return {
        "ids": draw.integers(0, teacher_cache.MAX_VOCABULARY, (n, k)),
        "rest": draw.random(n, dtype=np.float32),
        "logprobs": draw.normal(-5, 3, (n, k)).astype(np.float16).astype(np.float32),
    }


def filled(folder, rows=ROWS, k: int = 4) -> TeacherCache:
    cache = TeacherCache(folder, FACTS, record_type(k))
    packed = [pack(cache.record, **outcomes(row, k, seed)) for seed, row in enumerate(rows)]
    cache.add(rows, np.concatenate(packed))
    return cache


@pytest.mark.parametrize("k", [0, 1, 4, 5, 64])
def test_records_keep_what_they_are_given(k):
    given = outcomes(ROWS[0], k) | {"hidden": np.ones((5, 2, 3), np.float32) * 70_000}
    record = record_type(k, hidden=(2, 3))
    found = unpack(pack(record, **given))
    for name in ("ids", "rest", "logprobs"):
        assert np.array_equal(found[name], given[name]), name
    assert (found["hidden"] == teacher_cache.HALF_MAX).all()  # not infinity
    assert record_type(64).itemsize == 292
    assert record_type(64, logprobs=False).itemsize == 164


def test_rows_are_found_by_their_content(tmp_path):
    filled(tmp_path / "cache")
    cache = TeacherCache(tmp_path / "cache", FACTS, record_type(4))
    for seed in (3, 0, 2, 1):
        found = unpack(cache.get(Encoded(list(ROWS[seed].input_ids), ROWS[seed].prompt_length)))
        assert np.array_equal(found["ids"], outcomes(ROWS[seed], seed=seed)["ids"])
    assert cache.get(Encoded(ROWS[0].input_ids, 3)) is None  # another place where the completion starts
    assert cache.missing([*ROWS, ROWS[0]]) == []
    assert cache.get(replace(ROWS[0], read_only=((5, 6),))) is None  # another part of it is learnt
    new = Encoded([1, 2, 3], 1)
    assert cache.missing([new, ROWS[1], new]) == [new]
    sizes = cache.sizes()
    assert (sizes["rows"], sizes["tokens"]) == (4, 16)
    assert sizes["bytes"] == sum(path.stat().st_size for path in (tmp_path / "cache").iterdir())


def test_bytes_a_token(tmp_path):
    """The aim is at most 300 at k = 64, index and all."""
    rows = [Encoded(list(range(i, i + 120)), 20) for i in range(60)]
    assert filled(tmp_path / "cache", rows, k=64).sizes()["bytes_per_token"] < 300


def test_what_was_written_before_an_interruption_stays(tmp_path):
    cache = filled(tmp_path / "cache", ROWS[:2])
    left = next((tmp_path / "cache").glob("*.tokens"))
    (tmp_path / "cache" / "0123.tokens").write_bytes(left.read_bytes()[:7])  # killed while it wrote the second shard
    again = TeacherCache(tmp_path / "cache", FACTS, record_type(4))
    assert again.missing(ROWS) == ROWS[2:]
    assert np.array_equal(again.get(ROWS[1]), cache.get(ROWS[1]))


def test_another_process_s_shards_are_seen(tmp_path):
    one = filled(tmp_path / "cache", ROWS[:2])
    other = TeacherCache(tmp_path / "cache", FACTS, record_type(4))
    other.add(ROWS[2:], np.concatenate([pack(other.record, **outcomes(row)) for row in ROWS[2:]]))
    assert one.missing(ROWS) == ROWS[2:]
    one.refresh()
    assert one.missing(ROWS) == []


def test_a_stale_or_foreign_cache_is_refused(tmp_path):
    filled(tmp_path / "cache")
    with pytest.raises(UserError, match=r"written with another temperature \(1.0, not 2.0\); name another folder"):
        TeacherCache(tmp_path / "cache", FACTS | {"temperature": 2.0}, record_type(4))
    with pytest.raises(UserError, match="another record"):
        TeacherCache(tmp_path / "cache", FACTS, record_type(5))
    for temperature in (1.0, 2.0):  # of a cache without a row
        TeacherCache(tmp_path / "empty", FACTS | {"temperature": temperature}, record_type(4))
    assert not (tmp_path / "empty").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="holds files that are no teacher cache"):
        TeacherCache(tmp_path / "other", FACTS, record_type(4))
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["thesis.txt"]


def test_a_damaged_shard_is_named(tmp_path):
    filled(tmp_path / "cache")
    shard = next((tmp_path / "cache").glob("*.tokens"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{shard.name} is damaged; delete it"):
        TeacherCache(tmp_path / "cache", FACTS, record_type(4))


def test_ids_that_would_not_fit_a_record_are_refused():
    """They have 20 bits: one more would end up in its neighbour."""
    largest = teacher_cache.MAX_VOCABULARY - 1
    record = record_type(2)
    packed = pack(record, np.array([[largest, 1]]), np.zeros(1, "f4"), logprobs=np.zeros((1, 2), "f4"))
    assert unpack(packed)["ids"].tolist() == [[largest, 1]]
    teacher_cache.check_vocabulary(teacher_cache.MAX_VOCABULARY)
    with pytest.raises(
        UserError, match=r"below 1,048,576, and these models share 1,048,577; leave --teacher_cache out"
    ):
        teacher_cache.check_vocabulary(teacher_cache.MAX_VOCABULARY + 1)
