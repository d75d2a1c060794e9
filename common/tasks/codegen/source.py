"""Python source of functions: what it defines and what it lacks, without running it."""

from __future__ import annotations

import ast
import builtins
import re
import symtable
import textwrap
import warnings
from collections.abc import Sequence

DEFINITION = re.compile(r"^(?:async )?(?:def|class) +(\w+)|^(\w+) *= *lambda\b", re.MULTILINE)
BUILTINS = {*dir(builtins), "__name__", "__file__", "__doc__"}
NOT_PYTHON = (SyntaxError, ValueError, RecursionError, MemoryError)  # of the parser, the last of prose of 4,000 words


def parsed(code: str) -> ast.Module | None:
    """The syntax tree of a program; None where it is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(code)
    except NOT_PYTHON:
        return None


def defined_names(code: str) -> set[str]:
    """The functions and classes that a program defines at its top level, also one that does not compile."""
    return {match[1] or match[2] for match in DEFINITION.finditer(code)}


def bound_names(node: ast.AST) -> set[str]:
    """Every name that a statement binds, in functions and classes inside it too: imports, arguments, targets."""
    names: set[str] = set()
    for part in ast.walk(node):
        match part:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                names.add(name)
            case ast.arg(arg=name) | ast.ExceptHandler(name=str() as name) | ast.MatchAs(name=str() as name):
                names.add(name)
            case ast.MatchStar(name=str() as name) | ast.MatchMapping(rest=str() as name):
                names.add(name)
            case ast.Name(id=name, ctx=ast.Store() | ast.Del()):
                names.add(name)
            case ast.alias(name=name, asname=alias):
                names.add(alias or name.partition(".")[0])
    return names


def missing_names(code: str) -> set[str]:
    """The names that a program uses and nowhere binds: modules not imported, helpers not defined. A `*` hides none."""
    tree = parsed(code)
    if tree is None:
        return set()
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    bound = bound_names(tree)
    return set() if "*" in bound else used - bound - BUILTINS


def with_missing(code: str, others: Sequence[str]) -> str:
    """`code` behind those of `others`' definitions, imports and constants that it needs, and what these need.

    Args:
        others: other programs of the same answer, in its order.
    """
    offered: list[tuple[str, set[str]]] = []
    for other in others:
        tree = parsed(other)
        offered += [(_text(other, node), _provided(node)) for node in (tree.body if tree else ()) if _provided(node)]
    needed = missing_names(code)
    chosen: set[int] = set()
    defined = defined_names(code)
    while needed:
        new = [
            index
            for index, (_, names) in enumerate(offered)
            if index not in chosen and names & needed and not names & defined
        ]
        if not new:
            break
        for index in new:
            chosen.add(index)
            defined |= offered[index][1]
        needed = {name for index in new for name in missing_names(offered[index][0])} | (needed - defined)
        needed -= defined
    return _joined([offered[index][0] for index in sorted(chosen)], code) if chosen else code


def with_stub(task: str, code: str) -> str:
    """Code that completes a function stub, as a program: with the imports and helpers of the stub that it lacks.

    Where the answer is the body alone, it is put below the stub. Any other task's code stays as it is.
    """
    tree = parsed(task)
    last = tree.body[-1] if tree and tree.body else None
    if not isinstance(last, ast.FunctionDef) or not code.strip():
        return code
    if last.name not in defined_names(code) and not defined_names(code):
        stub = task.rstrip()
        for body in (code, textwrap.indent(textwrap.dedent(code), "    ")):
            whole = parsed(f"{stub}\n{body}")
            if whole and isinstance(whole.body[-1], ast.FunctionDef) and whole.body[-1].name == last.name:
                return f"{stub}\n{body}"
        return code
    own = parsed(code)
    if own is None:
        return code
    bound = {name for node in own.body for name in _provided(node)}
    lacking = [node for node in tree.body[:-1] if _provided(node) and not _provided(node) & bound]
    needed = missing_names(code)
    kept: list[str] = []
    for node in reversed(lacking):
        if _provided(node) & needed or "*" in _provided(node):
            kept.insert(0, _text(task, node))
            needed |= missing_names(kept[0])
    return _joined(kept, code) if kept else code


def without_usage(code: str) -> str:
    """A program without the statements at its top level that only use what it defines: calls, prints, tests.

    Kept are definitions, imports, constants, and what fills a name that the definitions read. Code that is nothing but
    such statements, or no Python, stays as it is.
    """
    tree = parsed(code)
    if tree is None or not any(isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Assign)
                               for node in tree.body):  # fmt: skip
        return code
    kept = _kept_statements(code, tree)
    if len(kept) == len(tree.body):
        return code
    return "\n".join(_text(code, node) for node in kept) if kept else code


def _kept_statements(code: str, tree: ast.Module) -> list[ast.stmt]:
    own = {name for node in tree.body if isinstance(node, DEFINITIONS) for name in [node.name]}
    modules = {name for node in tree.body if isinstance(node, IMPORTS) for name in bound_names(node)}
    keep = {index for index, node in enumerate(tree.body) if _is_definition(node, own, modules)}
    read = _globals_read(code)
    while True:  # what fills a name that is read, and the names that this reads in turn
        more = {
            index
            for index, node in enumerate(tree.body)
            if index not in keep and not _is_guard(node) and _changed(node) & read
        }
        if not more:
            return [tree.body[index] for index in sorted(keep)]
        keep |= more
        for index in more:
            read |= {part.id for part in ast.walk(tree.body[index]) if isinstance(part, ast.Name)}


DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
IMPORTS = (ast.Import, ast.ImportFrom)


def _is_definition(node: ast.stmt, own: set[str], modules: set[str]) -> bool:
    """A definition, an import, a constant, or a setting of a module (`sys.setrecursionlimit(...)`)."""
    if isinstance(node, (*DEFINITIONS, *IMPORTS)):
        return True
    loaded = {part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load)}
    calls = [part for part in ast.walk(node) if isinstance(part, ast.Call)]
    if isinstance(node, ast.Assign | ast.AnnAssign):
        value = node.value
        if value is None or isinstance(value, ast.Lambda) or not calls:
            return value is not None
        return not loaded & own and _is_plain(value)
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        function = node.value.func
        while isinstance(function, ast.Attribute):
            function = function.value
        return isinstance(function, ast.Name) and function.id in modules and not loaded & own
    if isinstance(node, ast.Try | ast.If) and not _is_guard(node):
        return any(isinstance(part, (*DEFINITIONS, *IMPORTS)) for part in ast.walk(node))
    return False


def _is_plain(value: ast.expr) -> bool:
    """Made of built-in containers and modules' functions, e.g. `defaultdict(int)`, not read from outside."""
    names = {part.func.id for part in ast.walk(value) if isinstance(part, ast.Call) and isinstance(part.func, ast.Name)}
    return not names & {"input", "open", "print", "eval", "exec"}


