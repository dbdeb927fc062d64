"""Steps of a run as several world sizes, worker counts and stops give them: equal to the bit."""

import io
import json
from collections.abc import Iterator
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from fastvit_engine.data import Batch, prepare_data
from fastvit_engine.data.pixels.crops import View, eval_view, render
from fastvit_engine.data.pixels.decode import Decoded, PixelBuffer, decode_image, open_image
from fastvit_engine.data.stream.batch_split import possible_splits
from fastvit_engine.data.stream.indexed import build_order
from fastvit_engine.data.stream.read_ahead import ReadAhead
from fastvit_engine.errors import UserError

BATCH = 12
ALL_KEYS = [f"s{n:03d}" for n in range(35)]


@pytest.fixture
def plan(tmp_path):
    return lambda config: prepare_data(config, world_size=1, index_folder=tmp_path)


@pytest.fixture(scope="module")
def damaged_shards(tmp_path_factory, write_tar, sample_members, photo):
    """40 samples in three shards, among them one that is no image and one without an image member."""
    folder = tmp_path_factory.mktemp("damaged")
    members = dict(sample_members(range(40)))
    members["s007.jpg"] = b"\xff\xd8 not a photo"
    del members["s023.jpg"]
    everything = list(members.items())
    for number, (begin, end) in enumerate([(0, 22), (22, 59), (59, 79)]):
        write_tar(folder / f"{number}.tar", everything[begin:end])
    return folder


def _train(config, plan, rank=0, world_size=1, micro_batch_size=BATCH, consumed=0, skipped=()) -> Iterator[Batch]:
    return plan.train_batches(
        config,
        rank=rank,
        world_size=world_size,
        micro_batch_size=micro_batch_size,
        consumed=consumed,
        pin_memory=False,
        skipped=skipped,
    )


def _steps(
    config, plan, world_size: int, steps: int, micro_batch_size: int = 2, first_step: int = 0, skipped=()
) -> list[list]:
    """For each global step the (key, label, weight, pixels) of its samples in the order of their positions."""
    result = [[None] * BATCH for _ in range(steps)]
    split = next(possible_splits(config, world_size, micro_batch_size))
    for rank in range(world_size):
        batches = _train(config, plan, rank, world_size, micro_batch_size, first_step * BATCH, skipped)
        for step in result:
            places = iter(split.positions(rank))
            for size in split.micro_batches(rank):
                batch = next(batches)
                assert batch.images.shape == (max(size, 1), 16, 16, 3) and batch.images.dtype == torch.uint8
                assert batch.labels.dtype == torch.int64 and batch.weights.dtype == torch.float32
                if size == 0:
                    assert batch.keys == [""] and batch.weights.tolist() == [0] and not batch.images.any()
                    continue
                for key, label, weight, image in zip(batch.keys, *batch[1:3], batch.images, strict=True):
                    step[next(places)] = (key, label.item(), weight.item(), image.numpy().tobytes())
            assert next(places, None) is None
    return result


@pytest.mark.parametrize("order", ["indexed", "stream"])
def test_images_have_the_size_of_their_step_wherever_a_run_begins(shards, make_config, plan, order):
    """Also with workers that are ahead, and with micro-batches of unequal sizes; larger images are the usual ones."""
    sizes = [8, 8, 12, 12, 16, 16]  # and so on
    config = make_config(shards, batch=BATCH, num_workers=2, order=order, streams=2 if order == "stream" else None)
    data = plan(config)

    def images(first_step, steps, size_of=None):
        options = {"rank": 0, "world_size": 1, "micro_batch_size": 3, "pin_memory": False}
        batches = data.train_batches(config, **options, consumed=first_step * BATCH, image_size_of=size_of)
        micro_batches = len(next(possible_splits(config, 1, 3)).micro_batches(0))
        found = [[next(batches).images.clone() for _ in range(micro_batches)] for _ in range(steps)]
        return [torch.cat(step) for step in found]

    whole, usual = images(0, 6, lambda step: sizes[min(step, 5)]), images(0, 6)
    assert [step.shape for step in whole] == [(BATCH, size, size, 3) for size in sizes]
    for first in (1, 2, 3, 5):
        rest = images(first, 6 - first, lambda step, first=first: sizes[min(first + step, 5)])
        assert all(torch.equal(*steps) for steps in zip(rest, whole[first:], strict=True))
    assert all(torch.equal(*steps) for steps in zip(whole[4:], usual[4:], strict=True))
    small = torch.nn.functional.interpolate(usual[0].movedim(3, 1).float(), (8, 8), mode="area").movedim(1, 3)
    assert (small - whole[0]).abs().mean() < 12  # the same crops: 60 of one image from another


