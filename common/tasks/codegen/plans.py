"""Plans of solutions that came without one, read off their syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Sequence


def steps_of(solution: str, entry_point: str | None = None) -> list[str]:
    """The steps of a solution in plain words, read off its syntax tree; inner steps are indented by two spaces.

    Args:
        entry_point: the function whose steps are told; None: the last one that is defined.
    """
    body = ast.parse(solution).body
    functions = [node for node in body if isinstance(node, ast.FunctionDef)]
    main = next((node for node in functions if node.name == entry_point), functions[-1] if functions else None)
    steps = []
    for node in body:
        if node is main:
            continue
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            steps.append(f"Write a helper {node.name}.")
        else:
            steps += _steps(node, "")
    return steps + (_block(main.body, "") if main else []) or ["Write the code."]


def _block(statements: Sequence[ast.stmt], indent: str) -> list[str]:
    return [step for statement in statements for step in _steps(statement, indent)]


def _steps(node: ast.stmt, indent: str) -> list[str]:
    """One statement as a step, and the steps inside it."""
    inner = indent + "  "
    say = ast.unparse
    match node:
        case ast.Import() | ast.ImportFrom():
            module = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
            text = f"Use the module {module}."
        case ast.Return(value=None):
            text = "Return."
        case ast.Return():
            text = f"Return {say(node.value)}."
        case ast.Assign():
            text = f"Set {' and '.join(map(say, node.targets))} to {say(node.value)}."
        case ast.AugAssign(op=ast.Add()):
            text = f"Add {say(node.value)} to {say(node.target)}."
        case ast.AugAssign(op=ast.Sub()):
            text = f"Subtract {say(node.value)} from {say(node.target)}."
        case ast.For():
            return [f"{indent}For each {say(node.target)} in {say(node.iter)}:", *_block(node.body, inner)]
        case ast.While():
            return [f"{indent}While {say(node.test)}:", *_block(node.body, inner)]
        case ast.If():
            otherwise = [f"{indent}Otherwise:", *_block(node.orelse, inner)] if node.orelse else []
            return [f"{indent}If {say(node.test)}:", *_block(node.body, inner), *otherwise]
        case ast.FunctionDef():
            return [f"{indent}Write a helper {node.name}({say(node.args)}):", *_block(node.body, inner)]
        case ast.Expr(value=ast.Constant()) | ast.Pass():  # a docstring, or nothing
            return []
        case ast.Break():
            text = "Stop the loop."
        case ast.Continue():
            text = "Go on with the next one."
        case _:
            text = f"Do {say(node).splitlines()[0]}."
    return [indent + text]
