"""Steps in FP8 beside those in bf16: what is compared, and what is said of what cannot run."""

import subprocess
import sys

import pytest
import torch

from benchmarks import fp8_steps
from benchmarks.shapes import CPU_SHAPES


def test_batches_are_the_same_in_every_run_and_can_be_learned():
    first, again = (next(fp8_steps.batches(CPU_SHAPES[0], 3, torch.device("cpu"))) for _ in range(2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert first[0].shape == (3, 224, 224, 3) and first[0].dtype == torch.uint8
    batches = fp8_steps.batches(CPU_SHAPES[0], 3, torch.device("cpu"))
    assert not torch.equal(next(batches)[0], next(batches)[0])


def test_ratios_are_of_pairs_and_of_the_same_steps():
    found = {
        "model": "H/14",
        "batch": 64,
        "variants": {
            "bf16": {"ms": [200.0, 300.0, 100.0], "losses": [4.0, 2.0, 2.0, 9.0], "reason": ""},
            "fp8 tensor": {"ms": [100.0, 150.0, 80.0], "losses": [4.0, 2.0, 2.06], "reason": ""},
            "timm + torchao": {"ms": [], "losses": [], "reason": "torchao is not installed"},
        },
    }
    table = fp8_steps.table(found)
    assert "| fp8 tensor | 100.0 | 2.000 | 2.6867 | +0.75 % |" in table
    assert "| timm + torchao | torchao is not installed | | | |" in table


IN_A_PROCESS_OF_ITS_OWN = """
from benchmarks import fp8_steps

def failing(setup):
    def step(images, labels):
        raise RuntimeError("no kernel image")
    return step

for name in ("fp8 row", "timm + TransformerEngine"):
    del fp8_steps.BUILDS[name]
fp8_steps.BUILDS["timm + torchao"], fp8_steps.WARM_UP = failing, 1
raise SystemExit(fp8_steps.main(["--out", {out!r}, "--steps", "3"]))
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_a_peer_that_fails_does_not_stop_the_others(tmp_path):
    program = IN_A_PROCESS_OF_ITS_OWN.format(out=str(tmp_path))
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert "RuntimeError: no kernel image" in ended.stdout and (tmp_path / "fp8.json").exists()
    (line,) = [line for line in ended.stdout.splitlines() if line.startswith("| fp8 tensor")]
    assert "%" in line
