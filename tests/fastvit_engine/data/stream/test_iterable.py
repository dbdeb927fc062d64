"""An iterable of the user's own as training data: what it may give, and what is refused."""

import pickle
from itertools import count, cycle, islice

import numpy as np
import pytest
import torch
import webdataset as wds
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from fastvit_engine.config import Config
from fastvit_engine.data import IterableData, Share, prepare_data
from fastvit_engine.data.stream.iterable import to_batch
from fastvit_engine.errors import UserError

SIZE, CLASSES = 16, 3


@pytest.fixture
def config(make_config):
    return lambda batch=8, **data: make_config("", batch=batch, **data)


def _image(n: int) -> np.ndarray:
    return np.full((SIZE, SIZE, 3), n % 256, np.uint8)


def _pairs(numbers):
    return [(_image(n), n % CLASSES) for n in numbers]


def _train(data, config, rank=0, world_size=1, micro_batch_size=4, consumed=0, skipped=()):
    options = {"rank": rank, "world_size": world_size, "micro_batch_size": micro_batch_size, "consumed": consumed}
    return data.train_batches(config, **options, pin_memory=False, skipped=skipped)


def _numbers(batches, count):
    return [int(image[0, 0, 0]) for batch in islice(batches, count) for image in batch.images]


# ---- what items may be


CHW = np.moveaxis(_image(5), -1, 0)
ITEMS = {
    "array": (_image(5), 2),
    "planes": (CHW, 2),
    "flipped": (_image(5)[:, ::-1], 2),
    "BGR": (_image(5)[..., ::-1], 2),
    "flipped batch": (_image(5)[None, :, ::-1], [2]),
    "tensor": (torch.from_numpy(_image(5)), torch.tensor(2)),
    "tensor of planes": (torch.from_numpy(CHW.copy()), np.int64(2)),
    "Pillow": (Image.fromarray(_image(5)), 2),
    "list": [_image(5), [2]],
    "dict": {"image": _image(5), "label": 2},
    "members": {"__key__": "k", "__url__": "u", "jpg": _image(5), "cls": 2},
    "field": {"png": CHW, "json": {"a": 2}},
    "batch of one": (_image(5)[None], [2]),
    "batch of planes": (torch.from_numpy(CHW.copy())[None], torch.tensor([2])),
    "batch of one with its labels filled up": (_image(5)[None], torch.tensor([[2, -1]])),
}


@pytest.mark.parametrize("kind", ITEMS)
def test_items(config, kind):
    configuration = config(label_key="json.a") if kind == "field" else config()
    batch = to_batch(ITEMS[kind], configuration, "item 0")
    assert batch.images.shape == (1, SIZE, SIZE, 3) and batch.images.dtype == torch.uint8 and (batch.images == 5).all()
    assert batch.labels.tolist() == [2] and batch.labels.dtype == torch.int64 and batch.weights.tolist() == [1.0]
    assert batch.keys == ["k" if kind == "members" else ""]


def test_a_flipped_image_stays_flipped(config):
    image = np.arange(SIZE * SIZE * 3).reshape(SIZE, SIZE, 3).astype(np.uint8)
    batch = to_batch((image[:, ::-1, ::-1], 2), config(), "item 0")
    assert (batch.images[0].numpy() == np.flip(image, (1, 2))).all()


@pytest.mark.parametrize("item", [{"image": _image(7)}, {"image": _image(7), "label": "a caption"}, (_image(7), None)])
def test_without_classes_items_need_no_label(config, item):
    config = config()
    config = config.model_copy(update={"model": config.model.model_copy(update={"num_classes": 0})})
    batched = {"images": np.stack([_image(7)] * 2)}
    for given, size in ((item, 1), (batched, 2)):
        batch = to_batch(given, config, "item 0")
        assert batch.labels.tolist() == [0] * size and batch.images.eq(7).all() and len(batch.images) == size
    with pytest.raises(UserError, match="has no image, only label"):
        to_batch({"label": 1}, config, "item 0")


