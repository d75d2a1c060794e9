"""Forms as they arrive: in any pieces the same, and no larger in memory than a piece."""

from __future__ import annotations

import pytest

from common.web.app import Problem
from common.web.multipart import Form

BODY = (
    b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
    b'--b\r\nContent-Disposition: form-data; name="file"; filename="a \xc3\xa4.jsonl"\r\n'
    b"Content-Type: application/json\r\n\r\n" + (b'{"input": "--b"}\r\n--\r\n--c') * 3 + b"\r\n--b--\r\n"
)
CONTENT = (b'{"input": "--b"}\r\n--\r\n--c') * 3


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50, len(BODY)])
def test_the_same_in_any_pieces(size):
    pieces: list[bytes] = []
    form = Form(b"b", "file", pieces.append)
    for start in range(0, len(BODY), size):
        form.feed(BODY[start : start + size])
    assert b"".join(pieces) == CONTENT
    assert max(map(len, pieces)) <= max(size, 8)  # what has come goes on at once
    assert (form.fields, form.filename, form.complete) == ({"purpose": "fine-tune"}, "a ä.jsonl", True)


def test_what_follows_a_form_is_no_part_of_it_and_half_a_form_is_not_whole():
    form = Form(b"b", "file", lambda data: None)
    form.feed(BODY[:-6])
    assert not form.complete
    with pytest.raises(Problem, match="is no multipart/form-data"):
        Form(b"b", "file", lambda data: None).feed(b"--other\r\n")
