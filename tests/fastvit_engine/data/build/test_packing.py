import hashlib

import numpy as np
import pytest

from fastvit_engine.data.build.output import LocalOutput
from fastvit_engine.data.build.packing import Packing, first_of_each, make_packing
from fastvit_engine.data.build.sources.listing import ListingBuilder
from fastvit_engine.data.shards.names import UNFINISHED_NAME
from fastvit_engine.errors import UserError
from fastvit_engine.observe.progress import WorkProgress


def _packing(
    labels: list[int], *, fraction: float | None, seed: int = 0, held_out: tuple[int, ...] = (), size: int = 10
) -> Packing:
    builder = ListingBuilder()
    builder.add_file("path", "/nowhere")
    for index, label in enumerate(labels):
        builder.held_out = index in held_out
        builder.add(f"{index}.jpg", [str(label)])
    arguments = {"seed": seed, "dedup": False, "samples_per_shard": size}
    listing = builder.finish(None, "test")
    return make_packing(listing, arguments, eval_fraction=fraction, workers=1, progress=WorkProgress(quiet=True))


def test_every_image_is_in_one_split_and_the_classes_keep_their_shares():
    labels = [0] * 500 + [1] * 37 + [2] * 3 + [3]
    for fraction in (0.0, 0.1, 0.33, 0.9):
        packing = _packing(labels, fraction=fraction)
        assert sorted([*packing.train, *packing.eval]) == list(range(len(labels)))
        counts = np.bincount(np.array(labels)[packing.eval], minlength=4)
        assert all(abs(counts - fraction * np.bincount(labels)) <= 1)
        assert all(np.bincount(np.array(labels)[packing.train], minlength=4) >= 1)


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.99])
def test_every_class_that_is_evaluated_is_trained(fraction: float):
    rng = np.random.default_rng(0)
    for _ in range(50):
        labels = rng.integers(0, 40, 80).tolist()  # most classes have an image or two, or three
        packing = _packing(labels, fraction=fraction, seed=int(rng.integers(1000)))
        trained, evaluated = (
            set(packing.listing.first_labels()[split].tolist()) for split in (packing.train, packing.eval)
        )
        assert evaluated and evaluated <= trained and len(trained) == len(set(labels))


def test_classes_of_one_image_each_cannot_be_split():
    with pytest.raises(UserError, match="3 images, no two of one class, are too few for .* set --eval-fraction 0$"):
        _packing([0, 1, 2], fraction=0.5)
    assert len(_packing([0, 1, 2], fraction=0).train) == 3


def test_order_is_a_uniform_shuffle_that_depends_on_the_seed():
    first, again, other = (_packing([0] * 4000, fraction=0.25, seed=seed) for seed in (3, 3, 4))
    assert np.array_equal(first.train, again.train) and not np.array_equal(first.train, other.train)
    for order in (first.train, first.eval):
        places = np.arange(len(order))
        chance = 4 / np.sqrt(len(order))
        assert abs(np.corrcoef(order, places)[0, 1]) < chance
        assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < chance


def test_order_never_changes():
    """Shards that are made again years later, with another NumPy, are the same."""
    packing = _packing([n % 7 for n in range(1000)], fraction=0.1, seed=1)
    digest = hashlib.sha256(packing.train.astype("<i8").tobytes() + packing.eval.astype("<i8").tobytes()).hexdigest()
    assert digest[:16] == "0807d15db4088e89"


def test_own_split_is_kept():
    packing = _packing([0] * 20, fraction=None, held_out=(3, 4, 19))
    assert sorted(packing.eval) == [3, 4, 19] and len(packing.train) == 17


def _packing_of(names: list[str], held_out: int) -> Packing:
    builder = ListingBuilder()
    builder.add_file("path", "/nowhere")
    for index, name in enumerate(names):
        builder.held_out = index >= len(names) - held_out
        builder.add(name, ["0"])
    arguments = {"seed": 0, "dedup": False, "samples_per_shard": 10}
    listing = builder.finish(None, "test")
    return make_packing(listing, arguments, eval_fraction=None, workers=1, progress=WorkProgress(quiet=True))


def test_validation_images_of_imagenet_are_in_the_order_of_their_numbers():
    numbers = [30, 2, 50_000, 7, 1, 12]
    for name in ("val/n01/ILSVRC2012_val_{:08d}.JPEG", "ILSVRC2012_val_{:08d}_n01440764.JPEG"):
        names = [f"train/{n}.JPEG" for n in range(5)] + [name.format(number) for number in numbers]
        packing = _packing_of(names, held_out=6)
        assert [numbers[index - 5] for index in packing.eval] == sorted(numbers)
        assert sorted(packing.train) == list(range(5))


def test_other_images_are_shuffled_also_if_some_are_called_like_those_of_imagenet():
    several = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, 50)]
    longer = [f"ILSVRC2012_val_{number:09d}.JPEG" for number in range(1, 51)]
    for names in ([*several, "other.jpg"], [*several, f"x/{several[0]}"], longer):
        packing = _packing_of(["a.jpg", *names], held_out=50)
        assert sorted(packing.eval) == list(range(1, 51)) and list(packing.eval) != list(range(1, 51))


def test_shards_cover_the_order_and_a_saved_plan_is_the_same(tmp_path):
    packing = _packing([0] * 103, fraction=0.11, size=10)
    output = LocalOutput(tmp_path)
    output.begin()
    output.save_packing(packing.save)
    again = Packing.load(output.save_packing(packing.save))  # another part was faster
    assert again.shards() == packing.shards() and [shard.name for shard in packing.shards()][-3:] == [
        "train-000009.tar",
        "eval-000000.tar",
        "eval-000001.tar",
    ]
    for split in ("train", "eval"):
        parts = [again.indices(shard) for shard in again.shards() if shard.split == split]
        assert np.array_equal(np.concatenate(parts), getattr(packing, split))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert sorted(path.name for path in (tmp_path / UNFINISHED_NAME).iterdir()) == ["packing", "receipts"]


def test_first_of_each():
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 4, (200, 2)).astype(np.uint64)
    first = first_of_each(rows)
    seen: set[tuple] = set()
    for row, is_first in zip(rows.tolist(), first, strict=True):
        assert is_first == (tuple(row) not in seen)
        seen.add(tuple(row))
    preferred = np.zeros(200, np.bool_)
    preferred[150:] = True
    kept = first_of_each(rows, preferred)
    assert len({tuple(row) for row in rows[kept].tolist()}) == kept.sum() == first.sum()
    late = {tuple(row) for row in rows[150:].tolist()}
    assert all(index >= 150 for index in np.flatnonzero(kept) if tuple(rows[index].tolist()) in late)
