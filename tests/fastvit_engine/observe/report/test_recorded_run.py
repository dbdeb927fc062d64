import json
from pathlib import Path
from typing import Any

import pytest

from fastvit_engine.errors import UserError
from fastvit_engine.observe.owner_record import Holder
from fastvit_engine.observe.report.recorded_run import best_evaluation, load_run
from fastvit_engine.observe.run_folder import RunFolder
from tests.fastvit_engine.observe.conftest import ENVIRONMENT, MakeRun, eval_row, png_url, train_row

SAMPLE: dict[str, Any] = {"key": "a", "label": 1, "image": png_url(8), "predictions": [[1, 0.9], [0, 0.1]]}


def test_summary_of_a_finished_run(make_run: MakeRun) -> None:
    rows = [train_row(700), eval_row(700, 0.975), train_row(840), eval_row(840, 0.9722)]
    assert load_run(make_run(rows).path).summary() == (
        "ViT Ti/4 (0.4 M parameters): 840 steps of 64 images on 2 processes (cpu, ZeRO-1) in 1 min 12 s\n"
        "top-1 97.2 % on 360 held-out images (best 97.5 % at step 700)"
    )


def test_summary_of_a_run_in_progress_on_one_process(make_run: MakeRun) -> None:
    rows = [train_row(420), eval_row(420, 0.5), eval_row(420, 0.6, eval="eval_ema")]
    folder = make_run(rows, world_size=1, zero_stage=0, device="NVIDIA H200").path
    run = load_run(folder, Holder("process 7 on node-3"))
    assert not run.finished and run.state == "in progress"
    assert run.summary() == (
        "ViT Ti/4 (0.4 M parameters): 420 of 840 steps of 64 images on 1 process (NVIDIA H200, ZeRO-0) in 36 s\n"
        "in progress: process 7 on node-3\n"
        "top-1 50.0 % on 360 held-out images\n"
        "top-1 of the EMA weights 60.0 % on 360 held-out images"
    )


def write_events(folder: RunFolder, *events: dict[str, Any]) -> None:
    rows = [{"time": "t", "message": "m", **event} for event in events]
    folder.events.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_run_that_nobody_works_on_is_not_in_progress(make_run: MakeRun) -> None:
    folder = make_run([train_row(420)])
    write_events(folder, {"event": "start", "step": 0})
    killed = load_run(folder.path)
    assert killed.state == "not running"
    assert killed.describe_state() == ("not running: it ended early; the same command with --resume auto continues it")
    write_events(folder, {"event": "start", "step": 0}, {"event": "stop", "step": 420}, {"event": "checkpoint"})
    assert "not running: it was stopped on request; the same command" in load_run(folder.path).summary()
    write_events(folder, {"event": "stop", "step": 420}, {"event": "start", "step": 420})
    assert "it ended early" in load_run(folder.path).describe_state()


def test_a_run_on_a_machine_that_is_silent_may_be_either(make_run: MakeRun) -> None:
    run = load_run(make_run([train_row(420)]).path, Holder("process 7 on node-3", silent_seconds=7500.0))
    assert run.state == "no sign of life"
    assert run.describe_state() == (
        "no sign of life from process 7 on node-3 for 2 h 5 min: if that is gone, the same command with --resume auto "
        "continues it"
    )


@pytest.mark.parametrize(
    ("starts", "expected"),
    [
        ([], "1 process"),
        ([(0, 1)], "1 process"),
        ([(0, 2), (300, 1)], "2, then 1 process"),
        ([(0, 1), (300, 1)], "1 process"),
        ([(0, 4), (0, 2), (300, 1)], "2, then 1 process"),  # the first start left no checkpoint
        ([(0, 8), (100, 6), (200, 8), (300, 1)], "1 to 8 processes"),
    ],
)
def test_all_numbers_of_processes_that_trained_are_told(
    make_run: MakeRun, starts: list[tuple[int, int]], expected: str
) -> None:
    folder = make_run([train_row(840)], world_size=1)
    write_events(folder, *({"event": "start", "step": step, "world_size": size} for step, size in starts))
    assert (
        load_run(folder.path).describe_training() == f"840 steps of 64 images on {expected} (cpu, ZeRO-1) in 1 min 12 s"
    )


def test_incidents_are_counted(make_run: MakeRun) -> None:
    folder = make_run([train_row(840)])
    kinds = ["start", "checkpoint", "hang", "restart", "start", "anomaly", "rewind", "anomaly", "rewind", "stop"]
    events = [{"time": "t", "event": kind, "message": "m", "step": 1} for kind in kinds]
    folder.events.write_text("".join(json.dumps(event) + "\n" for event in events))
    run = load_run(folder.path)
    assert run.describe_incidents() == "1 restart, 2 rewinds, 2 anomalies, 1 hang"
    assert run.summary().endswith("\nincidents: 1 restart, 2 rewinds, 2 anomalies, 1 hang")
    assert len(run.restarts) == 1


def test_a_run_that_was_made_longer_was_not_restarted(make_run: MakeRun) -> None:
    folder = make_run([train_row(840)])
    starts = [(0, 500), (300, 500), (500, 840), (700, 840)]  # killed at 300; done at 500, and made longer; killed again
    events = [
        {"time": "t", "event": "start", "message": "m", "step": step, "total_steps": total} for step, total in starts
    ]
    folder.events.write_text("".join(json.dumps(event) + "\n" for event in events))
    run = load_run(folder.path)
    assert [event.get("step") for event in run.restarts] == [300, 700]
    assert run.describe_incidents() == "2 restarts"