def test_steps_are_the_same_for_every_world_size_worker_count_and_stop(damaged_shards, make_config, plan):
    def run(num_workers, *given, **options):
        config = make_config(damaged_shards, batch=BATCH, num_workers=num_workers)
        return _steps(config, plan(config), *given, **options)

    reference = run(0, 1, 12)
    for num_workers, world_size, micro_batch_size in [
        (0, 2, 6),
        (0, 3, 1),
        (1, 3, 4),
        (2, 2, 3),
        (4, 1, 12),
        (2, 3, 2),
    ]:
        assert run(num_workers, world_size, 5, micro_batch_size=micro_batch_size) == reference[:5]
    for first_step, num_workers, world_size in [(1, 2, 1), (4, 0, 3), (10, 1, 2), (7, 4, 3)]:
        assert run(num_workers, world_size, 2, first_step=first_step) == reference[first_step : first_step + 2]
    skipped = [(2 * BATCH, 4 * BATCH), (5 * BATCH, 6 * BATCH)]
    left = [reference[step] for step in (0, 1, 4, 6, 7)]
    assert run(2, 2, 5, skipped=skipped) == left
    assert run(1, 3, 3, first_step=2, skipped=skipped) == left[2:]

    samples = [sample for step in reference for sample in step]
    keys = [sample[0] for sample in samples]
    for epoch in range(3):
        assert sorted(keys[40 * epoch : 40 * epoch + 40]) == sorted(f"s{n:03d}" for n in range(40))
    pixels = {}
    for key, label, weight, image in samples:
        if key in ("s007", "s023"):
            assert (weight, label, image.strip(b"\0")) == (0, 0, b"")
        else:
            assert (weight, label) == (1, int(key[1:]) % 3) and image.strip(b"\0")
            pixels.setdefault(key, set()).add(image)
    assert all(len(versions) > 1 for versions in pixels.values())  # augmented anew in each epoch


def test_bad_samples_are_reported_with_key_shard_and_reason(damaged_shards, make_config, plan):
    config = make_config(damaged_shards, eval=damaged_shards, allow_overlap=True, batch=40, num_workers=2)
    data = plan(config)
    for batches in (
        islice(_train(config, data, micro_batch_size=5), 8),
        data.eval_batches(config, rank=0, world_size=1, batch_size=7, pin_memory=False),
    ):
        found = sorted(bad for batch in batches for bad in batch.bad)
        assert [bad.key for bad in found] == ["s007", "s023"]
        assert [bad.shard for bad in found] == [f"{damaged_shards}/0.tar", f"{damaged_shards}/1.tar"]
        assert "has an image in 'jpg' that cannot be decoded" in found[0].reason
        assert found[1].reason == "has no 'jpg;jpeg;png;webp' member, only ['cls']"


