"""Streams of shards that have no index, such as gzipped ones: data.order=stream."""

from collections import Counter
from collections.abc import Iterator
from itertools import islice

import numpy as np
import pytest
import torch

from fastvit_engine.config import Config
from fastvit_engine.data import Batch
from fastvit_engine.data.pixels.crops import eval_view, render
from fastvit_engine.data.pixels.decode import Decoded, PixelBuffer, open_image
from fastvit_engine.data.shards.names import find_shards
from fastvit_engine.data.stream.batch_split import possible_splits
from fastvit_engine.data.stream.streams import StreamData, StreamedShards, plan_streams
from fastvit_engine.errors import UserError

BATCH, STREAMS = 8, 4
ALL_KEYS = [f"s{n:03d}" for n in range(35)]


def _data(config, world_size: int = 1) -> StreamData:
    train = find_shards(config.data.train, "train")
    held_out = StreamedShards(tuple(find_shards(config.data.eval, "eval"))) if config.data.eval else None
    return StreamData(plan_streams(config, world_size=world_size, shards=len(train)), tuple(train), held_out, None)


def _train(
    config, rank: int, world_size: int, micro_batch_size: int, first_step: int = 0, skipped=()
) -> Iterator[Batch]:
    return _data(config, world_size).train_batches(
        config,
        rank=rank,
        world_size=world_size,
        micro_batch_size=micro_batch_size,
        consumed=first_step * config.train.global_batch_size,
        pin_memory=False,
        skipped=skipped,
    )


def _eval(config, rank: int = 0, world_size: int = 1, batch_size: int = 4) -> Iterator[Batch]:
    return _data(config).eval_batches(config, rank=rank, world_size=world_size, batch_size=batch_size, pin_memory=False)


def _steps(
    config, world_size: int, steps: int, micro_batch_size: int = 2, first_step: int = 0, skipped=()
) -> list[list[tuple]]:
    """For each global step the (key, label, pixels) of all ranks' samples, sorted."""
    result: list[list[tuple]] = [[] for _ in range(steps)]
    split = next(possible_splits(config, world_size, micro_batch_size))
    for rank in range(world_size):
        endless = _train(config, rank, world_size, micro_batch_size, first_step, skipped)
        for step in result:
            for size in split.micro_batches(rank):
                batch = next(endless)
                if size == 0:
                    assert batch.weights.tolist() == [0] and not batch.images.any()
                    continue
                assert batch.images.shape == (size, 16, 16, 3) and batch.images.dtype == torch.uint8
                assert batch.weights.tolist() == [1.0] * size and batch.weights.dtype == torch.float32
                assert batch.labels.dtype == torch.int64
                for key, label, image in zip(batch.keys, batch.labels, batch.images, strict=True):
                    step.append((key, label.item(), image.numpy().tobytes()))
    return [sorted(step) for step in result]


@pytest.fixture(scope="module")
def reference(gzipped_shards, make_config) -> list[list[tuple]]:
    return _steps(make_config(gzipped_shards, batch=BATCH, streams=STREAMS), world_size=1, steps=12)


def test_steps_have_the_global_batch_and_right_labels(reference):
    assert [len(step) for step in reference] == [BATCH] * 12
    assert all(label == int(key[1:]) % 3 for step in reference for key, label, _ in step)


@pytest.mark.parametrize(
    ("world_size", "num_workers", "micro_batch_size"),
    [(1, 1, 8), (1, 2, 2), (1, 4, 8), (2, 0, 4), (2, 1, 1), (2, 2, 2), (4, 0, 2), (4, 1, 1)],
)
def test_steps_are_the_same_for_every_world_size_and_worker_count(
    reference, gzipped_shards, make_config, world_size, num_workers, micro_batch_size
):
    config = make_config(gzipped_shards, batch=BATCH, streams=STREAMS, num_workers=num_workers)
    assert _steps(config, world_size, steps=6, micro_batch_size=micro_batch_size) == reference[:6]


@pytest.mark.parametrize("first_step", [1, 5, 11])
@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 0), (2, 0), (1, 2)])
def test_resume_gives_the_same_steps(reference, gzipped_shards, make_config, first_step, world_size, num_workers):
    config = make_config(gzipped_shards, batch=BATCH, streams=STREAMS, num_workers=num_workers)
    steps = min(3, 12 - first_step)
    assert _steps(config, world_size, steps, first_step=first_step) == reference[first_step:][:steps]


@pytest.mark.parametrize(("first_step", "num_workers", "world_size"), [(0, 2, 2), (2, 0, 1), (3, 1, 2)])
def test_skipped_steps_are_left_out(reference, gzipped_shards, make_config, first_step, num_workers, world_size):
    config = make_config(gzipped_shards, batch=BATCH, streams=STREAMS, num_workers=num_workers)
    skipped = [(2 * BATCH, 4 * BATCH), (5 * BATCH, 6 * BATCH)]
    left = [step for number, step in enumerate(reference) if number >= first_step and number not in (2, 3, 5)]
    assert _steps(config, world_size, 4, first_step=first_step, skipped=skipped) == left[:4]