def test_several_labels(config):
    several = config(max_labels=3)
    for labels in ([[2, 0], [1]], torch.tensor([[2, 0, -1], [1, -1, -1]]), np.array([[2, 0], [1, -1]])):
        batch = to_batch((np.stack([_image(0), _image(1)]), labels), several, "item 0")
        assert batch.labels.tolist() == [[2, 0, -1], [1, -1, -1]]
    assert to_batch((_image(0), [0, 2]), several, "item 0").labels.tolist() == [[0, 2, -1]]


BAD = {
    "text": ("hello", "is a str: yield"),
    "three": ((_image(0), 1, 2), "is a tuple of 3: yield"),
    "no image": ({"label": 1, "x": 2}, "has no image, only label, x: yield"),
    "no label": ({"image": _image(0)}, "has no label, only image: yield"),
    "encoded": ((b"\xff\xd8", 1), "has an image of type bytes: decode it"),
    "float": ((_image(0).astype(np.float32), 1), "has an image of float32: give uint8, 0 to 255"),
    "small": ((_image(0)[:8], 1), r"has an image of shape \[8, 16, 3\]: crop or resize it to \[16, 16, 3\]"),
    "gray": ((_image(0)[..., 0], 1), r"has an image of shape \[16, 16\]"),
    "four channels": ((np.zeros((4, 16, 16), np.uint8), 1), r"has an image of shape \[4, 16, 16\]"),
    "empty batch": ((np.zeros((0, 16, 16, 3), np.uint8), []), "has 0 images"),
    "too few labels": ((np.stack([_image(0)] * 3), [1, 2]), r"has 3 images and labels \[1, 2\]"),
    "one label for a batch": ((np.stack([_image(0)] * 3), 1), "has 3 images and labels 1"),
    "true": ((_image(0), True), r"has the label \[True\]: give class indices"),
    "float label": ((_image(0), 1.0), r"has the label \[1\.0\]: give class indices"),
    "one-hot": ((_image(0), torch.eye(3)[1]), r"has the label \[0\.0, 1\.0, 0\.0\]: give class indices"),
    "name": ((_image(0), "cat"), r"has the label \['cat'\]: give class indices"),
    "out of range": ((_image(0), 3), r"has label 3, outside 0\.\.2"),
    "negative": ((_image(0), -2), r"has label -2, outside 0\.\.2"),
    "none": ((_image(0), []), "has 0 labels, and training takes 1 to 1"),
    "filled up with nothing": ((_image(0)[None], [[-1]]), "has 0 labels, and training takes 1 to 1"),
    "too many": ((_image(0), [0, 1]), "has 2 labels, and training takes 1 to 1"),
    "keys": ({"image": _image(0)[None], "label": [1], "__key__": "k"}, "has the keys 'k' for 1 images"),
}


@pytest.mark.parametrize("kind", BAD)
def test_items_that_are_refused(config, kind):
    item, message = BAD[kind]
    with pytest.raises(UserError, match=f"^item 0 of the training data {message}") as error:
        next(_train(IterableData([item] * 9), config()))
    assert "\n" not in str(error.value)


# ---- batches


@pytest.mark.parametrize("chunk", [None, 1, 3, 4, 7, 40])
def test_micro_batches_are_exact_whatever_the_items_are(config, chunk):
    pairs = _pairs(range(40))
    items = pairs
    if chunk is not None:
        parts = [pairs[n : n + chunk] for n in range(0, 40, chunk)]
        items = [(np.stack([image for image, _ in part]), [label for _, label in part]) for part in parts]
    batches = list(islice(_train(IterableData(items), config()), 20))
    assert all(batch.images.shape == (4, SIZE, SIZE, 3) and batch.weights.tolist() == [1.0] * 4 for batch in batches)
    numbers = [int(image[0, 0, 0]) for batch in batches for image in batch.images]
    assert numbers == list(range(40)) * 2  # an iteration that ends is followed by the next
    assert [n % CLASSES for n in numbers] == [n for batch in batches for n in batch.labels.tolist()]
    assert len({key for batch in batches for key in batch.keys}) == 80


