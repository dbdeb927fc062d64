"""What the runs of a study train, and what is refused before any starts."""

import pytest

from fastvit_engine.config import load_config
from fastvit_engine.errors import UserError
from fastvit_engine.models import run_flops
from fastvit_engine.study.definition import read_study
from fastvit_engine.study.planning import as_set, plan_study, same_settings


def test_runs_are_every_variant_with_every_seed(plan, digits):
    _, runs = plan(seeds=2, settings={"train.duration": "2 epochs", "train.global_batch_size": 64})
    assert [run.number for run in runs] == list(range(8))
    assert [run.settings for run in runs] == [
        {"model.pool": pool, "optimizer.learning_rate": rate, "seed": seed}
        for seed in (0, 1)
        for pool in ("cls", "gap")
        for rate in (0.001, 0.01)
    ]
    assert len({run.name for run in runs}) == 8
    assert runs[5].name == "pool-cls_learning_rate-0.01_seed-1"
    run = runs[7]
    assert run.title == "pool=gap, learning_rate=0.01, seed 1"
    assert (run.config.model.pool, run.config.seed, run.config.optimizer.learning_rate) == ("gap", 1, 0.01)
    assert run.steps == round(2 * 1438 / 64)  # counted in the shards
    assert run.exaflops == pytest.approx(run.steps * 64 * run_flops(run.config).whole / 1e18)
    few_shot = run.config.evaluate.fewshot
    assert few_shot.shots == (5,) and few_shot.train == f"{digits}/train-*.tar" and few_shot.every is None
    assert load_config(run.recipe, run.overrides).config == run.config  # what `fastvit train` makes of its arguments


def test_a_subset_counts_its_own_samples(plan):
    runs = [{"data.subset": [100, 0.5, 1.0]}]
    _, planned = plan(
        runs=runs, settings={"train.duration": "2 epochs", "train.global_batch_size": 64, "schedule.warmup": "5%"}
    )
    assert [run.steps for run in planned] == [round(2 * size / 64) for size in (100, 719, 1438)]
    assert [run.name for run in planned] == ["subset-100_seed-0", "subset-0.5_seed-0", "subset-1.0_seed-0"]


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("model.pool", "cls", "model.pool=cls"),
        ("optimizer.learning_rate", 1e-5, "optimizer.learning_rate=1.0e-05"),
        ("optimizer.betas", [0.9, 0.99], "optimizer.betas=[0.9, 0.99]"),
        ("data.subset", 1.0, "data.subset=1.0"),
        ("data.subset", 100, "data.subset=100"),
        ("evaluate.every", None, "evaluate.every=null"),
        ("augment.flip", False, "augment.flip=false"),
        ("observe.trackers", [], "observe.trackers=[]"),
        ("train.duration", "2 epochs", "train.duration=2 epochs"),
    ],
)
def test_a_value_becomes_what_set_reads_as_that_value(key, value, text):
    assert as_set(key, value) == text
    section, name = key.split(".")
    config = load_config("quickstart", [text, "schedule.warmup=0 steps"]).config
    found = getattr(getattr(config, section), name)
    assert found == (tuple(value) if isinstance(value, list) else value)
    assert type(found) is (tuple if isinstance(value, list) else type(value))


@pytest.mark.parametrize(
    ("settings", "keys", "says"),
    [
        (["seed=3"], {}, "--set seed: a study repeats every run with the seeds 0, 1, ...: write --seeds N"),
        (["model.pool=map"], {}, r"--set model\.pool: the runs of study tiny\.yaml differ in it"),
        (["model={}"], {}, "--set model: the runs of study"),
        (
            ["data.eval=null"],
            {},
            r"data\.eval is not set, and a study trains and measures every run: add --set data\.eval",
        ),
        (["train.duration=many"], {}, r"^configuration key 'train\.duration' \(--set\) is 'many'"),
        (
            [],
            {"runs": [{"model.pool": ["cls", "max"]}]},
            r"study tiny\.yaml, run with pool=max: configuration key 'model",
        ),
        (
            [],
            {"runs": [{"model.poll": ["cls"]}]},
            "run with poll=cls: unknown configuration key 'model.poll'.*model.pool",
        ),
        ([], {"recipe": "nothing"}, "no recipe or file named 'nothing'"),
        (["data.train=nowhere/*.tar"], {}, "nowhere"),
        (["data.train=nowhere/*.tar", "data.train_samples=5"], {}, "nowhere"),
        (["train.duration=0 steps"], {}, "trains nothing"),
        (
            ["data.train_samples=2000001"],
            {},
            r"few-shot accuracy on data\.train would look at 2,000,001 images once more",
        ),
    ],
)
def test_what_cannot_work_is_refused(plan, settings, keys, says):
    with pytest.raises(UserError, match=says) as error:
        plan(*settings, **keys)
    assert "\n" not in str(error.value)


def test_a_recipe_is_found_beside_the_study(write_study, data, tmp_path):
    (tmp_path / "mine.yaml").write_text("base: quickstart\nname: mine\nmodel:\n  depth: 3\n")
    path = write_study(recipe="mine.yaml", settings={"train.duration": "5 steps"})
    runs = plan_study(read_study(path), path, data)
    assert runs[0].recipe == str(tmp_path / "mine.yaml") and runs[0].config.model.depth == 3


def test_long_and_equal_names_of_folders_are_told_apart(plan):
    runs = [{"augment.crop_scale": [[0.5, 1.0], [0.5, 1]]}, {"label": "x" * 300, "model.pool": "gap"}]
    _, planned = plan(runs=runs[1:])
    assert len(planned[0].name) < 160
    names = [{"model.name": ["Ti/4", "Ti:4"]}]
    with pytest.raises(UserError):  # no such model; and yet
        plan(runs=names)


def test_a_record_is_of_a_run_if_all_settings_are_the_same(plan):
    _, runs = plan()
    written = runs[0].made_of
    assert same_settings(written, runs[0]) and not same_settings(written, runs[1])
    older = {name: value for name, value in written.items() if name != "watchdog"}
    assert same_settings(older, runs[0])  # written before there was such a section
    assert not same_settings({**written, "unknown": 1}, runs[0])


def test_no_secret_of_a_url_is_recorded(plan):
    _, runs = plan("evaluate.fewshot.train=https://user:secret@host/a.tar", "evaluate.fewshot.eval=https://host/b.tar")
    assert "secret" not in str(runs[0].made_of) and "host/a.tar" in str(runs[0].made_of)
