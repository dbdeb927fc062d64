"""Steps in FP8 beside those in bf16: what is compared, and what is said of the targets."""

import subprocess
import sys
from typing import Any

import pytest

from benchmarks import fp8_steps
from benchmarks.side_by_side import Measured
from tests.in_full import only_in_full


def measured(gpu: str | None = "NVIDIA H200", steps: int = 2000, ms: float = 64.0, loss: float = 2.0) -> dict[str, Any]:
    variants = {"bf16": Measured([2.0] * steps, [100.0] * steps), "fp8 tensor": Measured([loss] * steps, [ms] * steps)}
    found = {"environment": {"gpu": gpu}, "model": "H/14", "batch": 64}
    return found | {"variants": {name: vars(row) for name, row in variants.items()}}


def test_ratios_are_of_pairs_and_losses_of_the_same_steps():
    found = measured()
    found["variants"] = {
        "bf16": vars(Measured([4.0, 2.0, 2.0, 9.0], [200.0, 300.0, 100.0])),
        "fp8 tensor": vars(Measured([4.0, 2.0, 2.06], [100.0, 150.0, 80.0])),
        "timm + torchao": vars(Measured(reason="torchao is not installed")),
    }
    table = fp8_steps.table(found)
    assert "| fp8 tensor | 100.0 | 2.000 | 2.6867 | +0.75 % |" in table
    assert "| timm + torchao | torchao is not installed | | | |" in table


def test_every_target_is_judged():
    assert list(fp8_steps.verdicts(measured())) == [
        "fp8 tensor: 1.56 times as fast as bf16, target 1.35: met",
        "fp8 tensor: 1,000 images/s, target 850 on an H200: met",
        "fp8 tensor: loss +0.00 % from bf16's, target 0.5 % after 2,000 steps: met",
        "fp8 row: not judged: no step was timed",
    ]
    assert [line.rpartition(": ")[2] for line in fp8_steps.verdicts(measured(ms=80.0, loss=2.02))][:3] == ["MISSED"] * 3
    assert "MISSED" in list(fp8_steps.verdicts(measured(loss=float("nan"))))[2]


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (measured(gpu=None), "targets are not judged: there is no GPU"),
        (measured(gpu="NVIDIA H100"), "850 on an H200: not judged on NVIDIA H100"),
        (measured(steps=1999), "target 0.5 % after 2,000 steps: not judged after 1,999"),
    ],
)
def test_what_cannot_be_judged_is_said(found: dict[str, Any], said: str):
    assert said in "\n".join(fp8_steps.verdicts(found))


@only_in_full
@pytest.mark.slow
@pytest.mark.distributed
def test_it_runs_on_a_cpu(tmp_path):
    words = ["-m", "benchmarks.fp8_steps", "--out", str(tmp_path), "--steps", "7", "--only", "bf16", "fp8 tensor"]
    ended = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    (line,) = [line for line in ended.stdout.splitlines() if line.startswith("| fp8 tensor")]
    assert "%" in line and (tmp_path / "fp8.json").exists()
