"""Training rows as the model will see them, and how many tokens they are: what `--dry_run` shows of a file.

What is learnt is in colour on a terminal, unless NO_COLOR is set (no-color.org), else between marks.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from common.cli import UserError
from common.data.training_files import Inspection
from common.models import chats, tokenizers
from common.models.tokenizers import Encoded
from common.training import batches

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN_ROWS, SHOWN_CHARACTERS = 3, 600  # of a file; of a run of text, from both its ends
READ, LEARNT, REJECTED = "read", "learnt", "rejected"
COLOURS = {READ: "\x1b[2m", LEARNT: "\x1b[1;32m", REJECTED: "\x1b[31m"}
MARKS = {READ: ("", ""), LEARNT: ("[+", "+]"), REJECTED: ("[-", "-]")}
RESET = "\x1b[0m"

Row = dict[str, Any]


@dataclass(frozen=True)
class Side:
    """A prompt with an answer to it; a preference has two of them.

    Attributes:
        answer: None where the student will write it.
        kind: LEARNT or REJECTED.
    """

    prompt: chats.Prompt
    answer: str | None
    kind: str = LEARNT

    def encode(self, tokenizer: PreTrainedTokenizerBase) -> Encoded:
        """Its token ids, however many they are."""
        if self.answer is not None:
            return chats.encode(tokenizer, self.prompt, self.answer)
        ids = chats.encode_prompt(tokenizer, self.prompt)
        return Encoded(ids, len(ids))

    def words(self) -> Iterator[tuple[str, str]]:
        """(kind, text) of its turns, without a template."""
        for turn in chats.as_turns(self.prompt):
            learnt = turn["role"] == "assistant" and turn.get("weight") != 0
            yield READ, f"{turn['role']}: "
            yield LEARNT if learnt else READ, turn["content"]
            yield READ, "\n"
        yield READ, "assistant: "
        yield self.kind, self.answer or "..."


def completion_sides(row: Row) -> list[Side]:
    """Of {"input", "output"}; without an output the student will write one."""
    return [Side(row["input"], row.get("output"))]


def pair_sides(row: Row) -> list[Side]:
    """Of {"prompt", "chosen", "rejected"}."""
    return [Side(row["prompt"], row["chosen"]), Side(row["prompt"], row["rejected"], REJECTED)]


@dataclass(frozen=True)
class Limit:
    """How long a row may be.

    Attributes:
        max_len: tokens of prompt and answer.
        whole: a row that is longer is left out, never cut.
        reserved: tokens of an answer that the student will write.
    """

    max_len: int
    whole: bool
    reserved: int = 0

    def fits(self, sides: Sequence[Encoded]) -> bool:
        """Whether the sides of a row are short enough as they are."""
        return all(len(side.input_ids) <= self.max_len - self.reserved for side in sides)

    def fit(self, tokenizer: PreTrainedTokenizerBase, side: Side) -> Encoded | None:
        """A side made short enough, as the trainers do; None where it is left out."""
        if side.answer is not None:
            return batches.fit_row(tokenizer, side.prompt, side.answer, self.max_len, self.whole)[0]
        ids = None if self.whole else chats.shortened_ids(tokenizer, side.prompt, self.max_len - self.reserved)
        return Encoded(ids, len(ids)) if ids else None


@dataclass
class Part:
    """A file's rows under a tokenizer.

    Attributes:
        name: what they are for.
        path: of the file, or a data set's name.
        rows: as the trainers read them.
        inspection: what was found out in reading; None of what has no rows of its own.
        encoded: the sides of each row that fits, as token ids.
        lengths, learnt: tokens of every row, before anything is cut, and how many of them are learnt.
        cut, left_out: numbers of rows, from 1.
    """

    name: str
    path: str
    rows: Sequence[Row]
    inspection: Inspection | None = None
    encoded: list[list[Encoded]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    learnt: list[int] = field(default_factory=list)
    cut: list[int] = field(default_factory=list)
    left_out: list[int] = field(default_factory=list)

    def encode(self, tokenizer: PreTrainedTokenizerBase, sides_of: Callable[[Row], list[Side]], limit: Limit) -> None:
        """Fill in what the tokenizer makes of the rows."""
        for number, row in enumerate(self.rows, start=1):
            if "text" in row:  # running text has no prompts, and is cut into windows
                windows = tokenizers.windows(tokenizer, row["text"], limit.max_len)
                self._add([[window] for window in windows])
                continue
            sides = sides_of(row)
            try:
                whole = [side.encode(tokenizer) for side in sides]
            except UserError as error:
                raise UserError(f"{self.path}, row {number}: {error}") from error
            self._add([whole], limit.fits)
            if not limit.fits(whole):
                fitted = [limit.fit(tokenizer, side) for side in sides]
                (self.left_out if None in fitted else self.cut).append(number)
                self.encoded += [[side for side in fitted if side]] if None not in fitted else []

    def _add(self, rows: list[list[Encoded]], fits: Callable[[list[Encoded]], bool] = lambda row: True) -> None:
        for row in rows:
            self.lengths.append(max(len(side.input_ids) for side in row))
            self.learnt.append(sum(len(side.learnt) for side in row))
            if fits(row):
                self.encoded.append(row)


def shown_tokens(part: Part, tokenizer: PreTrainedTokenizerBase, colours: bool) -> list[str]:
    """The first rows that fit, as token ids turned back into text."""
    lines = []
    for number, row in enumerate(part.encoded[:SHOWN_ROWS], start=1):
        kinds = [LEARNT] if len(row) == 1 else [LEARNT, REJECTED]
        for kind, side in zip(kinds, row, strict=True):
            runs, learnt = [], set(side.learnt)
            for position, token in enumerate(side.input_ids):
                now = kind if position in learnt else READ
                runs = runs if runs and runs[-1][0] == now else [*runs, (now, [])]
                runs[-1][1].append(token)
            head = f"row {number}{', rejected' if kind == REJECTED else ''}: {len(side.input_ids):,} tokens"
            lines.append(f"--- {head}, {len(learnt):,} {kind} ---")
            lines += [painted([(now, tokenizer.decode(ids)) for now, ids in runs], colours), ""]
    return lines + legend(part, colours)


def shown_words(part: Part, sides_of: Callable[[Row], list[Side]], colours: bool) -> list[str]:
    """The first rows as they are, without a model's template."""
    lines = []
    for number, row in enumerate(part.rows[:SHOWN_ROWS], start=1):
        pieces = [[(LEARNT, row["text"])]] if "text" in row else [list(side.words()) for side in sides_of(row)]
        for side in pieces:
            lines += [f"--- row {number} ---", painted(side, colours), ""]
    return lines + legend(part, colours)


def legend(part: Part, colours: bool) -> list[str]:
    """What the marks mean."""
    kinds = [LEARNT, *([REJECTED] if part.rows and "rejected" in part.rows[0] else [])]
    return [", ".join(painted([(kind, kind)], colours) for kind in kinds) + ", the rest is read"]


def in_colour() -> bool:
    """Whether the results go to a terminal that may be coloured."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def painted(runs: Sequence[tuple[str, str]], colours: bool) -> str:
    """Runs of text, those that are learnt in colour or between marks; a long one without its middle."""
    text = ""
    for kind, run in runs:
        if len(run) > 2 * SHOWN_CHARACTERS:
            left = len(run) - 2 * SHOWN_CHARACTERS
            run = f"{run[:SHOWN_CHARACTERS]} ... {left:,} characters ... {run[-SHOWN_CHARACTERS:]}"
        # what a terminal would obey is shown, not sent to it
        run = "".join(mark if mark.isprintable() or mark == "\n" else repr(mark)[1:-1] for mark in run)
        opening, closing = (COLOURS[kind], RESET) if colours else MARKS[kind]
        text += f"{opening}{run}{closing}"
    return text
