"""Every kernel compiles for every target at its production shapes, within the limits of the chips. Needs no GPU.

By default a sample is compiled, see `codegen_sample`. `make test-all` compiles all that the committed tables have.
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from fastvit_kernels.tuning import codegen
from tests.in_full import IN_FULL, only_in_full
from tests.kernels import codegen_sample

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "benchmarks" / "results" / "codegen"
SAMPLED = sorted({op for op, *_ in codegen_sample.ON_HOPPER})
Row = dict[str, Any]

pytestmark = [pytest.mark.codegen, pytest.mark.slow, pytest.mark.timeout(1800)]


def run(*command: str) -> str:
    """It runs apart, as nothing compiles under the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE
    ).stdout.decode()


@pytest.fixture(scope="session")
def sample() -> dict[str, Any]:
    result: dict[str, Any] = json.loads(run("tests.kernels.codegen_sample"))
    return result


@pytest.fixture(scope="session")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command writes, for all operations at once, as they share kernels."""
    folder: Path = tmp_path_factory.mktemp("codegen")
    run("fastvit_kernels.tuning.codegen", "--output", str(folder))
    return folder


@pytest.fixture(scope="session")
def kernels(request: pytest.FixtureRequest) -> list[Row]:
    """All that was compiled, as rows of tables."""
    if not IN_FULL:
        return request.getfixturevalue("sample")["first"]
    folder = request.getfixturevalue("tables")
    return [row for op in codegen.op_names() for row in rows(folder / f"{op}.md")]


def rows(path: Path) -> list[Row]:
    """The lines of an operation's table, by the names of the fields of `Compiled`; numbers and truth values as such."""
    table = path.read_text()
    lines = [[cell.strip() for cell in line[1:-1].split("|")] for line in table.splitlines() if line.startswith("|")]
    columns = [title.replace(" ", "_") for title in lines[0]]
    types = {field.name: field.type for field in fields(codegen.Compiled)}
    convert = {int: int, str: str, bool: {"True": True, "False": False}.__getitem__}
    assert {*columns, "op"} == set(types)
    return [
        {"op": path.stem} | {name: convert[types[name]](cell) for name, cell in zip(columns, line, strict=True)}
        for line in lines[2:]
    ]


@lru_cache
def committed() -> list[Row]:
    """The rows of all committed tables."""
    return [row for op in codegen.op_names() for row in rows(COMMITTED / f"{op}.md")]


def compiler(table: str) -> str:
    """The version of Triton that a table is by."""
    match = re.search(r"^Triton (\S+), compiled", table, re.MULTILINE)
    assert match is not None
    return match[1]


def by_place(kernels: list[Row], op: str) -> dict[tuple[str, ...], list[Row]]:
    """The rows of an operation by case, kernel and target; a case may launch a kernel more than once."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in kernels:
        if row["op"] == op:
            found.setdefault((row["case"], row["kernel"], row["target"]), []).append(row)
    return found


def test_the_sample_has_every_kernel_on_hopper_and_every_target(sample: dict[str, Any]) -> None:
    compiled = sample["first"]
    on_hopper = {row["kernel"] for row in compiled if row["target"] == "sm_90"}
    assert on_hopper == {row["kernel"] for row in committed() if row["target"] == "sm_90"}
    for target in codegen.TARGETS:
        ops = {row["op"] for row in compiled if row["target"] == target}
        assert ops == set(SAMPLED), target


def test_every_target_is_compiled(kernels: list[Row]) -> None:
    assert {kernel["target"] for kernel in kernels} == set(codegen.TARGETS)
    assert all(kernel["registers"] > 0 for kernel in kernels)


@pytest.mark.parametrize("op", codegen.op_names() if IN_FULL else SAMPLED)
def test_committed_tables_are_what_the_code_gives(op: str, kernels: list[Row]) -> None:
    again = f"write it again by python -m fastvit_kernels.tuning.codegen --ops {op}"
    by, here = compiler((COMMITTED / f"{op}.md").read_text()), codegen.triton.__version__
    if by != here:
        pytest.skip(f"{op}.md is by Triton {by}, here is {here}: {again}")
    fresh, wanted = by_place(kernels, op), by_place(committed(), op)
    assert fresh == {place: wanted[place] for place in fresh}, f"{op}.md is out of date: {again}"


@only_in_full
@pytest.mark.parametrize("op", codegen.op_names())
def test_committed_tables_are_whole(op: str, tables: Path) -> None:
    assert (COMMITTED / f"{op}.md").read_text() == (tables / f"{op}.md").read_text()


def test_nothing_spills_on_hopper(kernels: list[Row]) -> None:
    both = [k for k in [*kernels, *committed()] if k["target"] == "sm_90"]
    assert not [k for k in both if k["spill_stores"] + k["spill_loads"] > 0]


def test_matrix_products_overlap_on_hopper(kernels: list[Row]) -> None:
    """With other work; waits that follow every product would also show in a kernel of which ptxas says nothing."""
    assert not serialised([*kernels, *committed()])


def serialised(kernels: list[Row]) -> list[Row]:
    return [k for k in kernels if k["serialised"] or k["waits"] >= k["matrix_instructions"] > 1]


def test_nothing_overwrites_what_a_matrix_product_reads(kernels: list[Row]) -> None:
    assert not [k for k in [*kernels, *committed()] if k["hazards"]]


def test_shared_memory_fits(kernels: list[Row]) -> None:
    both = [*kernels, *committed()]
    assert not [k for k in both if k["shared_bytes"] > codegen.TARGETS[k["target"]].shared_limit]


def test_matrix_kernels_use_wgmma_on_hopper(kernels: list[Row]) -> None:
    matrix = [k for k in [*kernels, *committed()] if k["target"] == "sm_90" and k["is_matrix_kernel"]]
    assert not [k for k in matrix if k["matrix_instructions"] == 0]


@pytest.fixture
def _second_ptxas() -> None:
    if codegen_sample.second_ptxas() is None:
        pytest.skip("needs another assembler: pip install --no-deps --constraint constraints.txt nvidia-cuda-nvcc")


@pytest.mark.usefixtures("_second_ptxas")
def test_another_assembler_is_as_good(sample: dict[str, Any]) -> None:
    """A newer one than Triton's own, which is the one to try where a result is wrong."""
    launched = [(op, case) for op, cases in codegen_sample.SECOND.items() for case in cases]
    assert {(row["op"], row["case"]) for row in sample["second"]} == set(launched)
    check_second(sample["second"])