def test_every_stream_takes_part_equally(gzipped_shards, make_config):
    owners = {}  # the shards part-0 .. part-6 go to the streams in turn
    start = 0
    for number, size in enumerate([5, 3, 8, 6, 1, 5, 7]):
        owners |= {f"s{n:03d}": number % STREAMS for n in range(start, start + size)}
        start += size
    steps = _steps(make_config(gzipped_shards, batch=BATCH, streams=STREAMS), 1, steps=40)
    for step in steps:
        assert Counter(owners[key] for key, _, _ in step) == dict.fromkeys(range(STREAMS), BATCH // STREAMS)
    for stream in range(STREAMS):
        counts = Counter(key for step in steps for key, _, _ in step if owners[key] == stream)
        assert set(counts) == {key for key in owners if owners[key] == stream}
        assert max(counts.values()) - min(counts.values()) <= 1  # whole epochs, and at most one begun


@pytest.mark.parametrize(
    ("world_size", "changes", "message"),
    [
        (3, {"streams": 4}, "3 ranks x 1 data workers do not divide"),
        (1, {"streams": 4, "num_workers": 3}, "1 ranks x 3 data workers do not divide"),
        (8, {}, "7 shards for 8 parallel streams"),
        (1, {"streams": 8}, "7 shards for 8 parallel streams"),
        (1, {"batch": 4, "streams": 5}, "global_batch_size is 4, fewer images than the 5 parallel streams"),
    ],
)
def test_plans_that_do_not_divide_are_refused(gzipped_shards, make_config, world_size, changes, message):
    with pytest.raises(UserError, match=message):
        _train(make_config(gzipped_shards, **{"batch": BATCH, **changes}), 0, world_size, 1)


@pytest.mark.parametrize("mixup", [0.0, 0.2])
@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 0), (1, 3), (3, 0), (3, 1), (3, 2)])
def test_streams_that_do_not_divide_the_batch_give_the_same_steps(
    gzipped_shards, make_config, world_size, num_workers, mixup
):
    """16 images from 6 streams: 3, 3, 3, 3, 2, 2; or, in pairs, 4, 4, 2, 2, 2, 2."""
    given = make_config(gzipped_shards, batch=16, streams=6, num_workers=num_workers)
    config = given.model_copy(update={"augment": given.augment.model_copy(update={"mixup": mixup})})
    assert plan_streams(config, world_size=world_size, shards=7).chunks == (
        (4, 4, 2, 2, 2, 2) if mixup else (3, 3, 3, 3, 2, 2)
    )
    alone = config.model_copy(update={"data": config.data.model_copy(update={"num_workers": 0})})
    expected = _steps(alone, 1, steps=6, micro_batch_size=16)
    assert [len(step) for step in expected] == [16] * 6
    assert _steps(config, world_size, steps=4) == expected[:4]
    assert _steps(config, world_size, steps=2, first_step=4) == expected[4:]
    assert _steps(config, world_size, steps=3, skipped=[(16, 48)]) == [expected[0], *expected[3:5]]


def test_a_batch_that_changes_takes_the_next_samples_of_each_stream(reference, gzipped_shards, make_config):
    """Six steps of 8, then three of 16: each has the samples of two."""
    larger = make_config(gzipped_shards, batch=16, streams=STREAMS)
    batches = _data(larger).train_batches(
        larger, rank=0, world_size=1, micro_batch_size=16, consumed=6 * BATCH, pin_memory=False
    )
    for number, batch in enumerate(islice(batches, 3)):
        expected = [sample[0] for step in reference[6 + 2 * number :][:2] for sample in step]
        assert sorted(batch.keys) == sorted(expected)


def test_streams_default_to_one_a_process(gzipped_shards, make_config):
    default = next(_train(make_config(gzipped_shards, batch=BATCH, num_workers=2), 0, 1, 8))
    two = next(_train(make_config(gzipped_shards, batch=BATCH, streams=2), 0, 1, 8))
    assert default.keys == two.keys and torch.equal(default.images, two.images)


def _bad_shards(folder, write_tar, sample_members, bad: list) -> str:
    write_tar(folder / "a.tar", sample_members(range(4)))
    write_tar(folder / "b.tar", [*sample_members(range(4, 6)), *bad])
    return str(folder)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([("x.jpg", b"garbage"), ("x.cls", b"3")], r"sample 'x' of shard .*b\.tar has label 3"),
        ([("x.jpg", b"garbage")], r"sample 'x' of shard .*b\.tar has no 'cls' member"),
    ],
)
def test_bad_label_is_one_sentence_in_the_main_process(
    tmp_path, write_tar, sample_members, make_config, num_workers, bad, message
):
    folder = _bad_shards(tmp_path, write_tar, sample_members, bad)
    config = make_config(folder, eval=folder, batch=4, streams=2, num_workers=num_workers)
    with pytest.raises(UserError, match=message) as train_error:
        list(islice(_train(config, 0, 1, 4), 20))
    with pytest.raises(UserError, match=message) as eval_error:
        list(_eval(config))
    assert "\n" not in str(train_error.value) and str(train_error.value) == str(eval_error.value)


