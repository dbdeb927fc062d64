"""What the compiler of the oldest supported Triton refuses, and the interpreter and newer compilers do not."""

import ast
from pathlib import Path

import pytest

import fastvit_kernels

PACKAGE = Path(fastvit_kernels.__file__).parent
# by operation: its kernels are a file or a folder
SOURCES = {
    path.parent.name: [path] if path.is_file() else sorted(path.glob("*.py"))
    for path in sorted([*PACKAGE.glob("*/kernels.py"), *PACKAGE.glob("*/kernels/")])
}


def is_none(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


@pytest.mark.parametrize("operation", SOURCES)
def test_none_is_given_back_by_a_bare_return_and_is_in_no_tuple(operation: str) -> None:
    """To Triton 3.6 `return None` and a None in a tuple, its own or a call's, are no tensors: an error."""
    nodes = [(path, node) for path in SOURCES[operation] for node in ast.walk(ast.parse(path.read_text()))]
    returns = {
        node.name: [n for n in ast.walk(node) if isinstance(n, ast.Return)]
        for _, node in nodes
        if isinstance(node, ast.FunctionDef)
    }
    give_none = {name for name, found in returns.items() if any(node.value is None for node in found)}
    assert not [node.lineno for found in returns.values() for node in found if is_none(node.value)]
    indices = [node.slice for _, node in nodes if isinstance(node, ast.Subscript)]  # x[:, None]
    for path, node in nodes:
        if isinstance(node, ast.Tuple) and node not in indices:
            called = {n.func.id for n in node.elts if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
            assert not called & give_none, f"{path}:{node.lineno}"
            assert not any(is_none(element) for element in node.elts), f"{path}:{node.lineno}"


def test_there_are_sources() -> None:
    assert set(SOURCES) >= {"attention", "cross_entropy", "gemm", "layer_norm", "patch_embed"}
    assert len(SOURCES["attention"]) > 1
