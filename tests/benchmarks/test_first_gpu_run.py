import json
import sys
import time
from pathlib import Path

import pytest

from benchmarks import first_gpu_run
from benchmarks.first_gpu_run import GPU_LOST, Step
from fastvit_kernels.tuning import __main__ as tuning


def program(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def test_every_step_has_its_turn_and_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    once = tmp_path / "once"
    again = f"import pathlib, sys; p = pathlib.Path({str(once)!r}); e = p.exists(); p.touch(); sys.exit(0 if e else 3)"
    handler = (
        "import signal, time\nsignal.signal(signal.SIGINT, signal.default_int_handler)"  # jobs of a shell ignore it
    )
    sleeper = f"{handler}\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('report', flush=True)"
    chosen = [
        Step("failing", program("print('said'); raise SystemExit(1)"), 30),
        Step("absent", [str(tmp_path / "no-such-program")], 30),
        Step("endless", program(sleeper), 5),
        Step("interrupted", program(again), 30, GPU_LOST),
        Step("never right", program("raise SystemExit(3)"), 1, GPU_LOST),
    ]
    monkeypatch.setattr(first_gpu_run, "steps", lambda out, dry: chosen)
    start = time.monotonic()
    assert first_gpu_run.main(["--out", str(tmp_path / "out")]) == 1
    assert time.monotonic() - start < 30
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    codes = [step["exit_code"] for step in summary["steps"]]
    assert codes == [1, 127, None, 0, None]
    assert (tmp_path / "out" / "failing.log").read_text() == "said\n"
    assert "report" in (tmp_path / "out" / "endless.log").read_text()
    assert summary["versions"]["torch"]
    assert "--- failing\nsaid" in capsys.readouterr().out


def test_the_whole_run_ends_within_nine_minutes(tmp_path: Path) -> None:
    limits = [step.seconds + first_gpu_run.PATIENCE for step in first_gpu_run.steps(tmp_path, dry=False)]
    assert sum(limits) < 9 * 60
    assert tuning.GPU_LOST == GPU_LOST
