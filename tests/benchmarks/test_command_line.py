"""The suite as a user runs it, from the command line to the files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.machine import ROOT
from benchmarks.suite import SUITES, is_ours
from tests.in_full import IN_FULL, only_in_full

MODULE = [sys.executable, "-m"]


def run(*words: str, seconds: float) -> str:
    """What a command prints; its exit code must be 0."""
    # a run of its own: pytest-benchmark would take itself for a worker of the run that this test is in
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run([*MODULE, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-5000:]
    return done.stdout


@only_in_full
@pytest.mark.slow
@pytest.mark.timeout(1000)
@pytest.mark.distributed
def test_everything_is_measured_quickly(tmp_path: Path) -> None:
    # half a minute a suite leaves out the least important
    words = ["bench", "all", "--quick", "--minutes", "0.5", "--out", str(tmp_path)]
    printed = run("fastvit_engine", *words, seconds=900)
    (folder,) = tmp_path.iterdir()
    records = {}
    for suite in SUITES:
        (place,) = folder.glob(f"{suite}-*.json")
        records[suite] = json.loads(place.read_text())
        title = place.with_suffix(".md").read_text().splitlines()[0]
        assert title.startswith("# ")
        assert title in printed or suite == "kernels"  # which prints a table for a terminal
    for case in records["kernels"]["cases"] + records["train"]["cases"]:
        for row in case.get("providers") or case["variants"]:
            assert row["status"] in (("ok", "skipped") if is_ours(row) else ("ok", "skipped", "wrong", "failed")), row
            assert row["status"] == "ok" or row["reason"], row
    assert records["kernels"]["error"] is None and records["kernels"]["cases"]  # how many depends on the machine
    for case in records["kernels"]["cases"]:
        assert f"{case['op']}: " in printed
    ran = {row["variant"] for row in records["train"]["cases"][0]["variants"] if row["status"] == "ok"}
    assert "fastvit" in ran
    assert any(row["variant"] == "fastvit" and not row["skipped"] for row in records["data"]["results"])
    assert records["overhead"]["cases"]


@pytest.mark.slow
def test_two_states_of_the_code_are_compared(tmp_path: Path) -> None:
    words = [
        "pytest",
        "benchmarks",
        "--benchmark-only",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "patch_embed and fastvit",
    ]
    words.append(f"--benchmark-storage={tmp_path}")
    run(*words, "--benchmark-autosave", seconds=150)
    (saved,) = tmp_path.rglob("0001_*.json")
    assert len(json.loads(saved.read_text())["benchmarks"]) == 3  # forward, backward, both
    if not IN_FULL:  # comparing what is saved is pytest-benchmark's own
        return
    table = run(*words, "--benchmark-compare", seconds=150)
    assert "Median" in table and table.count("fastvit-forward] (NOW)") == table.count("fastvit-forward] (0001") == 1
