"""What the compiler of the oldest supported Triton refuses, and the interpreter and newer compilers do not."""

import ast
from pathlib import Path

import pytest

import fastvit_kernels

SOURCES = sorted(Path(fastvit_kernels.__file__).parent.glob("*/kernels.py"))


def is_none(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.parent.name)
def test_none_is_given_back_by_a_bare_return_and_is_in_no_tuple(path: Path) -> None:
    """To Triton 3.6 `return None` and a None in a tuple, its own or a call's, are no tensors: an error."""
    tree = ast.parse(path.read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    returns = {function.name: [n for n in ast.walk(function) if isinstance(n, ast.Return)] for function in functions}
    give_none = {name for name, found in returns.items() if any(node.value is None for node in found)}
    assert not [node.lineno for found in returns.values() for node in found if is_none(node.value)]
    indices = [node.slice for node in ast.walk(tree) if isinstance(node, ast.Subscript)]  # x[:, None]
    for node in ast.walk(tree):
        if isinstance(node, ast.Tuple) and node not in indices:
            called = {n.func.id for n in node.elts if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
            assert not called & give_none, f"{path}:{node.lineno}"
            assert not any(is_none(element) for element in node.elts), f"{path}:{node.lineno}"


def test_there_are_sources() -> None:
    assert SOURCES