def _is_guard(node: ast.stmt) -> bool:
    """`if __name__ == "__main__":`"""
    return isinstance(node, ast.If) and any(
        isinstance(part, ast.Name) and part.id == "__name__" for part in ast.walk(node.test)
    )


def _changed(node: ast.stmt) -> set[str]:
    """The names that a statement binds, or whose objects it may change."""
    names = bound_names(node)
    for part in ast.walk(node):
        target = part.func if isinstance(part, ast.Call) else part
        if isinstance(target, ast.Attribute | ast.Subscript):
            while isinstance(target, ast.Attribute | ast.Subscript):
                target = target.value
            if isinstance(target, ast.Name) and (isinstance(part, ast.Call) or isinstance(part.ctx, ast.Store)):
                names.add(target.id)
    return names


def _globals_read(code: str) -> set[str]:
    """The global names that the functions and classes of a program read."""
    names: set[str] = set()

    def visit(table: symtable.SymbolTable) -> None:
        for child in table.get_children():
            names.update(symbol.get_name() for symbol in child.get_symbols()
                         if symbol.is_global() and symbol.is_referenced())  # fmt: skip
            visit(child)

    try:
        visit(symtable.symtable(code, "<answer>", "exec"))
    except (SyntaxError, ValueError):
        return set()
    return names


def _provided(node: ast.stmt) -> set[str]:
    """The names that a definition, an import or a constant gives a program; none for other statements."""
    if isinstance(node, DEFINITIONS):
        return {node.name}
    if isinstance(node, IMPORTS):
        return bound_names(node)
    if isinstance(node, ast.Assign | ast.AnnAssign) and not any(isinstance(part, ast.Call) for part in ast.walk(node)):
        return {part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}
    return set()


def _text(code: str, node: ast.stmt) -> str:
    """The lines of a statement, its decorators included; of several on one line its own part."""
    first = min([node.lineno, *(part.lineno for part in getattr(node, "decorator_list", ()))])
    lines = code.splitlines()[first - 1 : node.end_lineno]
    segment = ast.get_source_segment(code, node)
    return segment if len(lines) == 1 and segment else "\n".join(lines)


def _joined(parts: Sequence[str], code: str) -> str:
    """Statements before a program, imports close together."""
    head = ""
    for part in parts:
        close = part.startswith(("import ", "from ")) and head.splitlines()[-1:] != [""]
        head += part if not head else f"\n{part}" if close else f"\n\n\n{part}"
    return f"{head}\n\n\n{code}"


def inside_string(code: str) -> bool:
    """Whether the end of `code` lies inside a string that is still open."""
    quote, index = "", 0
    while index < len(code):
        if quote:
            if code[index] == "\\":
                index += 2
                continue
            if code[index] == "\n" and len(quote) == 1:
                quote = ""  # such a string ends with its line, closed or not
            elif code.startswith(quote, index):
                index += len(quote)
                quote = ""
                continue
        elif code[index] == "#":
            end = code.find("\n", index)
            index = len(code) if end < 0 else end
            continue
        elif code[index] in "\"'":
            quote = code[index] * 3 if code.startswith(code[index] * 3, index) else code[index]
            index += len(quote)
            continue
        index += 1
    return bool(quote)
