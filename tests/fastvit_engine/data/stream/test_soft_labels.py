"""Training on a teacher's probabilities: which labels a run learns, and what is refused."""

import json
from itertools import islice

import numpy as np
import pytest
import torch

from fastvit_engine.data import prepare_data
from fastvit_engine.data.shards.soft_labels import SOFT_MEMBER, format_soft_label
from fastvit_engine.errors import UserError

SHARES = np.array([0.5, 0.25], np.float32)


def _soft(number: int) -> bytes:
    """Of three classes: the sample's own, the next one, and the rest."""
    return format_soft_label(np.array([number % 3, (number + 1) % 3]), SHARES, 3)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory, write_tar, photo):
    """Shards with soft labels: samples t00 .. t07, two shards."""
    folder = tmp_path_factory.mktemp("labelled")
    for shard in range(2):
        members = []
        for number in range(4 * shard, 4 * shard + 4):
            members += [(f"t{number:02d}.jpg", photo(number)), (f"t{number:02d}.cls", str(number % 3).encode())]
            members.append((f"t{number:02d}.{SOFT_MEMBER}", _soft(number)))
        write_tar(folder / f"part-{shard}.tar", members)
    return folder


def _describe(folder, classes=("a", "b", "c"), kind="soft"):
    """Writes a dataset.json as `fastvit data label` does."""
    shards = {path.name: 4 for path in sorted(folder.glob("*.tar"))}
    info = {
        "classes": classes, "source": "x", "seed": 0, "eval_fraction": None, "samples_per_shard": 4,
        "teacher": {"model": "runs/teacher", "weights": "00", "kind": kind},
        "train": {"samples": 8, "shards": shards}, "eval": {"samples": 0, "shards": {}},
    }  # fmt: skip
    (folder / "dataset.json").write_text(json.dumps(info))


def _batches(config, tmp_path, count, consumed=0):
    plan = prepare_data(config, world_size=1, index_folder=tmp_path / "run")
    batches = plan.train_batches(
        config, rank=0, world_size=1, micro_batch_size=4, consumed=consumed, pin_memory=False, node_ranks=()
    )
    return [(batch.keys, batch.labels.clone()) for batch in islice(batches, count)]


@pytest.mark.parametrize(("order", "workers"), [("indexed", 0), ("indexed", 2), ("stream", 0), ("stream", 1)])
def test_labels_of_a_batch_are_the_probabilities_of_its_samples(labelled, tmp_path, make_config, order, workers):
    config = make_config(labelled, batch=4, order=order, soft_labels=True, num_workers=workers)
    for keys, labels in _batches(config, tmp_path, 4):
        assert labels.dtype == torch.float32 and labels.shape == (4, 3)
        for key, row in zip(keys, labels, strict=True):
            number = int(key[1:])
            expected = np.roll([0.5, 0.25, 0.25], number % 3)
            np.testing.assert_allclose(row, expected, rtol=1e-6)


def test_samples_without_soft_labels_are_learned_by_their_class(labelled, shards, tmp_path, make_config):
    mixture = [{"shards": str(shards), "weight": 1}, {"shards": str(labelled), "weight": 1}]
    found = _batches(make_config(mixture, batch=4, soft_labels=True, lanes=1), tmp_path, 10)
    rows = {key: row for keys, labels in found for key, row in zip(keys, labels.tolist(), strict=True)}
    assert {key[0] for key in rows} == {"s", "t"}
    for key, row in rows.items():
        number = int(key[1:])
        assert row == pytest.approx(np.roll([1, 0, 0] if key[0] == "s" else [0.5, 0.25, 0.25], number % 3).tolist())


def test_without_them_the_most_probable_class_is_learned(labelled, tmp_path, make_config):
    for keys, labels in _batches(make_config(labelled, batch=4, soft_labels=False), tmp_path, 2):
        assert labels.tolist() == [int(key[1:]) % 3 for key in keys]


@pytest.mark.parametrize("order", ["indexed", "stream"])
@pytest.mark.parametrize("described", [False, True])
def test_a_run_says_which_labels_it_learns(labelled, shards, tmp_path, make_config, order, described):
    if described:
        _describe(labelled)
    try:
        with pytest.raises(UserError, match=r"has soft labels beside its classes: set data\.soft_labels=true to learn"):
            _batches(make_config(labelled, order=order), tmp_path, 1)
    finally:
        (labelled / "dataset.json").unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"data\.soft_labels is true, and .* of data\.train has none"):
        _batches(make_config(shards, order=order, soft_labels=True), tmp_path, 1)


def test_sources_that_number_other_classes_are_refused(labelled, tmp_path, make_config, write_tar, sample_members):
    _describe(labelled)
    other = tmp_path / "other"
    other.mkdir()
    write_tar(other / "part-0.tar", sample_members(range(4)))
    _describe(other, ("a", "c", "b"), "hard")
    mixture = [{"shards": str(other)}, {"shards": str(labelled)}]
    try:
        with pytest.raises(UserError, match="class 1 is 'c' in .* of data.train and 'b' in .*: give"):
            _batches(make_config(mixture, soft_labels=True), tmp_path, 1)
    finally:
        (labelled / "dataset.json").unlink()


def test_evaluation_is_by_class_and_says_whose_classes_they_are(labelled, tmp_path, make_config):
    _describe(labelled)
    config = make_config(f"{labelled}/part-0.tar", eval=f"{labelled}/part-1.tar", soft_labels=True)
    try:
        plan = prepare_data(config, world_size=1, index_folder=tmp_path / "run")
        (batch,) = plan.eval_batches(config, rank=0, world_size=1, batch_size=4, pin_memory=False)
        assert batch.labels.tolist() == [1, 2, 0, 1]
        assert "the labels of data.eval are what runs/teacher takes the images for, not the truth" in plan.describe()
    finally:
        (labelled / "dataset.json").unlink()


def test_a_damaged_soft_label_is_named(tmp_path, make_config, write_tar, photo):
    members = [("a.jpg", photo(0)), ("a.cls", b"0"), (f"a.{SOFT_MEMBER}", _soft(0)[:-4])]
    write_tar(tmp_path / "part-0.tar", members)
    with pytest.raises(UserError, match=r"sample 'a' of shard .* has soft labels in 'soft\.npy' that are cut short"):
        _batches(make_config(tmp_path, batch=1, soft_labels=True), tmp_path, 1)


def test_training_without_labels_does_not_ask_which(labelled, tmp_path, make_config):
    config = make_config(labelled, batch=4, soft_labels=None)
    model = config.model.model_copy(update={"num_classes": 0})
    ((_, labels),) = _batches(config.model_copy(update={"model": model}), tmp_path, 1)
    assert not labels.any()