def test_image_that_cannot_be_decoded_has_no_weight(tmp_path, write_tar, sample_members, make_config):
    folder = _bad_shards(tmp_path, write_tar, sample_members, [("x.jpg", b"garbage"), ("x.cls", b"0")])
    config = make_config(folder, eval=folder, batch=8, streams=2)
    for batches in (islice(_train(config, 0, 1, 2), 12), _eval(config)):
        joined = [
            (key, weight) for batch in batches for key, weight in zip(batch.keys, batch.weights.tolist(), strict=True)
        ]
        assert {weight for key, weight in joined if key == "x"} == {0}
        assert {weight for key, weight in joined if key.startswith("s")} == {1}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_truncated_shard_is_an_error(tmp_path, write_tar, sample_members, make_config, num_workers):
    folder = _bad_shards(tmp_path, write_tar, sample_members, [])
    whole = (tmp_path / "b.tar").read_bytes()
    (tmp_path / "b.tar").write_bytes(whole[: whole.index(b"s005.jpg")])  # at a member: tarfile sees a regular end
    config = make_config(folder, eval=folder, batch=4, streams=2, num_workers=num_workers)
    for batches in (
        _train(config, 0, 1, 4),
        _eval(config),
    ):
        with pytest.raises(UserError, match=r"b\.tar is damaged"):
            list(islice(batches, 20))


@pytest.mark.parametrize(
    ("world_size", "num_workers", "batch_size"),
    [(1, 0, 8), (1, 2, 8), (1, 3, 8), (2, 0, 4), (3, 2, 5), (4, 1, 3), (5, 0, 100), (36, 0, 2)],
)
def test_eval_counts_each_sample_once_in_equally_many_batches(
    gzipped_shards, make_config, world_size, num_workers, batch_size
):
    config = make_config(gzipped_shards, eval=gzipped_shards, num_workers=num_workers)
    ranks = [list(_eval(config, rank, world_size, batch_size)) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    seen = []
    for batch in (batch for batches in ranks for batch in batches):
        assert batch.images.shape == (batch_size, 16, 16, 3)
        for key, label, weight in zip(batch.keys, batch.labels.tolist(), batch.weights.tolist(), strict=True):
            assert (weight == 0.0 and key == "") or (weight == 1.0 and label == int(key[1:]) % 3)
            seen.append(key)
    assert sorted(filter(None, seen)) == ALL_KEYS


@pytest.mark.parametrize("transform", ["timm", "fast", "big_vision"])
def test_eval_images_are_prepared_as_configured(gzipped_shards, make_config, photo, transform):
    config = make_config(gzipped_shards, eval=gzipped_shards, eval_crop=0.6, eval_transform=transform)
    batch = next(_eval(config, batch_size=8))
    for key, image in zip(batch.keys, batch.images.numpy(), strict=True):
        pixels = open_image(photo(int(key[1:])), 10**6)
        view = eval_view(pixels.height, pixels.width, 16, 0.6, transform)
        whole = pixels.decode(PixelBuffer(), view.reduction, decoding=view.decoding)
        expected = np.empty((16, 16, 3), np.uint8)
        render(Decoded(whole, reduction=view.reduction), view, expected, PixelBuffer())
        assert np.array_equal(image, expected)


def test_what_is_random_about_a_sample_differs_in_every_stream_and_epoch_and_with_every_seed(
    gzipped_shards, make_config
):
    def seeds(seed):
        config = make_config(gzipped_shards, batch=BATCH, streams=STREAMS, seed=seed)
        return [seed for batch in islice(_train(config, 0, 1, BATCH), 12) for seed in batch.seeds.tolist()]

    drawn = [seeds(seed) for seed in range(3)]
    assert len(set(sum(drawn, []))) == 3 * 12 * BATCH


def test_eval_without_samples(tmp_path, write_tar, make_config):
    write_tar(tmp_path / "empty.tar", [])
    config = make_config(tmp_path, eval=tmp_path)
    with pytest.raises(UserError, match="hold no samples"):
        list(_eval(config))


@pytest.mark.parametrize(
    ("world_size", "num_workers", "shards", "batch", "expected"),
    [
        (2, 4, 100, 64, (8, 4)),
        (2, 4, 5, 64, (4, 2)),  # shards for two processes a rank only
        (1, 4, 100, 6, (3, 3)),  # four would not divide the batch
        (3, 4, 100, 64, (12, 4)),  # which three ranks do not divide either
        (3, 4, 100, 8, (6, 2)),  # a stream has to give one image at least
        (2, 4, 3, 64, (2, 1)),
        (1, 0, 3, 64, (1, 0)),
    ],
)
def test_a_rank_has_as_many_workers_as_shards_and_batch_allow(world_size, num_workers, shards, batch, expected):
    config = Config.model_validate({"data": {"num_workers": num_workers}, "train": {"global_batch_size": batch}})
    plan = plan_streams(config, world_size=world_size, shards=shards)
    assert (plan.streams, plan.num_workers) == expected
