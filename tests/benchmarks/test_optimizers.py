"""The comparison of optimizers: how rates are tried, what a second start repeats, and a measurement of tiny runs."""

import json
import math
import subprocess
from dataclasses import replace
from pathlib import Path
from threading import Lock

import pytest

from benchmarks import optimizers
from benchmarks.optimizers import (
    FIRST_RATES,
    GRID,
    KINDS,
    MOST_RATES,
    Experiment,
    best_rate,
    divergence,
    main,
    next_rate,
    report,
    state_bytes_per_parameter,
)
from benchmarks.recipe_runs import Ran, Runs, Shards
from fastvit_engine.engine.optimizers.state import STATE_BYTES
from tests.benchmarks.test_resolution import EVALUATION_ROW, TRAINING_ROW
from tests.fastvit_engine.warm_ranks import run_ranks

BEST = {"adamw": 5e-3, "sgd": 1.0, "muon": 1e-3}  # of the fake trainings; the second and third beyond the first rates
BATCH = 4


class Commands:
    """In place of `fastvit`: a training whose accuracy falls with the distance from BEST, in powers of ten."""

    def __init__(self, diverge=()):
        self.diverge, self.words, self.lock, self.running, self.most = diverge, [], Lock(), 0, 0

    def __call__(self, words):
        with self.lock:
            self.words.append(list(words))
            self.running += 1
            self.most = max(self.most, self.running)
        try:
            return self.train(words)
        finally:
            with self.lock:
                self.running -= 1

    def train(self, words):
        settings = dict(word.split("=", 1) for word, before in zip(words[1:], words, strict=False) if before == "--set")
        kind, rate = settings["optimizer.kind"], float(settings["optimizer.learning_rate"])
        run = Path(words[words.index("--out") + 1])
        run.mkdir(exist_ok=True)
        if run.name in self.diverge:
            event = {"event": "anomaly", "message": "at step 3, the loss is nan"}
            (run / "events.jsonl").write_text(f"{json.dumps(event)}\n")
            raise subprocess.CalledProcessError(2, words)
        top1 = 0.9 - 0.1 * abs(math.log10(rate / BEST[kind])) + 0.01 * int(settings["seed"])
        rows = [
            {**TRAINING_ROW, "step": step, "samples": BATCH * step, "images_per_second": 10.0 * step, "update": 0.25}
            for step in range(1, 13)
        ]
        rows.append({**EVALUATION_ROW, "step": 12, "top1": top1})
        (run / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        (run / "environment.json").write_text(f'{{"global_batch_size": {BATCH}}}')
        return Ran("", 2.0, 1.0)


@pytest.fixture
def experiment(empty_shards, tmp_path, monkeypatch):
    monkeypatch.setattr(optimizers, "state_bytes_per_parameter", lambda run: 8.0)
    (tmp_path / "runs").mkdir()
    return Experiment(Shards.of(empty_shards), Runs(tmp_path / "runs", Commands(), 1), say=lambda line: None)


def names(commands):
    return [Path(words[words.index("--out") + 1]).name for words in commands.words]


def listed(words, split):
    pattern = next(word for word in words if word.startswith(f"data.{split}=")).partition("@")[2]
    return [Path(line).name for line in Path(pattern).read_text().split()]


def test_every_kind_has_first_rates_that_are_neighbours():
    assert set(FIRST_RATES) == set(KINDS) == set(STATE_BYTES)
    for rates in FIRST_RATES.values():
        place = GRID.index(rates[0])
        assert rates == GRID[place : place + 3]
    assert all(1.9 < following / rate < 2.6 for rate, following in zip(GRID, GRID[1:], strict=False))


@pytest.mark.parametrize(
    ("top1", "following"),
    [
        ({1e-3: 0.1, 2e-3: 0.3, 5e-3: 0.2}, None),
        ({1e-3: 0.1, 2e-3: 0.2, 5e-3: 0.3}, 1e-2),
        ({1e-3: 0.3, 2e-3: 0.2, 5e-3: 0.1}, 5e-4),
        ({1e-3: -1.0, 2e-3: -1.0}, 5e-4),  # all diverged
        ({rate: rate for rate in GRID[:MOST_RATES]}, None),
        ({GRID[0]: 1.0, GRID[1]: 0.0}, None),
    ],
)
def test_the_grid_is_widened_beyond_a_best_rate_at_its_end(top1, following):
    assert next_rate(top1) == following


def test_the_lowest_of_equally_good_rates_is_chosen():
    assert best_rate({5e-3: 0.5, 1e-3: 0.5, 2e-3: 0.4}) == 1e-3


def test_rates_are_tried_on_the_held_out_shard_and_the_best_is_measured_on_the_test_images(experiment):
    commands = experiment.runs.command
    found = experiment.measure(["adamw", "sgd"], [0, 1])
    tries = [words for words in commands.words if "/try-" in words[words.index("--out") + 1]]
    rest = [words for words in commands.words if words not in tries]
    assert {(*listed(words, "train"), *listed(words, "eval")) for words in tries} == {
        ("train-000000.tar", "train-000001.tar")
    }
    assert all(
        listed(words, "train") == ["train-000000.tar", "train-000001.tar"]
        and listed(words, "eval") == ["test-000000.tar", "test-000001.tar"]
        for words in rest
    )
    assert len(rest) == 4 and sorted(names(commands)[-4:]) == ["adamw-0", "adamw-1", "sgd-0", "sgd-1"]
    assert all(words[words.index("--cpu-processes") + 1] == "1" for words in commands.words) and commands.most <= 2
    adamw, sgd = found["adamw"], found["sgd"]
    assert (adamw["learning_rate"], sgd["learning_rate"]) == (5e-3, 1.0)
    assert [one["learning_rate"] for one in sgd["tries"]] == [0.1, 0.2, 0.5, 1.0, 2.0]
    assert not adamw["at_end_of_tries"] and not sgd["at_end_of_tries"]
    assert adamw["top1"] == {"mean": pytest.approx(0.905), "std": pytest.approx(0.005)}
    # intervals but the first, at 10 images/s times the step
    assert adamw["seconds_per_step"]["median"] == pytest.approx(BATCH / 70)
    assert adamw["seconds_per_update"] == pytest.approx(BATCH / 70 / 4)
    assert adamw["seconds_per_step"]["fastest tenth"] < BATCH / 110


def test_every_kind_trains_with_the_same_settings_but_its_own(experiment):
    found = experiment.measure(["adamw", "sgd", "muon"], [0])
    made = [one["made_of"] for one in found.values()]
    assert len({json.dumps({**one, "optimizer": None}) for one in made}) == 1
    assert {one["optimizer"]["weight_decay"] for one in made} == {0.0}


def test_what_was_measured_is_read_and_other_settings_are_refused(experiment):
    commands = experiment.runs.command
    first = experiment.measure(["adamw"], [0])
    count = len(commands.words)
    assert experiment.measure(["adamw"], [0]) == first and len(commands.words) == count
    experiment.measure(["adamw"], [0, 1])
    assert names(commands)[count:] == ["adamw-1"]
    shards = experiment.shards
    for other in (
        replace(experiment, steps=299),
        replace(experiment, settings=("model.depth=3",)),
        replace(experiment, shards=replace(shards, test=shards.test[:1])),
    ):
        with pytest.raises(SystemExit, match="is of other settings or shards: name another folder with --runs"):
            other.measure(["adamw"], [0])
    assert len(commands.words) == count + 1


def test_a_rate_that_diverges_is_the_worst_and_is_named(experiment, tmp_path):
    experiment.runs.command.diverge = ("try-adamw-0.01",)
    tries = experiment.measure(["adamw"], [0])["adamw"]["tries"]
    assert [(one["learning_rate"], one["top1"] is None) for one in tries] == [
        (2e-3, False), (5e-3, False), (1e-2, True),
    ]  # fmt: skip
    assert json.loads((tmp_path / "runs" / "try-adamw-0.01.json").read_text())["diverged"].startswith("at step 3")


def test_a_seed_that_diverges_at_the_best_rate_is_an_error(experiment):
    experiment.runs.command.diverge = ("adamw-1",)
    with pytest.raises(SystemExit, match="adamw diverged with seed 1 at its best rate, 0.005: at step 3"):
        experiment.measure(["adamw"], [0, 1])


def test_a_kind_that_always_diverges_is_an_error(experiment):
    experiment.runs.command.diverge = tuple(f"try-adamw-{rate:g}" for rate in GRID)
    with pytest.raises(SystemExit, match="adamw diverged at every rate that was tried"):
        experiment.measure(["adamw"], [0])
    assert len(experiment.runs.command.words) == MOST_RATES


def test_a_run_that_fails_otherwise_is_no_divergence(experiment, tmp_path):
    def command(words):
        raise subprocess.CalledProcessError(1, words)

    with pytest.raises(subprocess.CalledProcessError):
        replace(experiment, runs=Runs(tmp_path / "runs", command, 1)).measure(["adamw"], [0])
    assert not list((tmp_path / "runs").glob("*.json"))
    assert divergence(tmp_path) is None


@pytest.mark.distributed
def test_tiny_models_from_shards_to_a_table(tmp_path, write_tar, photo, monkeypatch):
    """As `python -m benchmarks.optimizers` does it, one training at a time, with ranks that start in no time."""
    folder, out, log = tmp_path / "shards", tmp_path / "out", tmp_path / "log"
    folder.mkdir()
    for shard, name in enumerate(("train-000000.tar.gz", "train-000001.tar.gz", "test-000000.tar.gz")):
        numbers = range(16 * shard, 16 * shard + 16)
        members = [((f"{n:03d}.jpg", photo(n, 32, 32)), (f"{n:03d}.cls", str(n % 10).encode())) for n in numbers]
        write_tar(folder / name, [member for pair in members for member in pair])

    def command(words):
        assert run_ranks(words, 1, log), log.read_text()
        return Ran("", 1.0, 1.0)

    monkeypatch.setattr(optimizers, "AT_ONCE", 1)
    monkeypatch.setattr(optimizers, "MOST_RATES", 1)
    monkeypatch.setattr(optimizers, "FIRST_RATES", {"adamw": (1e-3,), "adafactor": (1e-3,), "sgd": (1e-3,)})
    tiny = ["model.width=16", "model.depth=1", "model.heads=2", "train.global_batch_size=8", "data.num_workers=0"]
    tiny += ["train.log_every=1", "data.streams=1", "data.shuffle_buffer=8"]
    words = [str(folder), "--out", str(out), "--runs", str(tmp_path / "runs"), "--seeds", "0", "--steps", "4"]
    main([*words, "--kinds", "adamw", "adafactor", "sgd", *(w for one in tiny for w in ("--set", one))], command)
    record, text = json.loads((out / "optimizers.json").read_text()), (out / "optimizers.md").read_text()
    found = record["kinds"]
    assert found["adamw"]["state_bytes_per_parameter"] == 8.0 and found["sgd"]["state_bytes_per_parameter"] == 4.0
    assert 2 < found["adafactor"]["state_bytes_per_parameter"] < 6
    assert found["adamw"]["seeds"][0]["curve"][-1][0] == 4 and found["adamw"]["seeds"][0]["samples"] == 16
    assert 0 < found["adamw"]["seconds_per_update"] < found["adamw"]["seconds_per_step"]["median"]
    assert text == report(record) and "| `adafactor` | " in text and "* `sgd`: 0.001: " in text
    assert "**the best is at an end of those tried**" in text
    assert str(tmp_path) not in text + json.dumps(record) and "hostname" not in record["environment"]
    assert all((out / f"optimizers.{form}").stat().st_size > 1000 for form in ("svg", "png"))


def test_the_state_of_a_run_without_a_checkpoint_is_not_made_up(tmp_path):
    with pytest.raises(Exception, match=str(tmp_path.name)):
        state_bytes_per_parameter(tmp_path)
