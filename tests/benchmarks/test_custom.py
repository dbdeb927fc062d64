import dataclasses
import re
from pathlib import Path

import pytest
import torch

from benchmarks import kernels
from benchmarks.custom import load, with_providers
from benchmarks.kernels import Effort, Selection, measure_case
from benchmarks.ops import all_ops
from benchmarks.registry import Case
from benchmarks.terminal import kernels_text, listing
from benchmarks.timing import Clock
from fastvit_engine.cli import main
from tests.benchmarks.test_kernels import CEILINGS

SOURCE = """
import torch.nn.functional as F

def norm(x, weight, bias):
    return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-6)

def off(x, weight, bias):
    return 1.02 * norm(x, weight, bias)

answer = 42
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    return path


def test_a_function_from_a_file_is_a_provider_like_the_others(source: Path, case: Case, environment: dict) -> None:
    ops = with_providers(all_ops(), ("layer_norm",), (f"{source}:norm", f"{source}:off"))
    (op,) = (op for op in ops if op.name == "layer_norm")
    chosen = [provider for provider in op.providers if provider.own or provider.name in ("fastvit", "eager")]
    case = dataclasses.replace(case, op=dataclasses.replace(op, providers=chosen))
    row = measure_case(case, Clock(torch.device("cpu")), CEILINGS, effort=Effort(rounds=3, seconds=1))
    rows = {provider["provider"]: provider for provider in row["providers"]}
    assert rows["mine.py:norm"]["status"] == "ok" and rows["mine.py:norm"]["passes"]["both"]["fastvit_times_as_fast"]
    assert rows["mine.py:off"]["status"] == "wrong" and "error of the" in rows["mine.py:off"]["reason"]
    assert set(row["best_peer"].values()) == {"eager"}  # a ratio to oneself is no peer's
    record = {"cases": [row, {"case": "x", "failed": "no memory"}], "unmeasured": ["y"], "environment": environment}
    text = kernels_text(record)
    assert "  mine.py:norm" in text and re.search("  mine.py:off +wrong\n", text) and "mine.py:off: wrong: " in text
    assert "  x: no memory\n  y: no time was left for it\n" in text and "no GPU" in text


@pytest.mark.parametrize(
    "ops, place, message",
    [
        ((), "{}:norm", "name it with --ops, one of attention, "),
        (("adamw",), "{}:norm", "adamw updates its tensors in place"),
        (("layer_norm",), "{}", "give a file and a function in it, FILE.py:FUNCTION"),
        (("layer_norm",), "{}x.py:norm", "there is no file "),
        (("layer_norm",), "{}:nrom", "has no function nrom; it has norm, off"),
        (("layer_norm",), "{}:answer", "has no function answer; it has norm, off"),
    ],
)
def test_what_cannot_be_a_provider_is_refused_before_anything_runs(
    source: Path, ops: tuple[str, ...], place: str, message: str
) -> None:
    with pytest.raises(ValueError) as caught:
        kernels.select(Selection(quick=True, ops=ops, own=(place.format(source),)), torch.device("cpu"))
    assert message in str(caught.value)


def test_a_file_that_does_not_load_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "broken.py"
    path.write_text("import no_such_package")
    with pytest.raises(ValueError, match="cannot be imported: ModuleNotFoundError: No module named 'no_such_package'"):
        load(f"{path}:norm")
    assert main(["bench", "kernels", "--quick", "--ops", "layer_norm", "--provider", f"{path}:norm"]) == 2
    assert "fastvit bench kernels: --provider" in capsys.readouterr().err
    script = tmp_path / "script.py"
    script.write_text("raise SystemExit('usage: script.py')")
    with pytest.raises(ValueError, match="cannot be imported: SystemExit: usage: script.py"):
        load(f"{script}:norm")


def test_a_file_runs_once_for_all_its_functions(source: Path) -> None:
    assert load(f"{source}:norm").__globals__ is load(f"{source}:off").__globals__


def test_a_kernel_of_ones_own_is_asked_for_whatever_peers_are(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "measure_ceilings", lambda *_: CEILINGS)
    monkeypatch.setattr(kernels, "effort", lambda *_: Effort(rounds=2, seconds=0.1))
    selection = Selection(
        quick=True, ops=("layer_norm",), models=("tiny/14@56",), providers=("eager",), own=(f"{source}:norm",)
    )
    found: list[dict] = []
    kernels.measure_all(selection, kernels.Progress(), float("inf"), found.append)
    (case,) = (entry["case"] for entry in found if "case" in entry)
    assert {row["provider"] for row in case["providers"] if row["status"] == "ok"} == {"eager", "mine.py:norm"}


def test_the_list_names_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels", "--list", "--quick"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n{op.name} " in text for op in all_ops()) and "tiny/14@56" in text
    assert max(map(len, text.splitlines())) <= 80
    assert "'sdpa flash'" in text and "'compile max-autotune'" in text  # no line breaks inside a name
    assert "x [4, 17, 160], weight [160], bias" in listing(all_ops(), (), ("layer_norm",))
    assert main(["bench", "kernels", "--list", "--ops", "atention"]) == 2
    assert "there is no operation 'atention'" in capsys.readouterr().err
