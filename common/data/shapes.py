"""The shapes that rows have, each known by its keys, and the row that the trainers read in place of it.

Whatever a file looks like, that is

    a completion  {"input": prompt, "output": answer}
    a preference  {"prompt": prompt, "chosen": answer, "rejected": answer}

A prompt is a text, or, where there is more than one question before the answer, turns (`common.data.turns`), whose
earlier answers are learnt, too, unless their weight is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from common.data import rows as records
from common.data import turns

COMPLETION, TEACHER, PREFERENCE, PROBABILITIES = "completion", "teacher", "preference", "probabilities"
PROMPT, TEXT = "prompt", "text"
SFT, KD, DPO, DISTILL = "sft_train.py", "kd_train.py", "dpo_train.py", "distill_train.py"
LABELS, ON_POLICY = f"{DISTILL} --labels", f"{DISTILL} --on_policy"
TAKES = {  # kinds of rows that each trainer takes, the first that a row is of
    SFT: (COMPLETION,),
    KD: (TEACHER, COMPLETION),
    DPO: (PREFERENCE,),
    DISTILL: (TEACHER, COMPLETION, TEXT),
    LABELS: (PROBABILITIES, COMPLETION),
    ON_POLICY: (TEACHER, COMPLETION, PROMPT),
}
TAKER = {  # of several the one that is named
    COMPLETION: SFT, TEACHER: KD, PREFERENCE: DPO, PROBABILITIES: LABELS, TEXT: f"{DISTILL} --ce 1", PROMPT: ON_POLICY
}  # fmt: skip

Row = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """A kind of row.

    Attributes:
        name: what a message calls it.
        kind: COMPLETION, TEACHER, PREFERENCE, PROBABILITIES, PROMPT or TEXT.
        keys: that a row of this shape has; by them it is known.
        read: a row to the keys that the trainers read. Raises ValueError with what is wrong.
        optional: keys that are read where they are there.
        nested: (a key that has an object, its keys that are read).
        example: a row, as JSON.
    """

    name: str
    kind: str
    keys: tuple[str, ...]
    read: Callable[[Row], Row]
    example: str
    optional: tuple[str, ...] = ()
    nested: tuple[str, tuple[str, ...]] | None = None

    def fits(self, row: Any) -> bool:
        """Whether a row has the shape's keys; what is null or empty counts as not there."""
        return isinstance(row, dict) and has(row, self.keys)


def has(row: Row, keys: Iterable[str]) -> bool:
    """Whether a row has something under each of the keys."""
    return all(row.get(key) not in (None, "") for key in keys)


def _texts(*keys: str) -> Callable[[Row], Row]:
    def read(row: Row) -> Row:
        if fault := records.row_fault(row, keys):
            raise ValueError(fault)
        return {keys[0]: row[keys[0]], **({"output": row[keys[1]]} if len(keys) > 1 else {})}

    return read


def _completion(prompt: str | list[turns.Turn], answer: str) -> Row:
    return {"input": prompt, "output": answer}


def _conversation(key: str) -> Callable[[Row], Row]:
    def read(row: Row) -> Row:
        return _completion(*turns.completion_of([*_system(row), *turns.of(row[key], key)]))

    return read


def _system(row: Row) -> list[turns.Turn]:
    """The system turn of a row that has its text under a key of its own."""
    text = row.get("system")
    if text is None or (isinstance(text, str) and not text.strip()):
        return []
    return turns.of_text(text, "system", turns.SYSTEM)


def _instructed(row: Row) -> list[turns.Turn]:
    """Alpaca's instruction and input as the turns of a prompt: the input follows after a blank line."""
    if fault := records.row_fault(row, ("instruction",)):
        raise ValueError(fault)
    given = row.get("input")
    if given is not None and not isinstance(given, str):
        raise ValueError("'input' must be a string")
    text = row["instruction"] + (f"\n\n{given}" if given and given.strip() else "")
    return [*_system(row), *turns.of_text(text, "input", turns.USER)]


def _alpaca(answer: str) -> Callable[[Row], Row]:
    def read(row: Row) -> Row:
        if fault := records.row_fault(row, (answer,)):
            raise ValueError(fault)
        return _completion(turns.prompt_of(_instructed(row)), row[answer])

    return read


def _prompt_completion(row: Row) -> Row:
    """TRL's; of turns, those of the completion are learnt."""
    prompt = turns.unlearnt(turns.of_text(row["prompt"], "prompt", turns.USER))
    completion = turns.of_text(row["completion"], "completion", turns.ASSISTANT)
    return _completion(*turns.completion_of([*prompt, *completion]))


def _openai_preference(row: Row) -> Row:
    given = row["input"]
    if not isinstance(given, dict) or "messages" not in given:
        raise ValueError("'input' must be an object with messages")
    asked = turns.of(given["messages"], "messages")
    return _pair(asked, row, ("preferred_output", "non_preferred_output"))


def _preference(row: Row) -> Row:
    """TRL's prompt, chosen and rejected, each a text or turns; the prompt may stand in the turns of both answers.

    Alpaca's and ShareGPT's preferences have a prompt of their own kind.
    """
    if row.get("instruction") is not None:
        asked = _instructed(row)
    else:
        key = next((key for key in ("prompt", "conversations", "messages") if row.get(key) is not None), None)
        asked = [*_system(row), *turns.of_text(row[key], key, turns.USER)] if key else []
    return _pair(asked, row, ("chosen", "rejected"))


