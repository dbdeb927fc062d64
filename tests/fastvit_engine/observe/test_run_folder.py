import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
import torch

from fastvit_engine.observe.environment import collect_environment
from fastvit_engine.observe.run_folder import RunFolder


def test_paths() -> None:
    run = RunFolder(Path("runs/a"))
    assert run.metrics == Path("runs/a/metrics.jsonl")
    assert run.checkpoints == Path("runs/a/checkpoints")
    assert run.report == Path("runs/a/report.html")


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["fastvit", "train", "my recipe.yaml"])
    environment = collect_environment(model="B/16", cpu_count=3)
    assert environment["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert environment["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert environment["command"] == "fastvit train 'my recipe.yaml'"
    assert environment["model"] == "B/16"
    assert environment["cpu_count"] == 3
    assert (environment["gpu"] is None) == (not torch.cuda.is_available())
    assert datetime.fromisoformat(environment["started"]).tzinfo is not None


def test_a_missing_package_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastvit_engine.observe.environment._PACKAGES", ("no-such-package-here",))
    assert collect_environment()["versions"]["no-such-package-here"] is None


def test_importing_the_package_does_not_import_torch_or_matplotlib() -> None:
    modules = ["run_folder", "metrics", "progress", "recorder", "report.recorded_run", "report.chart", "report.report"]
    code = "import sys; " + "; ".join(f"import fastvit_engine.observe.{module}" for module in modules)
    code += "; print(sorted({'torch', 'matplotlib', 'deepspeed'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
