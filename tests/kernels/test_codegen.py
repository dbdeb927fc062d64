"""Every kernel compiles for every target at its production shapes, within the limits of the chips. Needs no GPU."""

import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from fastvit_kernels.tuning import codegen
from tests.in_full import IN_FULL

TARGETS = list(codegen.TARGETS) if IN_FULL else ["sm_90"]
COMMITTED = Path(__file__).parents[2] / "benchmarks" / "results" / "codegen"

pytestmark = [pytest.mark.codegen, pytest.mark.slow, pytest.mark.timeout(1800)]


def run(*command: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *command], env=environment, check=True, stdout=subprocess.PIPE
    ).stdout.decode()


@pytest.fixture(scope="session")
def tables(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command writes for the operations whose tests were selected, all at once, as they share kernels.

    It runs apart, as nothing compiles under the interpreter.
    """
    folder: Path = tmp_path_factory.mktemp("codegen")
    items = [item for item in request.session.items if item.path == Path(__file__) and hasattr(item, "callspec")]
    ops = {item.callspec.params["written"] for item in items if "written" in item.callspec.params}
    run("-m", "fastvit_kernels.tuning.codegen", "--output", str(folder), "--ops", *sorted(ops), "--targets", *TARGETS)
    return folder


@pytest.fixture(scope="module", params=codegen.op_names())
def written(request: pytest.FixtureRequest, tables: Path) -> Path:
    """The table of one operation."""
    return tables / f"{request.param}.md"


def rows(table: str) -> list[dict[str, Any]]:
    """The lines of a table, by the names of the fields of `Compiled`; numbers and truth values as such."""
    lines = [[cell.strip() for cell in line[1:-1].split("|")] for line in table.splitlines() if line.startswith("|")]
    columns = [title.replace(" ", "_") for title in lines[0]]
    types = {field.name: field.type for field in fields(codegen.Compiled)}
    convert = {int: int, str: str, bool: {"True": True, "False": False}.__getitem__}
    assert {*columns, "op"} == set(types)
    return [{name: convert[types[name]](cell) for name, cell in zip(columns, line, strict=True)} for line in lines[2:]]


def compiler(table: str) -> str:
    """The version of Triton that a table is by."""
    match = re.search(r"^Triton (\S+), compiled", table, re.MULTILINE)
    assert match is not None
    return match[1]


@pytest.fixture(scope="module")
def kernels(written: Path) -> list[dict[str, Any]]:
    return rows(written.read_text())


def test_every_target_is_compiled(kernels: list[dict[str, Any]]) -> None:
    assert {kernel["target"] for kernel in kernels} == set(TARGETS)
    assert all(kernel["registers"] > 0 for kernel in kernels)


def test_committed_tables_are_what_the_code_gives(written: Path) -> None:
    again = f"write it again by python -m fastvit_kernels.tuning.codegen --ops {written.stem}"
    fresh, committed = written.read_text(), (COMMITTED / written.name).read_text()
    if compiler(committed) != compiler(fresh):
        pytest.skip(f"{written.name} is by Triton {compiler(committed)}, here is {compiler(fresh)}: {again}")
    wanted = [row for row in rows(committed) if row["target"] in TARGETS]
    new = [row for row in rows(fresh) if row not in wanted]
    assert wanted == rows(fresh), f"{written.name} is out of date: {again}\nnew are {new}"
    assert committed == fresh or not IN_FULL, f"{written.name} has other words around its rows: {again}"


def test_nothing_spills_on_hopper(kernels: list[dict[str, Any]]) -> None:
    spilling = [k for k in kernels if k["target"] == "sm_90" and k["spill_stores"] + k["spill_loads"] > 0]
    assert not spilling


def test_matrix_products_overlap_on_hopper(kernels: list[dict[str, Any]]) -> None:
    """With other work; waits that follow every product would also show in a kernel of which ptxas says nothing."""
    assert not [k for k in kernels if k["serialised"] or k["waits"] >= k["matrix_instructions"] > 1]


def test_nothing_overwrites_what_a_matrix_product_reads(kernels: list[dict[str, Any]]) -> None:
    assert not [k for k in kernels if k["hazards"]]


def test_shared_memory_fits(kernels: list[dict[str, Any]]) -> None:
    assert not [k for k in kernels if k["shared_bytes"] > codegen.TARGETS[k["target"]].shared_limit]


def test_matrix_kernels_use_wgmma_on_hopper(kernels: list[dict[str, Any]]) -> None:
    matrix = [k for k in kernels if k["target"] == "sm_90" and k["is_matrix_kernel"]]
    assert not [k for k in matrix if k["matrix_instructions"] == 0]


def test_matrix_instructions_and_spills_are_seen() -> None:
    read = json.loads(run(str(Path(__file__).with_name("codegen_probe.py"))))
    for target in codegen.TARGETS:
        assert read[target]["matrix_instructions"] > 0
        assert read[target]["spill_stores"] == read[target]["stack_bytes"] == 0
    starved = read["few registers"]
    assert starved["registers"] <= 48
    assert min(starved["stack_bytes"], starved["spill_stores"], starved["spill_loads"]) > 0