def test_a_shard_that_is_damaged_while_training_costs_its_samples(
    tmp_path, write_tar, sample_members, make_config, plan
):
    path = write_tar(tmp_path / "a.tar", sample_members(range(6)))
    config = make_config(tmp_path, batch=6)
    data = plan(config)
    whole = path.read_bytes()
    third = whole.index(b"s002.jpg")
    path.write_bytes(whole[:third] + bytes(range(256)) * 2 + whole[third + 512 :])
    batch = next(_train(config, data, micro_batch_size=6))
    (bad,) = batch.bad
    assert bad.key == "a.tar#2" and "has a damaged header" in bad.reason
    assert {key: weight for key, weight in zip(batch.keys, batch.weights, strict=True) if weight == 0} == {"a.tar#2": 0}
    path.write_bytes(whole[:third])
    with pytest.raises(
        UserError, match=r"a\.tar has .* bytes instead of .*: restore the shard, or make the index again"
    ):
        next(_train(config, data, micro_batch_size=6))
    path.unlink()
    with pytest.raises(UserError, match=r"a\.tar does not exist"):
        next(_train(config, data, micro_batch_size=6))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_label_that_is_wrong_is_one_sentence_in_the_main_process(
    tmp_path, write_tar, sample_members, make_config, plan, num_workers
):
    """The index was made for another label member, so that nobody has looked at all labels before."""
    members = [(f"x{n}.txt", b"5" if n == 11 else b"1") for n in range(20)]
    images = dict(sample_members(range(20)))
    path = write_tar(
        tmp_path / "a.tar", [m for n in range(20) for m in (members[n], (f"x{n}.jpg", images[f"s{n:03d}.jpg"]))]
    )
    from fastvit_engine.data.shards.index import write_index

    write_index([str(path)], tmp_path / "named.index")
    named = {"index": str(tmp_path / "named.index"), "label_key": "txt", "num_workers": num_workers}
    config = make_config(path, batch=BATCH, **named)
    with pytest.raises(UserError, match=r"^sample 'x11' of shard .*a\.tar has label 5, outside 0\.\.2") as error:
        list(islice(_train(config, plan(config)), 3))
    assert "\n" not in str(error.value)


def test_sources_are_mixed_by_weight(tmp_path, write_tar, sample_members, make_config, plan):
    folders = []
    for name, numbers in (("many", range(30)), ("few", range(50, 55))):
        (tmp_path / name).mkdir()
        write_tar(tmp_path / name / "a.tar", sample_members(numbers))
        folders.append(tmp_path / name)
    train = [{"shards": str(folders[0]), "weight": 3}, {"shards": str(folders[1]), "weight": 2}]
    config = make_config(train, batch=100)
    keys = [key for batch in islice(_train(config, plan(config), micro_batch_size=100), 10) for key in batch.keys]
    assert sum(key >= "s050" for key in keys) == 400
    few = [key for key in keys if key >= "s050"]
    assert all(sorted(few[n : n + 5]) == [f"s{k:03d}" for k in range(50, 55)] for n in range(0, 400, 5))


def test_the_storage_hears_of_shards_in_the_order_of_need(shards, make_config, plan):
    class Storage:
        told: list[list[int]] = []

        def will_need(self, numbers):
            self.told.append(numbers)

    config = make_config(shards, lanes=2, window=5)
    data = plan(config)
    indexes = [source.data.open() for source in data.train]
    order, storage = build_order(config, data.train, indexes), Storage()
    places = np.array([1, 3])  # of a batch of 4: those of rank 1 of 2
    ahead = ReadAhead(build_order(config, data.train, indexes), indexes, storage, places, batch=4)
    for start in range(0, 200, 4):
        ahead.at(start)
        in_order = order.locate((start + np.arange(0, 20, 4)[:, None] + places).ravel()).shard.tolist()
        assert storage.told[-1] == list(dict.fromkeys(in_order))
    assert len(storage.told) == 50


@pytest.mark.timeout(30)
def test_workers_start_after_this_process_has_resized_large_images(shards, make_config, plan):
    whole = View(0, 0, 1500, 2000, resized=(400, 400))
    render(Decoded(np.zeros((1500, 2000, 3), np.uint8)), whole, np.empty((400, 400, 3), np.uint8), PixelBuffer())
    config = make_config(shards, batch=BATCH, num_workers=1)
    assert next(_train(config, plan(config))).weights.sum() == BATCH


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory needs a GPU")
def test_batches_are_pinned(shards, make_config, plan):
    config = make_config(shards, batch=BATCH, num_workers=1)
    given = {"rank": 0, "world_size": 1, "micro_batch_size": BATCH, "consumed": 0}
    batch = next(plan(config).train_batches(config, **given, pin_memory=True))
    assert batch.images.is_pinned() and batch.labels.is_pinned() and batch.weights.is_pinned()
    assert torch.equal(batch.images, next(_train(config, plan(config))).images)


