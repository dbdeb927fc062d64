import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="does not apply: there are no launches without Triton")


def test_the_cost_of_launches_is_measured_without_a_gpu(tmp_path: Path) -> None:
    out = tmp_path / "host_cost.json"
    command = [sys.executable, "-m", "benchmarks.host_cost", "--rounds", "2", "--calls", "5", "--out", str(out)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    result = json.loads(out.read_text())
    fused, plain = (result["blocks"][name]["both_us"] for name in ("fused", "plain"))
    assert 0 < plain < fused < 5 * plain  # a busy machine is no reason to fail
    launches = result["launches"]
    assert launches["count"] == 11 and launches["left_to_triton"] == 0
    assert min(launches["launch_us"], launches["triton_us"]) > 0
    assert f"{result['ratio']:.2f} times the CPU time" in run.stdout
