"""Study files: what they say, what is refused, and those that come with the engine."""

import pytest
from hypothesis import given

from fastvit_engine.errors import UserError
from fastvit_engine.recipe_files import study_paths
from fastvit_engine.study.definition import find_study, read_study, variants
from fastvit_engine.study.planning import plan_study
from tests.fastvit_engine.fuzzing import fuzz, mutated, read_or_refuse

SHIPPED = ("table7", "table8", "data_size", "compute", "pooling", "shapes", "optimizers")


def test_an_entry_stands_for_every_combination_of_its_lists(write_study):
    runs = [
        {"model.pool": ["cls", "gap"], "optimizer.learning_rate": [0.1, 0.2], "label": "a"},
        {"optimizer.betas": [[0.9, 0.95], [0.9, 0.99]], "recipe": "photos"},
        {},
    ]
    path = write_study(runs=runs)
    found = variants(read_study(path), path)
    assert [variant.settings for variant in found[:4]] == [
        {"model.pool": pool, "optimizer.learning_rate": rate} for pool in ("cls", "gap") for rate in (0.1, 0.2)
    ]
    assert [variant.settings for variant in found[4:]] == [
        {"optimizer.betas": [0.9, 0.95]},
        {"optimizer.betas": [0.9, 0.99]},
        {},
    ]
    assert [(variant.label, variant.recipe) for variant in found] == [
        *[("a", "quickstart")] * 4,
        *[(None, "photos")] * 2,
        (None, "quickstart"),
    ]


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"recipe": "left out"}, r"tiny\.yaml has no 'recipe': add it"),
        ({"runs": []}, "runs is "),
        ({"seeds": 0}, r"tiny\.yaml:\d+\): seeds is 0: input should be greater than 0"),
        ({"seed": 1}, r"tiny\.yaml:\d+\): there is no 'seed'; a study has name, title, recipe, settings, seeds"),
        ({"figure": {"z": 1}}, "there is no 'figure.z'; a study has x, lines, log"),
        ({"name": "a/b"}, "name is 'a/b': use letters, digits"),
        ({"settings": {"seed": 3}}, "sets seed of its runs: leave it out"),
        ({"runs": [{"model": {"pool": "cls"}}]}, "has a section 'model': write dotted keys, such as model.pool"),
        ({"runs": [{"model.pool": []}]}, "model.pool has an empty list of values"),
        ({"runs": [{"model.pool": ["cls", "cls"]}]}, "has two runs with pool=cls: leave one of them out"),
        ({"runs": [{"label": 3}]}, "label of an entry of runs is 3: write one text"),
        (
            {"figure": {"x": "model.depth"}},
            "figure.x is 'model.depth', which its runs do not differ in; they differ in",
        ),
        (
            {"runs": [{"train.global_batch_size": list(range(200)), "seed.x": list(range(200))}]},
            "more than 10,000 runs",
        ),
    ],
)
def test_what_is_no_study_is_refused(write_study, keys, says):
    path = write_study(**keys)
    with pytest.raises(UserError, match=says) as error:
        variants(read_study(path), path)
    assert "\n" not in str(error.value)


def test_a_date_is_no_setting(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("name: a\nrecipe: quickstart\nruns:\n  - {model.pool: 2020-01-01}\n")
    with pytest.raises(UserError, match=r"model\.pool is datetime.*, which no setting can be"):
        read_study(path)


def test_a_wrong_name_is_told_what_was_probably_meant():
    with pytest.raises(UserError, match="no study or file named 'poling'; did you mean 'pooling' or"):
        find_study("poling")
    with pytest.raises(UserError, match="there are .*optimizers, optimizers_full, pooling"):
        find_study("zzz")


@fuzz
@given(mutated([find_study(name).read_bytes() for name in ("shapes", "shapes_full")], [b"runs:", b"label", b"[]"]))
def test_a_malformed_study_ends_in_one_sentence(tmp_path, content):
    path = tmp_path / "study.yaml"
    path.write_bytes(content)
    read_or_refuse(lambda: variants(read_study(path), path))


# ---- those that come with the engine


def test_every_study_has_a_small_and_a_full_size():
    assert set(study_paths()) == {*SHIPPED, *(f"{name}_full" for name in SHIPPED)}
    for name, path in study_paths().items():
        study = read_study(path)
        assert study.name == name and study.title
        first = path.read_text().partition("name:")[0]
        assert ("NOT RUN YET" in first) == name.endswith("_full")
        assert ("CPU" in first) != name.endswith("_full")


@pytest.mark.parametrize("name", list(study_paths()))
def test_every_run_of_a_shipped_study_is_valid(name, digits):
    path = find_study(name)
    study = read_study(path)
    given = [f"data.train={digits}/train-*.tar", f"data.eval={digits}/eval-*.tar"]
    if name.endswith("_full"):
        given += ["data.train_samples=303000000", f"evaluate.fewshot.train={digits}", f"evaluate.fewshot.eval={digits}"]
    runs = plan_study(study, path, given)
    assert len({run.name for run in runs}) == len(runs) == len(variants(study, path)) * study.seeds
    if not name.endswith("_full"):
        operations = sum(run.computed_flops for run in runs)
        # what cifar10_cpu computes a second on two cores at rest; start and evaluations took 18 s, of a ResNet 60 s
        seconds = operations / 60e9 + 30 * len(runs)
        assert seconds < 3600, f"{seconds / 60:.0f} minutes"