def test_draws_are_by_the_position_in_the_run(config):
    """So that mixing and RandAugment differ between ranks and steps, and come back at a resume."""
    whole = list(islice(_train(IterableData(_pairs(range(99))), config()), 6))
    seeds = np.concatenate([batch.seeds for batch in whole])
    assert len(set(seeds.tolist())) == 24
    parts = [_train(IterableData(_pairs(range(99))), config(), rank, 2) for rank in range(2)]
    shared = [np.concatenate([batch.seeds for batch in islice(part, 3)]) for part in parts]
    assert sorted(np.concatenate(shared).tolist()) == sorted(seeds.tolist())
    later = next(_train(IterableData(_pairs(range(99))), config(), consumed=16))
    assert later.seeds.tolist() == whole[4].seeds.tolist()
    skipped = next(_train(IterableData(_pairs(range(99))), config(), skipped=[(0, 8)]))
    assert skipped.seeds.tolist() == whole[2].seeds.tolist()
    reseeded = next(_train(IterableData(_pairs(range(99))), config(seed=1)))
    assert not set(reseeded.seeds.tolist()) & set(seeds.tolist())


def test_a_function_gets_its_share(config):
    shares = []

    def make(share: Share):
        shares.append(share)
        return iter(_pairs(range(share.rank, 24, share.world_size)))

    batches = [_train(IterableData(make), config(), rank, 2, consumed=16) for rank in range(2)]
    assert _numbers(batches[0], 4) == [*range(0, 24, 2), 0, 2, 4, 6]
    assert _numbers(batches[1], 3) == list(range(1, 24, 2))
    assert shares == [Share(0, 2, 16), Share(0, 2, 40), Share(1, 2, 16)]  # 12 samples of each rank are 24 of the run


def test_a_loader_with_workers(config):
    class Images(Dataset):
        def __len__(self):
            return 24

        def __getitem__(self, n):
            return torch.from_numpy(_image(n)), n % CLASSES

    loader = DataLoader(Images(), batch_size=6, num_workers=2)
    assert _numbers(_train(IterableData(loader), config()), 12) == list(range(24)) * 2


def test_a_webdataset_pipeline(config, shards):
    def crop(image: Image.Image) -> np.ndarray:
        return np.asarray(image.resize((SIZE, SIZE)))

    pipeline = wds.WebDataset(sorted(map(str, shards.glob("*.tar"))), shardshuffle=False, empty_check=False)
    pairs = pipeline.decode("pil").to_tuple("jpg", "cls").map_tuple(crop, int).batched(5)
    dicts = pipeline.decode("pil").map_dict(jpg=crop)
    for given, keys in ((pairs, False), (dicts, True)):
        (batch,) = islice(_train(IterableData(given), config(batch=35), micro_batch_size=35), 1)
        assert batch.labels.tolist() == [n % 3 for n in range(35)]
        assert batch.keys == [f"s{n:03d}" if keys else f"position-{n}" for n in range(35)]


# ---- too few samples


def test_too_few_samples(config):
    with pytest.raises(UserError, match="gave 0 samples before it ended, fewer than the 8 that one step takes"):
        next(_train(IterableData([]), config()))
    with pytest.raises(UserError, match="gave 5 samples before it ended, fewer than the 8"):
        list(islice(_train(IterableData(_pairs(range(5))), config()), 3))
    with pytest.raises(UserError, match="gave 3 samples before it ended, fewer than the 4"):
        list(islice(_train(IterableData(_pairs(range(3))), config(), rank=1, world_size=2), 3))


def test_an_iterator_that_is_used_up(config):
    batches = _train(IterableData(iter(_pairs(range(10)))), config())
    assert _numbers(batches, 2) == list(range(8))
    with pytest.raises(UserError, match="was used up after 10 samples, before the run had ended: give an endless one"):
        next(batches)
    assert len(list(islice(_train(IterableData(cycle(_pairs(range(3)))), config()), 30))) == 30


