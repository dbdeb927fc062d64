import argparse
import shutil
from pathlib import Path

import pytest

from fastvit_engine.commands import report as report_command
from fastvit_engine.errors import UserError
from tests.fastvit_engine.observe.conftest import MakeRun, eval_row, train_row
from tests.fastvit_engine.test_cli import modules_after


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="fastvit")
    report_command.add(parser.add_subparsers(), "write a report")
    return parser.parse_args(arguments)


def test_report_writes_the_file_and_prints_a_summary(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run([train_row(840), eval_row(840, 0.975)])
    monkeypatch.chdir(run.path.parent)
    args = parse("report", "quickstart")
    assert args.run(args) == 0
    assert run.report.read_text().startswith("<!DOCTYPE html>")
    assert capsys.readouterr().out == (
        "ViT Ti/4 (0.4 M parameters): 840 steps of 64 images on 2 processes (cpu, ZeRO-1) in 1 min 12 s\n"
        "top-1 97.5 % on 360 held-out images\n"
        "report: quickstart/report.html\n"
    )


def test_the_report_of_a_run_on_this_machine_loads_no_pytorch(make_run: MakeRun) -> None:
    run = make_run([train_row(420)])
    code = f"    from fastvit_engine.cli import main\n    assert main(['report', {str(run.path)!r}]) == 0"
    assert modules_after(code).isdisjoint({"torch", "deepspeed"})


def test_a_run_with_damaged_lines_is_reported_all_the_same(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half a line, or zeros for a line, is what a power failure leaves."""
    run = make_run([train_row(839), train_row(840), eval_row(840, 0.975)])
    monkeypatch.chdir(run.path.parent)
    event = b'{"time": "2026-01-01T00:00:00+00:00", "event": "rewind", "message": "back", "step": 7}'
    run.metrics.write_bytes(run.metrics.read_bytes() + bytes(100) + b'\n{"step": 84')
    run.events.write_bytes(event + b"\n{oops\n[1]\n" + event + b"\n" + bytes(100))
    args = parse("report", "quickstart")
    assert args.run(args) == 0
    said = capsys.readouterr()
    assert "840 steps of 64 images" in said.out and "incidents: 2 rewinds" in said.out
    assert said.err.splitlines() == [
        "fastvit: quickstart/metrics.jsonl line 4 is not JSON: left out",
        "fastvit: quickstart/events.jsonl line 2 is not JSON, and 1 more: left out",
    ]


def test_several_runs_are_compared_in_one_file(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run([train_row(840), eval_row(840, 0.975)], config="optimizer:\n  learning_rate: 0.001\n")
    other = run.path.parent / "other"
    shutil.copytree(run.path, other)
    (other / "config.yaml").write_text("optimizer: {learning_rate: 0.25}\n")
    damaged = run.path.parent / "damaged"
    shutil.copytree(run.path, damaged)
    (damaged / "config.yaml").write_text("a: [")
    monkeypatch.chdir(run.path.parent)
    args = parse("report", "quickstart", "other", "damaged")
    assert args.run(args) == 0
    page = (run.path.parent / "comparison.html").read_text()
    assert "optimizer.learning_rate" in page and "0.25" in page and "damaged: damaged." in page
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in said[::2]] == ["quickstart", "other", "damaged", "comparison"]
    assert said[-1] == "comparison: comparison.html"
    assert not run.report.exists()
    assert args.run(args) == 0  # a page is replaced


@pytest.mark.parametrize("runs", [1, 2])
def test_the_page_goes_where_out_says_with_the_axis_that_x_says(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, runs: int
) -> None:
    run = make_run([train_row(840)])
    shutil.copytree(run.path, run.path.parent / "other")
    monkeypatch.chdir(run.path.parent)
    args = parse("report", *["quickstart", "other"][:runs], "--out", "page.html", "--x", "samples")
    assert args.run(args) == 0
    assert '<div class="axis">training images</div>' in Path("page.html").read_text()
    assert sorted(path.name for path in run.path.parent.glob("**/*.html")) == ["page.html"]


def test_what_is_no_page_is_not_replaced(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run([train_row(840)])
    monkeypatch.chdir(run.path.parent)
    before = run.metrics.read_bytes()
    for out, problem in (
        ("quickstart/metrics.jsonl", "exists and is no report: choose another --out"),
        ("quickstart", "quickstart is a folder: name the file to write, such as quickstart/comparison.html"),
        ("nowhere/x.html", "nowhere is no folder: make it first, or choose another --out"),
    ):
        args = parse("report", "quickstart", "--out", out)
        with pytest.raises(UserError, match=problem):
            args.run(args)
    Path("comparison.html").write_text("mine")
    args = parse("report", "quickstart", "nowhere")
    with pytest.raises(UserError, match=r"comparison\.html exists and is no report"):
        args.run(args)
    assert run.metrics.read_bytes() == before and Path("comparison.html").read_text() == "mine"


def test_a_run_is_compared_once(make_run: MakeRun) -> None:
    run = make_run([train_row(840)])
    args = parse("report", str(run.path), f"{run.path}/../quickstart", "--out", str(run.path.parent / "x.html"))
    with pytest.raises(UserError, match="quickstart is given twice: name each run once"):
        args.run(args)


def test_not_a_run_folder(tmp_path: Path) -> None:
    args = parse("report", str(tmp_path))
    with pytest.raises(UserError, match="is not a run folder"):
        args.run(args)


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("report", "--help")
    assert "fastvit report runs/quickstart" in capsys.readouterr().out