def test_building_data_leaves_the_global_generator_alone(shards, make_config, plan):
    before = torch.get_rng_state()
    config = make_config(shards, batch=BATCH)
    next(_train(config, plan(config)))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("mixup", [0.0, 0.2])
def test_shares_that_differ_give_the_same_steps(damaged_shards, make_config, plan, num_workers, mixup):
    """12 images on 5, 7, 8 and 12 ranks, with micro-batches of which some are padding, or a rank without images."""

    def run(workers, *given, **options):
        config = make_config(damaged_shards, batch=BATCH, num_workers=workers)
        config = config.model_copy(update={"augment": config.augment.model_copy(update={"mixup": mixup})})
        return _steps(config, plan(config), *given, **options)

    reference = run(0, 1, 5)
    for world_size, micro_batch_size in [(5, 12), (5, 2), (7, 2), (8, 2), (12, 2)]:
        assert run(num_workers, world_size, 5, micro_batch_size=micro_batch_size) == reference
    assert run(num_workers, 5, 2, first_step=3) == reference[3:]


def test_more_ranks_than_images_are_refused(shards, make_config, plan):
    config = make_config(shards, batch=BATCH)
    with pytest.raises(UserError, match="global_batch_size is 12, fewer images than the 13 processes"):
        _train(config, plan(config), 0, 13, 5)