def test_an_iterator_goes_on_where_it_is_when_training_starts_anew(config):
    """As after going back to a checkpoint within a run."""
    data = IterableData((_image(n), 0) for n in count())
    assert _numbers(_train(data, config()), 2) == list(range(8))
    assert _numbers(_train(data, config(), consumed=0), 2)[0] >= 8


# ---- as the data of a run


def test_prepared_with_evaluation_shards(config, shards, tmp_path, make_config):
    with_eval = make_config("", eval=shards)
    given = IterableData(_pairs(range(30)), samples_per_epoch=30)
    data = prepare_data(with_eval, world_size=2, index_folder=tmp_path, given=given)
    assert data.samples_per_epoch == 30
    there = pickle.loads(pickle.dumps(data))  # as the other processes get it: with the evaluation, without the iterable
    for each in (data, there):
        batches = list(each.eval_batches(with_eval, rank=0, world_size=1, batch_size=8, pin_memory=False))
        assert sum(int(batch.weights.sum()) for batch in batches) == 35
    with pytest.raises(RuntimeError, match="IterableData.bind"):
        _train(there, with_eval)
    assert _numbers(_train(there.bind(given), with_eval), 1) == [0, 1, 2, 3]
    longer = Config.model_validate(
        with_eval.model_dump() | {"data": {**with_eval.data.model_dump(), "train_samples": 7}}
    )
    assert prepare_data(longer, world_size=1, index_folder=tmp_path, given=given).samples_per_epoch == 7


@pytest.mark.parametrize("order", ["indexed", "stream"])
def test_prepared_without_evaluation(config, tmp_path, order):
    data = prepare_data(config(order=order), world_size=1, index_folder=tmp_path, given=IterableData(_pairs(range(9))))
    assert data.samples_per_epoch is None and data.class_names is None
    assert "does not repeat the order" in data.describe() and "\n" not in data.describe()
    assert data.fingerprint(config().data) == {"order": "iterable"}


def test_what_contradicts_is_refused(config, shards, tmp_path, make_config):
    given = IterableData(_pairs(range(9)))
    with pytest.raises(UserError, match="data.train is set, and training data is given as an iterable too"):
        prepare_data(make_config(shards), world_size=1, index_folder=tmp_path, given=given)
    with pytest.raises(UserError, match="global_batch_size is 8, fewer images than the 9 processes"):
        _train(given, config(), world_size=9, micro_batch_size=3)


def test_shares_may_differ(config):
    """8 images on 3 ranks: 3, 3 and 2 images per step, in passes of at most 2."""
    positions = []
    for rank, sizes in enumerate([[2, 1], [2, 1], [1, 1]]):
        data = IterableData(lambda share: _pairs(range(100 * share.rank, 100 * share.rank + 50)))
        batches = list(islice(_train(data, config(), rank, 3, 2), 4))
        assert [len(batch.keys) for batch in batches] == 2 * sizes
        positions += [int(key.removeprefix("position-")) for batch in batches for key in batch.keys]
        numbers = [int(image[0, 0, 0]) for batch in batches for image in batch.images]
        assert numbers == list(range(100 * rank, 100 * rank + 2 * sum(sizes)))
    assert sorted(positions) == list(range(16))


def test_a_rank_without_images_gets_padding_and_asks_for_nothing(config):
    given = config(batch=2)
    mixed = given.model_copy(update={"augment": given.augment.model_copy(update={"cutmix": 1.0})})
    data = IterableData(lambda share: pytest.fail("a rank without images has nothing to iterate over"))
    for batch in islice(_train(data, mixed, rank=1, world_size=2), 3):
        assert batch.keys == [""] and batch.weights.tolist() == [0] and batch.images.shape == (1, SIZE, SIZE, 3)
