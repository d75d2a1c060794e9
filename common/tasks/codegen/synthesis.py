"""Made-up programming problems: families of small Python functions with their plans and tests, for the offline demo.

A problem is a family, its parameters (constants, operators, words), a random function name and one of several
phrasings. The name and the parameters stand in the prompt alone, so a model has to read them there. All problems of one
family with the same parameters are one group, whatever their names and phrasings: what is held out is a combination
that no training row has.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from common.data import splits

FRAMES = (
    "Write a function {call} that returns {what}.",
    "Define {call}. It returns {what}.",
    "Implement {call}: return {what}.",
)
TESTS = 5
VERBS = (
    "add", "bind", "call", "draw", "fetch", "fill", "get", "hold", "load", "look",
    "make", "mark", "move", "open", "pull", "push", "read", "run", "send", "set", "show",
)  # fmt: skip
NOUNS = (
    "batch", "bill", "card", "chart", "clip", "desk", "form", "frame", "game", "goal",
    "grid", "hint", "icon", "job", "lamp", "lane", "link", "menu", "node", "note",
)  # fmt: skip
WORDS = (
    "red", "blue", "low", "high", "yes", "no", "old", "new", "hot", "cold", "left", "right", "up", "down", "in", "out",
)  # fmt: skip
LETTERS = "abcdefghiklmnoprst"


@dataclass(frozen=True)
class Choice:
    """One value of a parameter: how a prompt says it and how code writes it."""

    said: str
    code: str


@dataclass(frozen=True)
class Family:
    """A kind of function. `{slot}` in the texts stands for a parameter, `{slot.code}` for its code.

    Attributes:
        arguments: parameter list of the function.
        whats: what it returns, in several wordings that follow "returns".
        plan: the steps, in words.
        body: the lines of the function.
        slots: the possible values of each parameter.
        inputs: draws one call's arguments, given the numbers among the parameters.
    """

    name: str
    arguments: str
    whats: tuple[str, ...]
    plan: tuple[str, ...]
    body: tuple[str, ...]
    slots: dict[str, Sequence[Choice]]
    inputs: Callable[[random.Random, Sequence[int]], tuple]


def numbers(first: int, last: int) -> list[Choice]:
    """Whole numbers, both ends included."""
    return [Choice(str(n), str(n)) for n in range(first, last + 1)]


def words(values: Sequence[str]) -> list[Choice]:
    """Texts that code writes in quotes."""
    return [Choice(f"'{value}'", f"'{value}'") for value in values]


def named(**codes: str) -> list[Choice]:
    """Values whose name is a phrase, with `_` for a space."""
    return [Choice(said.replace("_", " "), code) for said, code in codes.items()]


COMPARE = named(greater_than=">", less_than="<", at_least=">=", at_most="<=")
ENDS = named(largest="reverse=True", smallest="reverse=False")


def _integer(rng: random.Random, near: Sequence[int], low: int, high: int) -> int:
    """In every other draw one of `near` or its neighbours, where off-by-one shows; else anything in the range."""
    if near and rng.random() < 0.5:
        return rng.choice(near) + rng.randint(-1, 1)
    return rng.randint(low, high)


def _list(rng: random.Random, near: Sequence[int], size: int) -> list[int]:
    return [_integer(rng, near, -10, 45) for _ in range(size)]


def _values(rng: random.Random, near: Sequence[int]) -> tuple:
    return (_list(rng, near, rng.randint(8, 12)),)


def _long_values(rng: random.Random, near: Sequence[int]) -> tuple:
    return ([rng.randint(0, 99) for _ in range(rng.randint(22, 25))],)


def _few_values(rng: random.Random, near: Sequence[int]) -> tuple:
    return (_list(rng, near, rng.randint(1, 2)),)


def _number(rng: random.Random, near: Sequence[int]) -> tuple:
    return (_integer(rng, near, -10, 60),)


def _large_number(rng: random.Random, near: Sequence[int]) -> tuple:
    return (_integer(rng, near, 0, 9999),)


def _natural(rng: random.Random, near: Sequence[int]) -> tuple:
    return (rng.randint(1, 9999),)


def _text(rng: random.Random, near: Sequence[int]) -> tuple:
    words = ("".join(rng.choices(LETTERS, k=max(1, _integer(rng, near, 1, 10)))) for _ in range(rng.randint(4, 7)))
    return (" ".join(rng.choice((word, word.title())) for word in words),)


def _table(rng: random.Random, near: Sequence[int]) -> tuple:
    return ({word: _integer(rng, near, -10, 45) for word in rng.sample(WORDS, 10)},)


def _rows(rng: random.Random, near: Sequence[int]) -> tuple:
    return ([[rng.randint(-9, 99) for _ in range(8)] for _ in range(rng.randint(3, 5))],)


def _two_lists(rng: random.Random, near: Sequence[int]) -> tuple:
    return _list(rng, near, 8), _list(rng, near, 8)


FAMILIES = (
    Family(
        "keep",
        "values",
        ("the items of values that are {compare} {k}", "a list of those values which are {compare} {k}"),
        ("Go through values.", "Keep each one that is {compare} {k}.", "Return the list."),
        ("return [value for value in values if value {compare.code} {k.code}]",),
        {"compare": COMPARE, "k": numbers(2, 30)},
        _values,
    ),
    Family(
        "count",
        "values",
        ("how many items of values are {compare} {k}", "the count of values {compare} {k}"),
        ("Go through values.", "Count each one that is {compare} {k}.", "Return the count."),
        ("return sum(1 for value in values if value {compare.code} {k.code})",),
        {"compare": COMPARE, "k": numbers(2, 30)},
        _values,
    ),
    Family(
        "quantify",
        "values",
        ("True if {which} item of values is {compare} {k}, else False", "whether {which} value is {compare} {k}"),
        ("Go through values.", "Check whether {which} one is {compare} {k}.", "Return True or False."),
        ("return {which.code}(value {compare.code} {k.code} for value in values)",),
        {"which": named(any="any", every="all"), "compare": COMPARE, "k": numbers(2, 30)},
        _few_values,
    ),
    Family(
        "change",
        "values",
        ("the list of values with each one {change} {k}", "values, each {change} {k}"),
        ("Go through values.", "Make each one {change} {k}.", "Return the list."),
        ("return [value {change.code} {k.code} for value in values]",),
        {"change": named(plus="+", minus="-", times="*"), "k": numbers(2, 30)},
        _values,
    ),
    Family(
        "total",
        "values",
        ("the sum of values after each is {change} {k}", "the total of each value {change} {k}"),
        ("Make each value {change} {k}.", "Add them up.", "Return the sum."),
        ("return sum(value {change.code} {k.code} for value in values)",),
        {"change": named(plus="+", minus="-", times="*"), "k": numbers(2, 30)},
        _values,
    ),
    Family(
        "part",
        "values",
        ("{part} {k} items of values", "a list with {part} {k} of values"),
        ("Slice values.", "Take {part} {k} items.", "Return the slice."),
        ("count = {k.code}", "return {part.code}"),
        {
            "part": named(
                the_first="values[:count]",
                the_last="values[-count:]",
                all_but_the_first="values[count:]",
                all_but_the_last="values[:-count]",
            ),
            "k": numbers(1, 20),
        },
        _long_values,
    ),
    Family(
        "step",
        "values",
        ("every item of values at step {k} from index {start}", "values from index {start} on with step {k}"),
        ("Slice values from index {start}.", "Use step {k}.", "Return the slice."),
        ("return values[{start.code}::{k.code}]",),
        {"start": numbers(0, 9), "k": numbers(2, 7)},
        _long_values,
    ),
    Family(
        "top",
        "values",
        ("the {k} {end} items of values, {end} first", "a list of the {k} {end} values, {end} first"),
        ("Sort values with the {end} first.", "Take {k} of them.", "Return the list."),
        ("ordered = sorted(values, {end.code})", "return ordered[:{k.code}]"),
        {"end": ENDS, "k": numbers(1, 20)},
        _long_values,
    ),
    Family(
        "remainder",
        "values",
        (
            "the items of values that leave remainder {r} when divided by {k}",
            "a list of values whose remainder by {k} is {r}",
        ),
        ("Go through values.", "Keep each one whose remainder by {k} is {r}.", "Return the list."),
        ("return [value for value in values if value % {k.code} == {r.code}]",),
        {"r": numbers(0, 4), "k": numbers(5, 15)},
        _values,
    ),
    Family(
        "clamp",
        "number",
        ("number limited to the range {low} to {high}", "number, but at least {low} and at most {high}"),
        ("Take the smaller of number and {high}.", "Take the larger of that and {low}.", "Return it."),
        ("return max({low.code}, min({high.code}, number))",),
        {"low": numbers(2, 15), "high": numbers(20, 40)},
        _number,
    ),
    Family(
        "line",
        "number",
        ("{a} times number {change} {b}", "number times {a}, {change} {b}"),
        ("Multiply number by {a}.", "Make it {change} {b}.", "Return it."),
        ("return {a.code} * number {change.code} {b.code}",),
        {"a": numbers(2, 30), "change": named(plus="+", minus="-"), "b": numbers(2, 30)},
        _number,
    ),
    Family(
        "choose",
        "number",
        ("{one} if number is {compare} {k}, otherwise {other}", "{one} for number {compare} {k}, else {other}"),
        ("Compare number with {k}.", "If it is {compare} {k}, return {one}.", "Otherwise return {other}."),
        ("if number {compare.code} {k.code}:", "    return {one.code}", "return {other.code}"),
        {"one": words(WORDS), "compare": COMPARE, "k": numbers(2, 30), "other": words(WORDS[::-1])},
        _number,
    ),
    Family(
        "repeat",
        "text",
        ("text repeated {k} times with {mark} between", "{k} copies of text joined by {mark}"),
        ("Make a list of {k} copies of text.", "Join them with {mark}.", "Return the result."),
        ("return {mark.code}.join([text] * {k.code})",),
        {"k": numbers(2, 9), "mark": words(WORDS)},
        _text,
    ),
    Family(
        "replace",
        "text",
        ("text with each {old} replaced by {new}", "text after changing every {old} to {new}"),
        ("Replace each {old} in text with {new}.", "Return the result."),
        ("return text.replace({old.code}, {new.code})",),
        {"old": words(LETTERS), "new": words("xyzwqj")},
        _text,
    ),
    Family(
        "tally",
        "text",
        ("{k} times the count of {letter} in text", "how often {letter} is in text, times {k}"),
        ("Count {letter} in text.", "Multiply by {k}.", "Return it."),
        ("return {k.code} * text.count({letter.code})",),
        {"k": numbers(2, 9), "letter": words(LETTERS)},
        _text,
    ),
    Family(
        "wrap",
        "text",
        ("text between {before} and {after}", "{before}, then text, then {after}"),
        ("Start with {before}.", "Add text.", "Add {after} and return it."),
        ("return {before.code} + text + {after.code}",),
        {"before": words(WORDS), "after": words(WORDS)},
        _text,
    ),
    Family(
        "long_words",
        "text",
        ("the words of text with {compare} {k} letters", "a list of words in text that have {compare} {k} letters"),
        ("Split text into words.", "Keep each one with {compare} {k} letters.", "Return the list."),
        ("return [word for word in text.split() if len(word) {compare.code} {k.code}]",),
        {"compare": [*COMPARE, *named(exactly="==")], "k": numbers(2, 9)},
        _text,
    ),
    Family(
        "case",
        "text",
        ("{part} {k} letters of text in {case} case", "{part} {k} characters of text, {case} case"),
        ("Slice text.", "Take {part} {k} letters.", "Return them in {case} case."),
        ("count = {k.code}", "part = {part.code}", "return part.{case.code}()"),
        {
            "part": named(the_first="text[:count]", the_last="text[-count:]"),
            "k": numbers(1, 15),
            "case": named(upper="upper", lower="lower", title="title"),
        },
        _text,
    ),
    Family(
        "without",
        "text",
        ("text without the letters {a} and {b}", "text with every {a} and {b} removed"),
        ("Go through the letters of text.", "Leave out {a} and {b}.", "Join the rest and return it."),
        ("return ''.join(letter for letter in text if letter not in ({a.code}, {b.code}))",),
        {"a": words(LETTERS[::2]), "b": words(LETTERS[1::2])},
        _text,
    ),
    Family(
        "lookup",
        "table",
        ("the entry of table for {key}, or {k} if there is none", "what table has under {key}, else {k}"),
        ("Look up {key} in table.", "If it is missing, use {k}.", "Return it."),
        ("return table.get({key.code}, {k.code})",),
        {"key": words(WORDS), "k": numbers(2, 30)},
        _table,
    ),
    Family(
        "entries",
        "table",
        ("the entries of table whose value is {compare} {k}", "a dict of the items in table with value {compare} {k}"),
        ("Go through the items of table.", "Keep those with value {compare} {k}.", "Return the dict."),
        ("return {key: value for key, value in table.items() if value {compare.code} {k.code}}",),
        {"compare": COMPARE, "k": numbers(2, 30)},
        _table,
    ),
    Family(
        "fold",
        "values",
        ("the result of starting at {k} and {fold} each of values", "{k} after {fold} each one of values"),
        ("Start with {k}.", "Go through values, {fold} each.", "Return the result."),
        ("result = {k.code}", "for value in values:", "    result {fold.code} value", "return result"),
        {"k": numbers(2, 40), "fold": named(adding="+=", subtracting="-=")},
        _values,
    ),
    Family(
        "stretch",
        "number",
        ("the numbers from {start} up to number in steps of {k}", "a list from {start} to number with step {k}"),
        ("Count from {start} in steps of {k}.", "Stop after number.", "Return the list."),
        ("return list(range({start.code}, number + 1, {k.code}))",),
        {"start": numbers(1, 20), "k": numbers(2, 9)},
        _number,
    ),
    Family(
        "pick",
        "values",
        ("the item of values at index {i} {change} the one at index {j}", "item {i} of values {change} item {j}"),
        ("Take values at index {i}.", "Make it {change} the item at index {j}.", "Return it."),
        ("return values[{i.code}] {change.code} values[{j.code}]",),
        {"i": numbers(0, 9), "change": named(plus="+", minus="-", times="*"), "j": numbers(10, 19)},
        _long_values,
    ),
    Family(
        "halve",
        "number",
        (
            "how often number can be divided by {k} until it is below {low}",
            "the count of divisions by {k} until number is below {low}",
        ),
        (
            "Start with a count of 0.",
            "While number is at least {low}, divide it by {k} and count.",
            "Return the count.",
        ),
        ("count = 0", "while number >= {low.code}:", "    number //= {k.code}", "    count += 1", "return count"),
        {"k": numbers(2, 9), "low": numbers(2, 20)},
        _large_number,
    ),
    Family(
        "digits",
        "number",
        ("{k} times the sum of the digits of number {change} {b}", "the digit sum of number times {k}, {change} {b}"),
        ("Add up the digits of number.", "Multiply by {k} and make it {change} {b}.", "Return it."),
        ("total = sum(int(digit) for digit in str(number))", "return {k.code} * total {change.code} {b.code}"),
        {"k": numbers(2, 9), "change": named(plus="+", minus="-"), "b": numbers(2, 30)},
        _natural,
    ),
    Family(
        "column",
        "rows",
        ("item {i} of each row {change} {k}", "a list of the item at index {i} in each row, {change} {k}"),
        ("Go through rows.", "Take the item at index {i} of each and make it {change} {k}.", "Return the list."),
        ("return [row[{i.code}] {change.code} {k.code} for row in rows]",),
        {"i": numbers(0, 7), "change": named(plus="+", minus="-", times="*"), "k": numbers(2, 20)},
        _rows,
    ),
    Family(
        "blend",
        "lefts, rights",
        ("the list of each left {change} {k} times its right", "each of lefts {change} {k} times the one in rights"),
        ("Go through lefts and rights together.", "Make each left {change} {k} times its right.", "Return the list."),
        ("return [left {change.code} {k.code} * right for left, right in zip(lefts, rights)]",),
        {"change": named(plus="+", minus="-"), "k": numbers(2, 40)},
        _two_lists,
    ),
    Family(
        "chunks",
        "values",
        (
            "values cut into lists of {k} items from index {start}",
            "a list of the parts of values, {k} items each, from index {start}",
        ),
        (
            "Go through the indices from {start} in steps of {k}.",
            "Slice {k} items at each.",
            "Return the list of slices.",
        ),
        ("size = {k.code}", "return [values[i:i + size] for i in range({start.code}, len(values), size)]"),
        {"k": numbers(2, 9), "start": numbers(0, 9)},
        _long_values,
    ),
)


def function_name(rng: random.Random) -> str:
    """A verb and a noun, which say nothing of what the function does: the name is in the prompt alone."""
    return f"{rng.choice(VERBS)}_{rng.choice(NOUNS)}"


def synthesize(count: int, seed: int) -> list[dict[str, Any]]:
    """`count` problems, families in turn: rows with `prompt`, `plan`, `solution`, `tests`, `entry_point` and `group`.

    The group is the hash of family and parameters; no two rows have the same prompt.
    """
    rng = random.Random(seed)
    rows: list[dict[str, Any]] = []
    prompts: set[str] = set()
    for family in itertools.cycle(FAMILIES):
        if len(rows) == count:
            return rows
        while (row := _problem(family, rng))["prompt"] in prompts:
            pass
        prompts.add(row["prompt"])
        rows.append(row)
    return rows


def _problem(family: Family, rng: random.Random) -> dict[str, Any]:
    chosen: dict[str, Choice] = {}
    for slot, choices in family.slots.items():  # no parameter twice: "'up' if number is above 3, else 'up'"
        chosen[slot] = rng.choice([choice for choice in choices if choice not in chosen.values()])
    name = function_name(rng)

    def fill(text: str) -> str:
        for slot, choice in chosen.items():
            text = text.replace(f"{{{slot}}}", choice.said).replace(f"{{{slot}.code}}", choice.code)
        return text

    call = f"{name}({family.arguments})"
    solution = "\n".join([f"def {call}:", *(f"    {fill(line)}" for line in family.body)])
    return {
        "prompt": rng.choice(FRAMES).format(call=call, what=fill(rng.choice(family.whats))),
        "plan": [fill(step) for step in family.plan],
        "solution": solution,
        "tests": _tests(solution, name, family, chosen, rng),
        "entry_point": name,
        "group": splits.group_hash("/".join([family.name, *(choice.code for choice in chosen.values())])),
    }


def _tests(solution: str, name: str, family: Family, chosen: dict[str, Choice], rng: random.Random) -> list[str]:
    """Asserts on drawn inputs that expect what `solution`, our own text, returns; no constant passes them all."""
    space: dict[str, Any] = {}
    exec(solution, space)
    near = [int(choice.code) for choice in chosen.values() if choice.code.isdigit()]
    tests: dict[str, str] = {}
    for _ in range(200):
        arguments = family.inputs(rng, near)
        shown = ", ".join(map(repr, arguments))
        expected = repr(space[name](*arguments))
        more_needed = TESTS - len(tests)
        if more_needed > 1 or len({*tests.values(), expected}) > 1:
            tests[shown] = expected
        if len(tests) == TESTS:
            break
    return [f"assert {name}({shown}) == {expected}" for shown, expected in tests.items()]