@pytest.mark.parametrize(
    ("world_size", "num_workers", "batch_size"),
    [(1, 0, 8), (1, 2, 8), (1, 3, 8), (2, 0, 4), (3, 2, 5), (4, 1, 3), (5, 0, 100), (36, 0, 2)],
)
def test_eval_counts_each_sample_once_in_equally_many_batches(
    shards, make_config, plan, photo, world_size, num_workers, batch_size
):
    config = make_config(shards, eval=shards, allow_overlap=True, num_workers=num_workers)
    data = plan(config)
    ranks = [
        list(data.eval_batches(config, rank=rank, world_size=world_size, batch_size=batch_size, pin_memory=False))
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    seen = []
    for batch in (batch for batches in ranks for batch in batches):
        assert batch.images.shape == (batch_size, 16, 16, 3)
        for row, key in enumerate(batch.keys):
            seen.append(key)
            assert batch.weights[row] == bool(key) and batch.labels[row] == (int(key[1:]) % 3 if key else 0)
            if key:
                image = decode_image(photo(int(key[1:])))
                expected = np.empty((16, 16, 3), np.uint8)
                render(
                    Decoded(image),
                    eval_view(*image.shape[:2], 16, config.data.eval_crop, config.data.eval_transform),
                    expected,
                    PixelBuffer(),
                )
                assert np.array_equal(batch.images[row].numpy(), expected)
    assert [key for key in seen if key] == ALL_KEYS


@pytest.mark.parametrize("transform", ["timm", "fast", "big_vision"])
def test_eval_images_are_prepared_as_configured(shards, make_config, plan, photo, transform):
    config = make_config(shards, eval=shards, allow_overlap=True, eval_crop=0.6, eval_transform=transform)
    batch = next(plan(config).eval_batches(config, rank=0, world_size=1, batch_size=8, pin_memory=False))
    assert batch.keys == ALL_KEYS[:8]
    for key, image in zip(batch.keys, batch.images.numpy(), strict=True):
        pixels = open_image(photo(int(key[1:])), 10**6)
        view = eval_view(pixels.height, pixels.width, 16, 0.6, transform)
        whole = pixels.decode(PixelBuffer(), view.reduction, decoding=view.decoding)
        expected = np.empty((16, 16, 3), np.uint8)
        render(Decoded(whole, reduction=view.reduction), view, expected, PixelBuffer())
        assert np.array_equal(image, expected)


@pytest.mark.parametrize("image_size", [16, 64])
def test_restart_markers_change_no_pixel(tmp_path, write_tar, make_config, photo, monkeypatch, image_size):
    """Batches of images of which crops alone are decoded, against those of the same images decoded whole."""
    monkeypatch.setattr("fastvit_engine.data.pixels.jpeg_part.WORTH", 1)
    parts, jpeg_type = [], type(open_image(photo(0)))

    def noted(image, box, reduction, *, decoding):
        def decode(buffer):
            decoded = rest(buffer)
            parts.append(decoded.pixels.size * reduction**2 / (3 * image.height * image.width))
            return decoded

        rest = cut(image, box, reduction, decoding=decoding)
        return decode

    cut = jpeg_type.cut
    monkeypatch.setattr(jpeg_type, "cut", noted)
    batches, shares = {}, {}
    for name in ("without", "with"):
        members = []
        for number in range(16):
            pixels = Image.open(io.BytesIO(photo(number, 256, 320)))
            buffer = io.BytesIO()
            pixels.save(buffer, "JPEG", quality=90, restart_marker_blocks=2 if name == "with" else 0)
            members += [(f"s{number:03d}.jpg", buffer.getvalue()), (f"s{number:03d}.cls", b"1")]
        folder = tmp_path / name
        folder.mkdir()
        write_tar(folder / "a.tar", members)
        config = make_config(folder)
        config = config.model_copy(update={"model": config.model.model_copy(update={"image_size": image_size})})
        data = prepare_data(config, world_size=1, index_folder=folder)
        options = {"rank": 0, "world_size": 1, "micro_batch_size": 8, "consumed": 0, "pin_memory": False}
        batches[name] = [batch.images.clone() for batch in islice(data.train_batches(config, **options), 4)]
        shares[name] = np.mean(parts)
        parts.clear()
    assert all(torch.equal(one, other) for one, other in zip(batches["with"], batches["without"], strict=True))
    assert shares["with"] < 0.8 * shares["without"]


def test_what_is_random_about_a_sample_differs_in_every_epoch_and_with_every_seed(shards, make_config, plan):
    def seeds(seed):
        config = make_config(shards, batch=BATCH, seed=seed)
        return [seed for batch in islice(_train(config, plan(config)), 9) for seed in batch.seeds.tolist()]

    drawn = [seeds(seed) for seed in range(3)]  # each of three epochs
    assert len(set(sum(drawn, []))) == 3 * 9 * BATCH


def test_an_index_that_is_not_the_one_the_run_was_planned_with_is_refused(
    tmp_path, write_tar, sample_members, make_config, plan
):
    shard = write_tar(tmp_path / "a.tar", sample_members(range(12)))
    config = make_config(tmp_path, eval=shard, allow_overlap=True, batch=6)
    planned = plan(config)
    write_tar(shard, sample_members(range(1, 13)))
    plan(config)  # makes the index anew
    with pytest.raises(UserError, match=r"shards\.index was written anew while the run was starting"):
        next(_train(config, planned, micro_batch_size=6))
    with pytest.raises(UserError, match="was written anew"):
        next(planned.eval_batches(config, rank=0, world_size=1, batch_size=6, pin_memory=False))


def test_real_uneven_shards(real_data, make_config, plan, tmp_path):
    folder = real_data / "fixture-tiny"
    config = make_config(folder, eval=folder, allow_overlap=True, batch=BATCH)
    config = config.model_copy(update={"model": config.model.model_copy(update={"num_classes": 1000})})
    data = plan(config)
    assert _steps(config, data, 1, steps=3) == _steps(config, data, 2, steps=3)
    batches = list(data.eval_batches(config, rank=0, world_size=1, batch_size=10, pin_memory=False))
    assert sum(int(batch.weights.sum()) for batch in batches) == 64


def test_state_is_json(shards, make_config, plan):
    config = make_config(shards)
    recorded = plan(config).fingerprint(config.data)
    assert json.loads(json.dumps(recorded)) == recorded
