"""`--ray`, each file of cases in its own process: what Ray leaves behind makes forking there unsafe."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(os.environ.get("FASTVIT_TEST_RAY") != "all", reason="minutes of Ray: FASTVIT_TEST_RAY=all")
@pytest.mark.parametrize("cases", ["ray_cases.py", "ray_losses.py"])
def test_on_clusters(cases: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).with_name(cases))]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
