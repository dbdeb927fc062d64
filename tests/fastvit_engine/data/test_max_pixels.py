"""One bound of pixels for whoever reads shards: training, evaluation, verify, stats and sheets leave out the same."""

import numpy as np
import pytest

from fastvit_engine.config import Config
from fastvit_engine.data.build.make import make_dataset
from fastvit_engine.data.check.contact_sheet import class_sheet
from fastvit_engine.data.check.stats import shard_stats
from fastvit_engine.data.check.verify import verify_shards
from fastvit_engine.data.stream.prepare import prepare_data
from fastvit_engine.errors import UserError

REASON = "has an image in 'jpg' that cannot be decoded (it has 1,260 pixels, more than the 1,200 of data.max_pixels)"


@pytest.fixture
def folder(tmp_path, write_tar, photo):
    """Six images of 30 x 40 pixels, and one of 30 x 42."""
    members = []
    for number in range(7):
        content = photo(number, width=42 if number == 3 else 40)
        members += [(f"s{number}.jpg", content), (f"s{number}.cls", str(number % 3).encode())]
    write_tar(tmp_path / "a.tar", members)
    return tmp_path


@pytest.mark.parametrize("order", ["indexed", "stream"])
def test_training_and_evaluation(folder, make_config, order):
    config = make_config(folder, eval=folder, batch=7, max_pixels=1200, order=order, allow_overlap=True)
    data = prepare_data(config, world_size=1, index_folder=folder)
    options = {"rank": 0, "world_size": 1, "pin_memory": False}
    train = iter(data.train_batches(config, **options, micro_batch_size=7, consumed=0))
    for batch in (next(train), next(iter(data.eval_batches(config, **options, batch_size=7)))):
        assert [(bad.key, bad.reason) for bad in batch.bad] == [("s3", REASON)]
        assert batch.weights.sum() == 6


def test_verify_stats_and_sheets(folder):
    config = Config.model_validate({"data": {"max_pixels": 1200}})
    verdict = verify_shards(str(folder), config, workers=1)
    assert verdict.errors["unreadable image"].examples == [f"s3 of a.tar {REASON}"]
    stats = shard_stats(str(folder), config, workers=1)
    assert stats.images == 6 and stats.unusable == {"unreadable image": 1}
    assert verify_shards(str(folder), workers=1).errors == {}  # by default, far more are allowed
    with pytest.raises(UserError, match="hold no usable images"):
        class_sheet(str(folder), Config.model_validate({"data": {"max_pixels": 1199}}))


def test_data_make_has_the_bound_as_an_option(folder, tmp_path):
    options = {"workers": 1, "eval_fraction": 0, "progress": lambda line: None}
    with pytest.raises(
        UserError, match=r"s3 in .*a\.tar cannot be decoded \(it has 1,260 pixels, more than the 1,200 of"
    ):
        make_dataset(str(folder / "a.tar"), tmp_path / "out", max_pixels=1200, **options)
    made = make_dataset(str(folder / "a.tar"), tmp_path / "out", max_pixels=1200, max_failed=0.2, **options)
    assert made.info is not None and made.info.train.samples == 6 and made.info.options["max_pixels"] == 1200
    with pytest.raises(UserError, match="--max-pixels is 0: it must be between 1 and 357913940"):
        make_dataset(str(folder / "a.tar"), tmp_path / "other", max_pixels=0, **options)


def test_data_make_counts_a_bomb_as_failed(tmp_path, encode):
    for name in ("a", "b"):
        (tmp_path / "source" / name).mkdir(parents=True)
        for number in range(4):
            pixels = np.full((8, 8, 3), 10 * number, np.uint8)
            (tmp_path / "source" / name / f"{number}.png").write_bytes(encode(pixels, "PNG"))
    data = bytearray(encode(np.zeros((16, 16, 3), np.uint8), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = b"\xff\xdc\xff\xdc"  # 65500 x 65500
    (tmp_path / "source" / "a" / "bomb.jpg").write_bytes(data)
    message = (
        r"bomb.jpg cannot be decoded \(it has 4,290,250,000 pixels, more than the 178,956,970 of data.max_pixels\)"
    )
    with pytest.raises(UserError, match=message):
        make_dataset(str(tmp_path / "source"), tmp_path / "out", workers=1)
    made = make_dataset(str(tmp_path / "source"), tmp_path / "out", workers=1, max_failed=0.2)
    assert made.info is not None and made.info.failed == 1