@only_in_full
@pytest.mark.usefixtures("_second_ptxas")
def test_another_assembler_is_as_good_for_all_of_attention() -> None:
    check_second(json.loads(run("tests.kernels.codegen_sample", "--attention"))["second"])


def check_second(kernels: list[Row]) -> None:
    assert all(k["matrix_instructions"] > 0 for k in kernels if k["is_matrix_kernel"])
    assert not serialised(kernels)
    assert not [k for k in kernels if k["hazards"]]
    assert not [k for k in kernels if k["spill_stores"] + k["spill_loads"] > 4]


def test_matrix_instructions_and_spills_are_seen(sample: dict[str, Any]) -> None:
    read = sample["probe"]
    for target in codegen.TARGETS:
        assert read[target]["matrix_instructions"] > 0
        assert read[target]["spill_stores"] == read[target]["stack_bytes"] == 0
    starved = read["few registers"]
    assert starved["registers"] <= 48
    assert min(starved["stack_bytes"], starved["spill_stores"], starved["spill_loads"]) > 0


@pytest.mark.parametrize(
    ("accumulator", "chained"), [("%zero", 0), ("%sum", 0), ("%first", 1)], ids=["nothing", "a loop's sum", "a product"]
)
def test_chained_products_are_counted(accumulator: str, chained: int) -> None:
    ttir = f"""
    %zero = arith.constant dense<0.0> : tensor<128x64xf32>
    %loop:2 = scf.for %i = %0 to %n step %1 iter_args(%sum = %zero, %other = %zero) -> (tensor<128x64xf32>) {{
      %first = tt.dot %a, %b, %zero : tensor<128x64xbf16> * tensor<64x64xbf16> -> tensor<128x64xf32>
      %second = tt.dot %c, %d, {accumulator} : tensor<128x16xbf16> * tensor<16x64xbf16> -> tensor<128x64xf32>
    """
    assert codegen.chained_products(ttir) == chained


def test_tables_are_written_when_the_reader_of_the_output_has_left(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As with `| head -1`."""
    kernel = codegen.Compiled(
        "gemm", "case", "kernel", "sm_90", 4, *[0] * (len(fields(codegen.Compiled)) - 6), is_matrix_kernel=False
    )
    monkeypatch.setattr(codegen, "compile_all", lambda ops, targets, jobs: ((op, [kernel]) for op in ops))
    monkeypatch.setattr(sys, "argv", ["codegen", "--ops", "gemm", "rotary", "--output", str(tmp_path / "new")])
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        codegen.main()
    assert [path.name for path in sorted((tmp_path / "new").iterdir())] == ["gemm.md", "rotary.md"]
