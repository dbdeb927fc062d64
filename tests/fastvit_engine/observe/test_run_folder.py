import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
import torch

from fastvit_engine.errors import UserError
from fastvit_engine.observe.environment import collect_environment
from fastvit_engine.observe.run_folder import RunFolder, run_folder


def test_paths() -> None:
    run = RunFolder(Path("runs/a"))
    assert run.metrics == Path("runs/a/metrics.jsonl")
    assert run.checkpoints == Path("runs/a/checkpoints")
    assert run.report == Path("runs/a/report.html")


def test_a_run_folder_on_this_machine_is_its_own_working_folder(tmp_path: Path) -> None:
    run = run_folder("runs/a")
    assert (run, str(run), run.checkpoint_location) == (RunFolder(Path("runs/a")), "runs/a", "runs/a/checkpoints")
    assert run.describe(run.metrics) == "runs/a/metrics.jsonl"
    assert run_folder(f"file://{tmp_path}/a") == run_folder(tmp_path / "a") == RunFolder(tmp_path / "a")


def test_the_working_folder_follows_from_the_url(tmp_path: Path) -> None:
    pytest.importorskip("obstore")
    settings = {"FASTVIT_RUNS": str(tmp_path)}
    run = run_folder("s3://bucket/runs/b16/", settings)
    assert (run.url, str(run), run.name) == ("s3://bucket/runs/b16", "s3://bucket/runs/b16", "b16")
    assert run.checkpoint_location == "s3://bucket/runs/b16/checkpoints"
    assert run.describe(run.metrics) == "s3://bucket/runs/b16/metrics.jsonl"
    assert run.path.parent == tmp_path and run.path.name.startswith("bucket-runs-b16-")
    for spelling in ("s3:/bucket/runs/b16", "s3a://bucket/runs/b16", "S3://bucket/runs/b16//"):
        assert run_folder(spelling, settings).path == run.path
    for other in ("s3://bucket/runs-b16", "gs://bucket/runs/b16", "s3://bucket/runs/b17", "s3://bucket"):
        assert run_folder(other, settings).path != run.path
    assert run_folder("s3://b/x", {"XDG_CACHE_HOME": "/c"}).path.parent == Path("/c/fastvit/runs")
    assert run_folder("s3://b/x", {}).path.parent == Path.home() / ".cache/fastvit/runs"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("url", ["s3://me:hunter2@bucket/run", "s3://bucket/run?sig=hunter2", "s3:/me:hunter2@bucket"])
def test_a_run_folder_with_secrets_is_refused_without_showing_them(url: str, tmp_path: Path) -> None:
    """They would be in the name of the working folder, the owner record and the command lines of ranks."""
    with pytest.raises(UserError, match=r"^the run folder is s3://bucket(/run)? with a user name.*in the environ") as e:
        run_folder(url, {"FASTVIT_RUNS": str(tmp_path)})
    assert "hunter2" not in str(e.value)
    pytest.importorskip("obstore")
    account = "abfss://container@account.dfs.core.windows.net/run"  # which is a place, and no user
    assert run_folder(account, {"FASTVIT_RUNS": str(tmp_path)}).url == account


def test_a_working_folder_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("obstore")
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    run = run_folder("s3://bucket/run", {"FASTVIT_RUNS": str(shared)})
    run.prepare()
    assert run.path.stat().st_mode & 0o777 == 0o700
    run.path.chmod(0o777)
    with pytest.raises(UserError, match=r"other users may write to .* \(FASTVIT_RUNS\)"):
        run.prepare()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be the working folder of s3://bucket/run .*set FASTVIT_RUNS"):
        run_folder("s3://bucket/run", {"FASTVIT_RUNS": str(tmp_path / "file")}).prepare()


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
    modules = ["run_folder", "metrics", "progress", "recorder", "report.report", "report.comparison"]
    code = "import sys; " + "; ".join(f"import fastvit_engine.observe.{module}" for module in modules)
    code += "; print(sorted({'torch', 'matplotlib', 'deepspeed'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
