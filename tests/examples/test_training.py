"""The training scripts of other libraries train, show what runs fused, and leave weights that those libraries read."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.in_full import only_in_full
from tests.kernels.integrations import conftest  # lets timm import a torchvision of another build

__all__ = ["conftest"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # the longest take two minutes of a machine at rest
ROOT = Path(__file__).parents[2]
FUSED_BLOCK = re.compile(r"^\S*(blocks|layers)\.1 +\w+ +block +reference$", re.MULTILINE)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(script, **environment) -> what it prints."""

    def in_this_process(script: str, **environment: object) -> str:
        for name, value in {"CUDA_VISIBLE_DEVICES": "", "OUT": tmp_path, **environment}.items():
            monkeypatch.setenv(name, str(value))
        runpy.run_path(str(ROOT / "examples" / script))
        return capsys.readouterr().out

    return in_this_process


def on_two_ranks(script: str, **environment: object) -> str:
    arguments = [sys.executable, "-m", "tests.examples.ranks", "2", f"examples/{script}"]
    variables = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **{name: str(value) for name, value in environment.items()}}
    done = subprocess.run(arguments, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def losses(printed: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"'?\bloss'?:? '?([\d.]+)", printed)]


def number(pattern: str, printed: str) -> float:
    match = re.search(pattern, printed)
    assert match is not None, printed
    return float(match[1])


def test_timm(run) -> None:
    printed = run("timm_train.py", EPOCHS=2)
    assert FUSED_BLOCK.search(printed) and losses(printed)[-1] < losses(printed)[0]
    assert number(r"plain timm: (\S+)", printed) < 1e-4


def test_trainer(run) -> None:
    printed = run("hf_trainer.py", EPOCHS=2)
    assert FUSED_BLOCK.search(printed) and losses(printed)[1] < losses(printed)[0]
    assert number(r"plain transformers: (\S+)", printed) < 1e-4


def test_cuda_graph_without_a_gpu(run) -> None:
    printed = run("cuda_graph.py", STEPS=20)
    assert "no GPU, so no CUDA graph" in printed and losses(printed)[-1] < losses(printed)[0]


@pytest.mark.distributed
def test_fsdp2() -> None:
    printed = on_two_ranks("fsdp2.py", STEPS=11)
    assert FUSED_BLOCK.search(printed) and losses(printed)[-1] < losses(printed)[0]
    assert printed.count("top-1 of plain timm") == 1


@only_in_full
@pytest.mark.parametrize("script", ["timm_train.py", "hf_trainer.py"])
def test_as_long_as_users_run_them(script: str, run) -> None:
    assert number(r"top-1 (\S+) ?%", run(script)) > 70


@only_in_full
@pytest.mark.distributed
def test_fsdp2_as_long_as_users_run_it() -> None:
    assert number(r"weights: (\S+)%", on_two_ranks("fsdp2.py")) > 70
