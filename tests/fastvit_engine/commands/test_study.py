"""`fastvit study`, as a whole: what it says and writes, and that a study which is killed continues."""

import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from fastvit_engine.cli import main
from fastvit_engine.observe.metrics import read_metrics
from fastvit_engine.study import execution
from tests.fastvit_engine.study.conftest import data, fake, write_study  # noqa: F401


@pytest.fixture
def study(write_study, data, fake, monkeypatch, tmp_path, capsys):  # noqa: F811
    """study(*words) -> exit code, stdout, stderr; of four runs that take no time"""
    monkeypatch.setattr(execution, "Executor", functools.partial(execution.Executor, command=fake))

    def run(*words, **keys):
        settings = [word for setting in data for word in ("--set", setting)]
        code = main(["study", str(write_study(**keys)), "--out", str(tmp_path / "out"), *settings, *words])
        return code, *capsys.readouterr()

    return run


def test_it_says_what_it_will_do_and_does_it(study, tmp_path):
    out = tmp_path / "out"
    code, shown, errors = study("--seeds", "2", "--dry-run")
    assert code == 0 and not out.exists()
    lines = shown.splitlines()
    assert lines[0].startswith("tiny: 8 runs; training 8, 160 steps in all, about ")
    assert lines[0].endswith("an assumption until a run is finished") and "25 s of each run" in lines[0]
    assert lines[8].split(maxsplit=3) == ["7", "20", "steps", "pool=gap, learning_rate=0.01, seed 1"]
    code, shown, errors = study("--seeds", "2", "--only", "0", "6")
    assert code == 0 and "2 runs" in shown and "6 of 8" not in shown
    assert "2 of 8 runs are finished" in (out / "table.md").read_text()
    code, shown, errors = study("--seeds", "2")
    assert code == 0 and "tiny: 8 runs (2 finished); training 6, 120 steps in all, about " in shown
    assert "as the runs before took" in shown and "[6 of 6]" in shown
    assert len(json.loads((out / "study.json").read_text())["runs"]) == 8
    assert {path.name for path in out.iterdir()} == {
        *("runs", "logs", "records", "study.json", "table.md"),
        *("tiny.png", "tiny.svg", "tiny-dark.png", "tiny-dark.svg"),
    }
    before = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/*")}
    code, shown, errors = study("--seeds", "2")  # nothing is left
    assert code == 0 and shown.startswith("tiny: 8 runs (8 finished)\n") and "[1 of" not in shown
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("runs/*/*")}
    code, shown, errors = study("--seeds", "3")  # more seeds keep what there is
    assert code == 0 and "12 runs (8 finished); training 4" in shown


def test_a_failed_run_is_named_and_the_exit_code_says_so(study, monkeypatch, tmp_path):
    monkeypatch.setenv("FAKE_0_001", "bad input")
    code, shown, errors = study()
    assert code == 1 and "[4 of 4]" in shown and "failed: the loss is nan: lower the rate" in shown
    named = "pool=cls, learning_rate=0.001, seed 0; pool=gap, learning_rate=0.001, seed 0"
    assert errors == f"fastvit: 2 runs failed: {named}\n"
    assert "* pool=cls, learning_rate=0.001, seed 0: the loss is nan" in (tmp_path / "out" / "table.md").read_text()
    monkeypatch.delenv("FAKE_0_001")
    code, shown, errors = study()
    assert code == 0 and "4 runs (2 finished, 2 to try again); training 2" in shown and not errors


def test_json_is_alone_on_stdout(study, tmp_path):
    code, shown, errors = study("--json")
    found = json.loads(shown)
    assert code == 0 and found == json.loads((tmp_path / "out" / "study.json").read_text())
    assert found["runs"][0]["settings"] == {"model.pool": "cls", "optimizer.learning_rate": 0.001, "seed": 0}
    assert {"exaflops", "top1", "fewshot5"} <= found["runs"][0].keys() and "[4 of 4]" in errors


