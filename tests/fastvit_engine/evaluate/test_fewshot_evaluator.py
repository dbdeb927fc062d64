"""Few-shot accuracy in training: what ranks share is what one process measures."""

import math

import pytest
import torch

from fastvit_engine.config import ModelConfig
from fastvit_engine.data.stream.prepare import prepare_few_shot
from fastvit_engine.errors import UserError
from fastvit_engine.evaluate.features import extract_features
from fastvit_engine.evaluate.fewshot import few_shot_accuracy, summarize, tasks
from fastvit_engine.evaluate.fewshot_evaluator import FewShot
from fastvit_engine.evaluate.protocol import Evaluator
from fastvit_engine.models import build_vit
from tests.fastvit_engine.ranks import on_ranks


def new_model():
    torch.manual_seed(0)
    config = ModelConfig(name="Ti/4", image_size=16, num_classes=2, width=32, depth=1, heads=2)
    return build_vit(config, mean=(0.5,) * 3, std=(0.5,) * 3).train()


@pytest.fixture(scope="module")
def few_shot_data(make_config, shards, tmp_path_factory):
    """few_shot_data(**data) -> the shards of three classes, fitted to five of them and measured on two."""

    def make(**data):
        config = make_config(shards, **data)
        train, evaluation = (f"{shards}/part-{numbers}.tar" for numbers in ("[0-4]", "[56]"))
        few_shot = config.evaluate.fewshot.model_copy(update={"train": train, "eval": evaluation})
        evaluate = config.evaluate.model_copy(update={"fewshot": few_shot})
        return prepare_few_shot(config.model_copy(update={"evaluate": evaluate}), tmp_path_factory.mktemp("index"))

    return make


def evaluator_of(data, world, shots=(5, 1, 5)) -> Evaluator:
    def batches(shards):
        given = {"rank": world.rank, "world_size": world.size, "batch_size": 4, "pin_memory": False}
        return lambda: list(shards.eval_batches(data.config, **given))

    return FewShot(batches(data.train), batches(data.eval), shots, world, every_steps=3)


@pytest.mark.parametrize("order", ["indexed", "stream"])
def test_ranks_measure_what_one_process_does(few_shot_data, order):
    data = few_shot_data(order=order)
    given = {"rank": 0, "world_size": 1, "batch_size": 4, "pin_memory": False}
    parts = [
        extract_features(new_model(), shards.eval_batches(data.config, **given)) for shards in (data.train, data.eval)
    ]
    assert [len(part.labels) for part in parts] == [23, 12]
    arrays = [array for part in parts for array in (part.features, part.labels)]
    expected = summarize(
        (task, few_shot_accuracy(*arrays, num_classes=3, **task._asdict())) for task in tasks((1, 5), 3)
    )
    for size in (1, 2, 7):  # more ranks than classifiers, too
        models = [new_model() for _ in range(size)]
        rows = on_ranks(
            size, lambda world, own=models: evaluator_of(data, world).run(own[world.rank], step=9, name="fewshot_ema")
        )
        for (row,) in rows:
            assert (row["step"], row["eval"], row["samples"], row["l2"]) == (9, "fewshot_ema", 12, 1024.0)
            assert row["shots"] == expected and list(row["shots"]) == ["1", "5"]


def test_the_labels_need_not_be_those_of_the_training(few_shot_data, make_config):
    """The model has two classes, the shards three."""
    (rows,) = on_ranks(1, lambda world: evaluator_of(few_shot_data(), world).run(new_model(), step=1, name="fewshot"))
    assert 0 <= rows[0]["shots"]["5"]["mean"] <= 1


def test_broken_weights_are_no_end_of_the_evaluation(few_shot_data):
    """The step after it finds them, and says what is wrong."""
    model = new_model()
    torch.nn.init.constant_(model.norm.weight, math.nan)
    (rows,) = on_ranks(1, lambda world: evaluator_of(few_shot_data(), world).run(model, step=1, name="fewshot"))
    assert all(math.isnan(found["mean"]) for found in rows[0]["shots"].values())
    assert model.training


def test_shards_that_do_not_exist_are_refused_by_the_name_of_the_key(make_config, shards, tmp_path):
    config = make_config(shards)
    for changes, key in (
        ({"train": "nowhere", "eval": str(shards)}, "train"),
        ({"train": str(shards), "eval": "x"}, "eval"),
    ):
        few_shot = config.evaluate.fewshot.model_copy(update=changes)
        evaluate = config.evaluate.model_copy(update={"fewshot": few_shot})
        with pytest.raises(UserError, match=rf"evaluate\.fewshot\.{key} names the shard"):
            prepare_few_shot(config.model_copy(update={"evaluate": evaluate}), tmp_path)
    assert prepare_few_shot(config, tmp_path) is None


def test_compressed_shards_are_read_from_beginning_to_end(make_config, gzipped_shards, tmp_path):
    config = make_config(gzipped_shards)
    few_shot = config.evaluate.fewshot.model_copy(update={"train": str(gzipped_shards), "eval": str(gzipped_shards)})
    evaluate = config.evaluate.model_copy(update={"fewshot": few_shot})
    data = prepare_few_shot(config.model_copy(update={"evaluate": evaluate}), tmp_path)
    (rows,) = on_ranks(1, lambda world: evaluator_of(data, world).run(new_model(), step=1, name="fewshot"))
    assert rows[0]["samples"] == 35