def _pair(asked: Sequence[turns.Turn], row: Row, keys: tuple[str, str]) -> Row:
    """A preference of turns that were asked, and of two answers, which may hold the prompt, too."""
    sides = [turns.of_text(row[key], key, turns.ASSISTANT) for key in keys]
    for key, side in zip(keys, sides, strict=True):
        if side[-1]["role"] != turns.ASSISTANT:
            raise ValueError(f"the last turn of '{key}' is not the assistant's")
    before = [_spoken(side[:-1]) for side in sides]
    if before[0] != before[1]:
        raise ValueError(f"'{keys[0]}' and '{keys[1]}' differ before their last turn; one answer is compared")
    prompt = list(asked)
    if before[0]:
        spoken = _spoken(asked)
        questions = [turn for turn in before[0] if turn[0] == turns.USER]
        if spoken and spoken[-1] not in questions:
            raise ValueError(f"'{keys[0]}' begins with other turns than the prompt")
        again = range(len(spoken))  # from here on the prompt may stand in the answers again
        earlier = next((start for start in again if spoken[start:] == before[0][: len(spoken) - start]), 0)
        prompt = [*asked[:earlier], *sides[0][:-1]]
    if not prompt:
        raise ValueError("key 'prompt' is missing")
    chosen, rejected = (side[-1]["content"] for side in sides)
    if chosen == rejected:
        raise ValueError("the chosen and the rejected answer are the same")
    return {"prompt": turns.prompt_of(turns.unlearnt(prompt)), "chosen": chosen, "rejected": rejected}


def _spoken(said: Iterable[turns.Turn]) -> list[tuple[str, str]]:
    """Turns without their weights."""
    return [(turn["role"], turn["content"]) for turn in said]


def _asked(row: Row) -> Row:
    return {"input": turns.prompt_of(turns.unlearnt(turns.of_text(row["prompt"], "prompt", turns.USER)))}


def _as_it_is(row: Row) -> Row:
    return row


CHAT = '[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]'
SHAREGPT = '[{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]'
SHAPES = (  # a row is of the first that fits
    Shape(
        "OpenAI's preferences",
        PREFERENCE,
        ("input", "preferred_output", "non_preferred_output"),
        _openai_preference,
        '{"input": {"messages": [{"role": "user", "content": "Hi"}]}, "preferred_output": [{"role": "assistant", '
        '"content": "Hello"}], "non_preferred_output": [{"role": "assistant", "content": "What?"}]}',
        nested=("input", ("messages",)),
    ),
    Shape(
        "preferences",
        PREFERENCE,
        ("chosen", "rejected"),
        _preference,
        '{"prompt": "Hi", "chosen": "Hello", "rejected": "What?"}',
        ("prompt", "conversations", "messages", "instruction", "input", "system"),
    ),
    Shape(
        "Alpaca rows of a teacher",
        TEACHER,
        ("instruction", "teacher_output"),
        _alpaca("teacher_output"),
        '{"instruction": "Greet back.", "input": "Hi", "teacher_output": "Hello"}',
        ("input", "system", "output"),
    ),
    Shape(
        "a teacher's answers",
        TEACHER,
        records.KD_KEYS,
        _texts(*records.KD_KEYS),
        '{"input": "Hi", "teacher_output": "Hello"}',
        ("output", "probabilities"),
    ),
    Shape("chats", COMPLETION, ("messages",), _conversation("messages"), f'{{"messages": {CHAT}}}', ("system",)),
    Shape(
        "ShareGPT chats",
        COMPLETION,
        ("conversations",),
        _conversation("conversations"),
        f'{{"conversations": {SHAREGPT}}}',
        ("system",),
    ),
    Shape(
        "Alpaca rows",
        COMPLETION,
        ("instruction", "output"),
        _alpaca("output"),
        '{"instruction": "Greet back.", "input": "Hi", "output": "Hello"}',
        ("input", "system"),
    ),
    Shape(
        "prompts and completions",
        COMPLETION,
        ("prompt", "completion"),
        _prompt_completion,
        '{"prompt": "Hi", "completion": "Hello"}',
    ),
    Shape(
        "inputs and outputs",
        COMPLETION,
        records.SFT_KEYS,
        _texts(*records.SFT_KEYS),
        '{"input": "Hi", "output": "Hello"}',
    ),
    Shape(
        "label probabilities",
        PROBABILITIES,
        ("input", "probabilities"),
        _as_it_is,
        '{"input": "Hi", "probabilities": {"Good": 0.9, "Bad": 0.1}}',
        ("output", "teacher_output"),
    ),
    Shape("prompts", PROMPT, ("input",), _texts("input"), '{"input": "Hi"}'),
    Shape("prompts", PROMPT, ("prompt",), _asked, '{"prompt": "Hi"}'),
    Shape("running text", TEXT, ("text",), _texts("text"), '{"text": "Hi. Hello."}'),
)
UNPAIRED = ("prompt", "completion", "label")
OF_CODE = "code problems; codegen_prepare.py makes training rows of them"
ELSEWHERE = (  # rows that are trained on once they are prepared: (their keys, what they are)
    (("document", "fields"), "documents with their fields; idp_prepare.py makes training rows of them"),
    (("prompt", "solution"), OF_CODE),
    (("prompt", "canonical_solution"), OF_CODE),
    (("text", "code", "test_list"), OF_CODE),
    (("prompt", "code", "test_list"), OF_CODE),
    (("question", "answer"), "questions and answers; rename the keys to input and output (CreditMix's are for "
     "creditmix_prepare.py)"),
    (("text", "label"), "texts with labels; creditmix_prepare.py --task makes training rows of them"),
)  # fmt: skip


def shape_of(row: Any, kinds: Iterable[str] = tuple(TAKER)) -> Shape | None:
    """What a row is, by its keys: of the first of `kinds` that has a shape for it."""
    return next((shape for kind in kinds for shape in SHAPES if shape.kind == kind and shape.fits(row)), None)