def test_slurm_gets_an_array_of_the_runs_that_are_left(study, tmp_path, write_study):  # noqa: F811
    study("--only", "1")
    code, shown, errors = study("--slurm")
    assert code == 0 and shown.startswith("sbatch --array=0,2-3 launch/slurm/study.sbatch ")
    words = shown.split("study.sbatch ")[1].split()
    assert words[0] == str(write_study()) and words[-2:] == ["--out", str(tmp_path / "out")]
    study()
    code, shown, errors = study("--slurm")
    assert code == 2 and "all runs of the study are finished: nothing to submit" in errors


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--only", "4"], "--only 4: the study has the runs 0 to 3"),
        (["--set", "seed=1"], "write --seeds N"),
        (["--set", "model.pool=map"], "the runs of study tiny.yaml differ in it"),
        (["--set", "optimizer.kind=adamm"], "configuration key 'optimizer.kind' (--set) is 'adamm'"),
    ],
)
def test_bad_input_is_one_sentence(study, words, says, tmp_path):
    code, shown, errors = study(*words)
    assert code == 2 and errors.startswith("fastvit: error: ") and errors.count("\n") == 1 and says in errors
    assert not (tmp_path / "out").exists()


def test_another_study_in_the_folder_is_refused(study):
    study()
    code, shown, errors = study("--set", "train.duration=10 steps")
    assert code == 2 and "is of other settings than this study has now (train.duration was" in errors


def test_one_rank_of_many_is_refused(study, monkeypatch):
    for name, value in {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "x",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "_exit", lambda code: None)
    code, shown, errors = study()
    assert code == 2 and "a launcher has started several of it" in errors


def children_of(process: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process)], capture_output=True, text=True).stdout
    direct = [int(word) for word in found.split()]
    return [*direct, *(inner for child in direct for inner in children_of(child))]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_a_study_that_is_killed_in_the_middle_continues(digits, tmp_path):
    """With real trainings: the run that was under way resumes from its checkpoint, and the one before is kept."""
    path, out = tmp_path / "real.yaml", tmp_path / "out"
    settings = {"model.width": 32, "model.depth": 2, "model.image_size": 8, "train.log_every": 1}
    settings |= {"train.duration": "120 steps", "checkpoint.every": "20 steps", "evaluate.every": None}
    runs = [{"model.pool": ["gap", "cls"]}]
    path.write_text(yaml.safe_dump({"name": "real", "recipe": "quickstart", "settings": settings, "runs": runs}))
    shards = [f"data.train={digits}/train-*.tar", f"data.eval={digits}/eval-*.tar"]
    words = [word for shard in shards for word in ("--set", shard)]
    command = [sys.executable, "-m", "fastvit_engine", "study", str(path), "--out", str(out), *words, "--json"]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    second = out / "runs" / "pool-cls_seed-0"
    with subprocess.Popen(command, env=variables, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        while not (second / "checkpoints" / "step-00000040").exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        family = children_of(process.pid)
        process.kill()
    assert len(family) >= 2  # `fastvit train`, and its rank
    for _ in range(100):
        alive = [child for child in family if Path(f"/proc/{child}").exists() and " Z " not in stat_of(child)]
        if not alive:
            break
        time.sleep(0.1)
    assert not alive
    record = json.loads((out / "records" / "pool-cls_seed-0.json").read_text())
    steps = [row["step"] for row in read_metrics(second / "metrics.jsonl")[0]]
    assert record["state"] == "begun" and max(steps) < 120
    first = (out / "runs" / "pool-gap_seed-0" / "metrics.jsonl").read_bytes()

    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "real: 2 runs (1 finished, 1 to resume); training 1, 120 steps in all" in done.stderr
    assert (out / "runs" / "pool-gap_seed-0" / "metrics.jsonl").read_bytes() == first
    assert [row["step"] for row in read_metrics(second / "metrics.jsonl")[0]] == list(range(1, 121))
    assert "continuing" in (out / "logs" / "pool-cls_seed-0.log").read_text()
    runs = json.loads(done.stdout)["runs"]
    assert [run["settings"]["model.pool"] for run in runs] == ["gap", "cls"]
    for run in runs:
        assert 0.2 < run["top1"] <= 1 and 0.2 < run["fewshot5"] <= 1 and run["samples"] == 359
        assert run["exaflops"] == pytest.approx(120 * 64 * 1e-18 * run_flops(run["settings"]["model.pool"]))


def stat_of(process: int) -> str:
    try:
        return Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return " Z "


def run_flops(pool: str) -> int:
    """6 operations per multiply-accumulate: 4x4 patches of 8 pixels, width 32, two blocks with an MLP of 128."""
    tokens = 4 + (pool == "cls")
    block = tokens * (4 * 32 * 32 + 2 * tokens * 32 + 2 * 32 * 128)
    return 6 * (4 * 48 * 32 + 2 * block + 32 * 10)