def test_a_start_after_a_requested_stop_is_planned(make_run: MakeRun) -> None:
    """Also of a run that was made longer meanwhile; the start after a kill is a restart."""
    folder = make_run([train_row(840)])
    starts = [(0, 500), None, (300, 500), None, (400, 840), (500, 840)]
    events = [
        {"time": "t", "event": "stop", "message": "m", "reason": "preempted"}
        if start is None
        else {"time": "t", "event": "start", "message": "m", "step": start[0], "total_steps": start[1]}
        for start in starts
    ]
    folder.events.write_text("".join(json.dumps(event) + "\n" for event in events))
    run = load_run(folder.path)
    assert [event.get("step") for event in run.restarts] == [500]
    assert run.describe_incidents() == "1 restart"


def test_bad_samples_are_incidents(make_run: MakeRun) -> None:
    run = load_run(make_run([train_row(1, bad_samples=2), train_row(840, bad_samples=1200)]).path)
    assert run.summary().endswith("\nincidents: 1,200 bad samples")


@pytest.mark.parametrize(
    "change",
    [
        {"classes": [[0, 1, 2]]},
        {"classes": [[0, 0, 0]]},
        {"classes": [[0, True, 1]]},
        {"classes": [[0, 1.5, 1]]},
        {"classes": [[0, 10**30, 1]]},
        {"classes": [[0, 1]]},
        {"classes": None},
        {"confused": [[0, 1, -1]]},
        {"confused": [[0, [], 1]]},
        {"step": "x"},
        {"class_names": 5},
    ],
)
def test_damaged_figures_of_classes(make_run: MakeRun, change: dict[str, Any]) -> None:
    whole = {"step": 5, "eval": "eval", "class_names": None, "classes": [[0, 2, 1]], "confused": [[0, 1, 1]]}
    run = make_run([train_row(5)])
    run.classes.write_text(json.dumps(whole))
    assert load_run(run.path).classes is not None
    run.classes.write_text(json.dumps(whole | change))
    with pytest.raises(UserError, match=r"classes\.json does not hold the figures of classes"):
        load_run(run.path)


def test_a_run_whose_batch_changed_says_how_many_images_it_had(make_run: MakeRun) -> None:
    row = train_row(840)
    folder = make_run([row])
    event = {"time": "t", "event": "batch_change", "message": "m", "step": 400}
    folder.events.write_text(json.dumps(event) + "\n")
    run = load_run(folder.path)
    assert run.describe_training().startswith(f"840 steps with {row['samples']:,} images on 2 processes (")
    assert run.describe_incidents() == ""


def test_no_events_are_no_incidents(make_run: MakeRun) -> None:
    run = load_run(make_run([train_row(840)]).path)
    assert run.events == [] and run.describe_incidents() == "" and "incidents" not in run.summary()


def test_summary_before_the_first_row(make_run: MakeRun) -> None:
    run = load_run(make_run([]).path)
    assert run.step == 0
    assert run.summary().endswith("not evaluated yet")


def test_the_best_of_equals_is_the_latest() -> None:
    rows = [eval_row(1, 0.5), eval_row(2, 0.7), eval_row(3, 0.7), eval_row(4, 0.6)]
    assert best_evaluation(rows)["step"] == 3


def test_samples(make_run: MakeRun) -> None:
    samples = {"step": 5, "class_names": ["zero", "one"], "samples": [SAMPLE, SAMPLE | {"label": 7}]}
    read = load_run(make_run([train_row(5)], samples).path).samples
    assert read is not None
    assert [sample.correct for sample in read.samples] == [True, False]
    assert read.samples[0].width == 8
    assert read.class_name(1) == "one"
    assert read.class_name(7) == "class 7"


@pytest.mark.parametrize(
    "image",
    [
        "https://example.org/image.png",
        "data:image/svg+xml;base64,PHN2Zz4=",
        'data:image/png;base64,AAAA" onload="x',
        "data:image/png;base64,AAAA",
        "data:image/png;base64,A",
        None,
    ],
)
def test_images_are_pngs_in_data_urls(make_run: MakeRun, image: Any) -> None:
    samples = {"step": 5, "class_names": None, "samples": [SAMPLE | {"image": image}]}
    with pytest.raises(UserError, match=r"samples\.json does not hold sample predictions"):
        load_run(make_run([train_row(5)], samples).path)


def test_not_a_run_folder(tmp_path: Path, make_run: MakeRun) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        load_run(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is not a run folder: it has no environment.json"):
        load_run(tmp_path)
    run = make_run([])
    run.metrics.unlink()
    with pytest.raises(UserError, match="is not a run folder: it has no metrics.jsonl"):
        load_run(run.path)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("[]", "is not a JSON object"),
        ("{}", "lacks 'versions'"),
        (json.dumps(ENVIRONMENT | {"total_steps": 0}), "has total_steps 0"),
        (json.dumps(ENVIRONMENT | {"total_steps": "840"}), "has total_steps '840'"),
        (json.dumps(ENVIRONMENT | {"peak_flops": []}), r"has peak_flops \[\]"),
        (json.dumps(ENVIRONMENT | {"started": "yesterday"}), "has started 'yesterday', not a time"),
    ],
)
def test_damaged_environment(make_run: MakeRun, text: str, problem: str) -> None:
    run = make_run([])
    run.environment.write_text(text)
    with pytest.raises(UserError, match=problem):
        load_run(run.path)
