import importlib.metadata
import json
import re
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest

from benchmarks import gpu_run
from benchmarks.gpu_run import GPU_LOST, MINUTES, PATIENCE, ROOT, Step, limit
from fastvit_kernels.tuning import __main__ as tuning
from tests.in_full import only_in_full

FILES = ["report.md", "results.tar.gz", "summary.json"]


def step(name: str, text: str, share: float = 1, again_on: int | None = None) -> Step:
    return Step(name, share, lambda seconds: [sys.executable, "-c", text], again_on)


def test_every_step_has_its_turn_and_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    once, out = tmp_path / "once", tmp_path / "out"
    again = f"import pathlib, sys; p = pathlib.Path({str(once)!r}); e = p.exists(); p.touch(); sys.exit(0 if e else 3)"
    handler = (
        "import signal, time\nsignal.signal(signal.SIGINT, signal.default_int_handler)"  # jobs of a shell ignore it
    )
    sleeper = f"{handler}\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('interrupted', flush=True)"

    def steps(folder: Path, dry: bool) -> list[Step]:
        table = (  # what the step before it has left is there already
            f"import pathlib; assert 'smoke' in pathlib.Path({str(out)!r}, 'summary.json').read_text();"
            f"p = pathlib.Path({str(folder)!r}, 'gpu'); p.mkdir(); (p / 'a.md').write_text('# Seen')"
        )
        return [
            step("smoke", "print('said'); raise SystemExit(1)", 10),
            Step("absent", 10, lambda seconds: [str(tmp_path / "no-such-program")]),
            step("kernels", table, 10),
            step("train", sleeper),
            step("tuning", again, 10, GPU_LOST),
            step("tests", "raise SystemExit(3)", 1, GPU_LOST),
        ]

    monkeypatch.setattr(gpu_run, "steps", steps)
    monkeypatch.setattr(gpu_run, "PATIENCE", 1)
    start = time.monotonic()
    assert gpu_run.main(["--out", str(out), "--minutes", "1", "--steps", "smoke", "kernels", "train", "tuning"]) == 1
    assert time.monotonic() - start < 60
    assert sorted(path.name for path in out.iterdir()) == FILES
    summary = json.loads((out / "summary.json").read_text())
    assert {s["step"]: s["exit_code"] for s in summary["steps"]} == {
        "smoke": 1,
        "kernels": 0,
        "train": None,
        "tuning": 0,
    }
    assert summary["versions"]["torch"]
    report = (out / "report.md").read_text()
    assert "| train | not done |" in report and "# Seen" in report and "interrupted" in report
    with tarfile.open(out / "results.tar.gz") as archive:
        assert {"./gpu/a.md", "./smoke.log", "./train.log"} <= set(archive.getnames())
    assert "## smoke\n\n```\nsaid" in capsys.readouterr().out


def test_a_program_that_is_not_there_and_one_that_never_ends_well(tmp_path: Path) -> None:
    absent = Step("absent", 1, lambda seconds: [str(tmp_path / "no-such-program")])
    assert gpu_run.run(absent, 30, tmp_path).exit_code == 127
    assert gpu_run.run(step("lost", "raise SystemExit(3)", again_on=GPU_LOST), 1, tmp_path).exit_code is None
    assert tuning.GPU_LOST == GPU_LOST


@pytest.mark.parametrize("chosen", [["smoke", "kernels", "train", "tuning", "tests"], ["smoke", "train"], ["tests"]])
def test_the_whole_run_ends_within_nine_minutes(tmp_path: Path, chosen: list[str]) -> None:
    waiting = [step for step in gpu_run.steps(tmp_path, dry=False) if step.name in chosen]
    assert [step.name for step in waiting] == chosen  # in the order of the documentation
    total = 0.0
    while waiting:
        total += limit(waiting[0], waiting, 60 * MINUTES - total) + PATIENCE  # each outlasts its time
        waiting.pop(0)
    assert total == pytest.approx(60 * MINUTES) and total < 9 * 60 - PATIENCE


def test_time_that_a_step_leaves_goes_to_those_behind_it(tmp_path: Path) -> None:
    first, *rest = gpu_run.steps(tmp_path, dry=False)
    used = limit(first, [first, *rest], 500) + PATIENCE
    assert limit(rest[0], rest, 500 - used / 2) > limit(rest[0], rest, 500 - used)
    assert rest[0].command(150)[-2:] == ["--minutes", "2.00"]


def test_it_says_what_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_run, "NEEDED", ("torch", "no_such_package"))
    assert gpu_run.main(["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().out == "not installed, and nothing runs without: no_such_package\n"
    with pytest.raises(SystemExit, match="2"):
        gpu_run.main(["--out", str(tmp_path), "--wheels", str(tmp_path)])
    assert f"there are no wheels in {tmp_path}" in capsys.readouterr().err
    monkeypatch.setattr(gpu_run, "WANTED", {"no_such_package": "no miracles"})
    assert gpu_run.dependencies()[1] == ["no_such_package: no miracles"]


def wheel(folder: Path, name: str, tag: str) -> None:
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-{tag}.whl", "w") as archive:
        archive.writestr(f"{name}.py", "answer = 42\n")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        archive.writestr(f"{info}/RECORD", "")


def test_wheels_are_installed_where_something_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    wheels.mkdir()
    wheel(wheels, "of_a_wheel", "py3-none-any")
    wheel(wheels, "elsewhere", "cp39-cp39-win_amd64")
    wheel(wheels, "numpy", "py3-none-any")  # installed here: stays as it is
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", "")
    assert gpu_run.install(wheels, site) == ["elsewhere-1.0-cp39-cp39-win_amd64.whl"]
    assert {path.name for path in site.glob("*.py")} == {"of_a_wheel.py"}
    assert gpu_run.version("of_a_wheel") == "1.0"
    outcome = gpu_run.run(step("wheel", "import of_a_wheel; print(of_a_wheel.answer)"), 30, tmp_path)
    assert outcome.exit_code == 0 and (tmp_path / "wheel.log").read_text() == "42\n"


def test_wheels_have_the_versions_of_the_constraints() -> None:
    """pydantic takes one version of its core alone, which the constraints do not name."""
    listed = [line.split("#")[0].strip() for line in (ROOT / "launch" / "wheels.txt").read_text().splitlines()]
    (core,) = [line for line in listed if "==" in line]
    wanted = re.escape(core.replace("_", "-"))
    assert any(re.match(wanted, need) for need in importlib.metadata.requires("pydantic") or ())


@only_in_full
@pytest.mark.slow
@pytest.mark.distributed
def test_a_dry_run(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_run", "--out", str(tmp_path), "--dry-run", "--minutes", "5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=320)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    report = (tmp_path / "report.md").read_text()
    assert all(title in report for title in ("# Does it run?", "# Operations", "# Training steps"))
    with tarfile.open(tmp_path / "results.tar.gz") as archive:
        names = archive.getnames()
    assert {"smoke", "kernels", "train", "tuning", "tests"} == {Path(n).stem for n in names if n.endswith(".log")}
