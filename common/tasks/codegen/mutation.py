"""Wrong solutions made from right ones: a small change at one place of the program text, the rest left as it is.

The classic operators of mutation testing (DeMillo, Lipton, Sayward 1978): comparison, arithmetic and logical operators
exchanged, constants off by one, conditions negated, arguments swapped, a function taken for its opposite. Whether a
mutant really is wrong, only its tests can say.
"""

from __future__ import annotations

import ast
import random
import re
from collections.abc import Iterator

OPERATORS: dict[type[ast.AST], tuple[str, tuple[str, ...]]] = {  # how it is written, and what it may become
    ast.Lt: ("<", ("<=", ">")),
    ast.LtE: ("<=", ("<", ">=")),
    ast.Gt: (">", (">=", "<")),
    ast.GtE: (">=", (">", "<=")),
    ast.Eq: ("==", ("!=",)),
    ast.NotEq: ("!=", ("==",)),
    ast.In: ("in", ("not in",)),
    ast.NotIn: (r"not\s+in", ("in",)),
    ast.Is: ("is", ("is not",)),
    ast.IsNot: (r"is\s+not", ("is",)),
    ast.Add: ("+", ("-",)),
    ast.Sub: ("-", ("+",)),
    ast.Mult: ("*", ("+",)),
    ast.Div: ("/", ("*", "//")),
    ast.FloorDiv: ("//", ("*", "%")),
    ast.Mod: ("%", ("//",)),
    ast.Pow: ("**", ("*",)),
    ast.BitAnd: ("&", ("|",)),
    ast.BitOr: ("|", ("&",)),
    ast.BitXor: ("^", ("|",)),
    ast.LShift: ("<<", (">>",)),
    ast.RShift: (">>", ("<<",)),
    ast.And: ("and", ("or",)),
    ast.Or: ("or", ("and",)),
}
PAIRS = (
    ("min", "max"),
    ("any", "all"),
    ("upper", "lower"),
    ("startswith", "endswith"),
    ("lstrip", "rstrip"),
    ("keys", "values"),
    ("union", "intersection"),
    ("nlargest", "nsmallest"),
    ("find", "rfind"),
    ("index", "count"),
    ("ceil", "floor"),
    ("islower", "isupper"),
)
OPPOSITES = dict(PAIRS) | {right: left for left, right in PAIRS}

CONSTANTS = ("True", "False", "0", "1", "''", "[]", "()")  # what a solution that does no work may return

Edit = tuple[int, int, str]  # first byte, byte after the last, new text


def mutants(source: str, seed: int = 0) -> list[str]:
    """All single changes of `source` that still compile, each another text, in a random order that `seed` decides.

    Those that return nothing come last: they teach little.
    """
    data = source.encode()
    unique = {}
    for start, end, text in _edits(source):
        mutant = (data[:start] + text.encode() + data[end:]).decode()
        if mutant != source and _compiles(mutant):
            unique[mutant] = None
    shuffled = random.Random(seed).sample(list(unique), len(unique))
    return sorted(shuffled, key=lambda mutant: mutant.count("return None") > source.count("return None"))


def _compiles(source: str) -> bool:
    try:
        ast.parse(source)
    except SyntaxError:
        return False
    return True


def _edits(source: str) -> Iterator[Edit]:
    data = source.encode()
    starts = [0]
    for line in data.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def span(node: ast.AST) -> tuple[int, int]:
        return starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset

    def text(node: ast.AST) -> str:
        start, end = span(node)
        return data[start:end].decode()

    def operator(left: ast.AST, right: ast.AST, kind: ast.AST) -> Iterator[Edit]:
        """The operator between two operands, exchanged."""
        written, others = OPERATORS.get(type(kind), ("", ()))
        start, end = span(left)[1], span(right)[0]
        pattern = written if written[:1].isalpha() else re.escape(written)
        match = re.search(pattern, data[start:end].decode())
        if match:
            for other in others:
                yield start + match.start(), start + match.end(), other

    for node in _outside_fstrings(ast.parse(source)):
        match node:
            case ast.Compare():
                for left, kind, right in zip([node.left, *node.comparators], node.ops, node.comparators, strict=False):
                    yield from operator(left, right, kind)
            case ast.BinOp():
                yield from operator(node.left, node.right, node.op)
            case ast.AugAssign():
                yield from operator(node.target, node.value, node.op)
            case ast.BoolOp():
                for left, right in zip(node.values, node.values[1:], strict=False):
                    yield from operator(left, right, node.op)
            case ast.Constant(value=bool()):
                yield *span(node), str(not node.value)
            case ast.Constant(value=int() | float()):
                for other in (node.value + 1, node.value - 1):
                    yield *span(node), repr(other) if other >= 0 else f"({other!r})"
            case ast.Constant(value=str()) if node.value:
                yield *span(node), repr(node.value[1:])
                yield *span(node), repr(node.value + node.value[-1])
            case ast.UnaryOp(op=ast.Not() | ast.USub()):
                yield *span(node), text(node.operand)
            case ast.If() | ast.While() | ast.IfExp():
                yield *span(node.test), f"not ({text(node.test)})"
            case ast.Call(args=[first, second]) if not isinstance(first, ast.Starred):
                yield span(first)[0], span(second)[1], f"{text(second)}, {text(first)}"
            case ast.Name() if node.id in OPPOSITES and isinstance(node.ctx, ast.Load):
                yield *span(node), OPPOSITES[node.id]
            case ast.Attribute() if node.attr in OPPOSITES and isinstance(node.ctx, ast.Load):
                end = span(node)[1]
                yield end - len(node.attr), end, OPPOSITES[node.attr]
            case ast.Return(value=ast.expr() as value) if not isinstance(value, ast.Constant):
                yield *span(value), "None"


def _outside_fstrings(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but docstrings and the parts of f-strings, whose places Python 3.11 does not tell right."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            continue
        yield node
        yield from _outside_fstrings(node)


def with_body(source: str, entry_point: str | None, body: str) -> str:
    """`source` with the body of every function replaced by one statement; only of `entry_point` where it is named."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == (entry_point or node.name):
            node.body = ast.parse(body).body
    return ast.unparse(tree)
