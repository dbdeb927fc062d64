import numpy as np
import pytest
from PIL import Image

import fastvit_engine.data.check.contact_sheet as sheet_module
from fastvit_engine.data.check.contact_sheet import Tile, augmented_sheet, class_sheet, draw_sheet, save_sheet
from fastvit_engine.data.pixels.crops import draw_crops, render, train_view
from fastvit_engine.data.pixels.decode import Decoded, PixelBuffer
from fastvit_engine.data.pixels.draws import sample_seeds
from fastvit_engine.errors import UserError

CELL = 2 * sheet_module._CELL
STEP = 2 * (sheet_module._CELL + sheet_module._GAP)
LEFT = 2 * sheet_module._MARGIN
TOP = 2 * (sheet_module._MARGIN + sheet_module._TITLE)


def _cell(sheet: Image.Image, left: int, top: int) -> np.ndarray:
    return np.asarray(sheet)[top : top + CELL, left : left + CELL]


def test_tiles_are_aligned_and_whole():
    rng = np.random.default_rng(0)
    square, wide = (rng.integers(0, 256, shape, dtype=np.uint8) for shape in ((32, 32, 3), (28, 112, 3)))
    sheet = draw_sheet([[Tile(square, "a"), Tile(wide, "b"), None]], title="t", note="n")
    assert sheet.size[0] == 2 * LEFT + 3 * CELL + 2 * (STEP - CELL)
    assert np.array_equal(_cell(sheet, LEFT, TOP), np.repeat(np.repeat(square, CELL // 32, 0), CELL // 32, 1))
    second = _cell(sheet, LEFT + STEP, TOP)
    middle = slice((CELL - CELL // 4) // 2, (CELL + CELL // 4) // 2)
    assert np.array_equal(second[middle], np.repeat(np.repeat(wide, CELL // 112, 0), CELL // 112, 1))
    assert (second[: middle.start] == np.array([0xF2, 0xF1, 0xEE])).all()
    assert (_cell(sheet, LEFT + 2 * STEP, TOP) == 255).all()
    captions = np.asarray(sheet)[TOP + CELL :]
    assert (captions[:, LEFT : LEFT + CELL] < 200).any() and (captions[:, LEFT + 2 * STEP :] == 255).all()


def test_long_names_stay_in_their_column():
    tile = np.zeros((8, 8, 3), np.uint8)
    sheet = draw_sheet([[Tile(tile, "a very long name of a class that does not fit"), Tile(tile)]], title="x" * 500)
    pixels = np.asarray(sheet)
    assert (pixels[TOP + CELL :, LEFT + CELL + 2 : LEFT + STEP] == 255).all()
    assert (pixels[:, -LEFT + 2 :] == 255).all()


@pytest.mark.parametrize(("classes", "columns", "rows"), [(3, 3, 5), (10, 10, 5), (25, 8, 4), (60, 8, 5)])
def test_sheet_shows_as_many_classes_as_there_is_room_for(
    tmp_path, write_tar, encode, monkeypatch, classes, columns, rows
):
    members = []
    for n in range(60 if classes == 60 else 41):
        image = np.full((8, 8, 3), 4 * (n % classes), np.uint8)
        members += [(f"{n}.png", encode(image, "PNG")), (f"{n}.cls", str(n % classes).encode())]
    write_tar(tmp_path / "a.tar", members)
    grids: list = []
    monkeypatch.setattr(sheet_module, "draw_sheet", lambda grid, **texts: grids.append(grid))
    class_sheet(str(tmp_path))
    grid = grids[0]
    tiles = [tile for row in grid for tile in row if tile is not None]
    assert len(grid[0]) == columns and len(grid) == rows
    shown = [int(tile.caption.split()[-1]) for tile in tiles]
    assert all((tile.pixels == 4 * label).all() for tile, label in zip(tiles, shown, strict=True))
    assert len(set(shown)) == min(classes, 40)
    if classes > 10:
        assert shown == sorted(shown)
    else:
        assert all(tile is None or int(tile.caption.split()[-1]) == n for row in grid for n, tile in enumerate(row))


def test_augmented_sheet_draws_what_training_draws(shards, make_config):
    config = make_config(shards)
    sheet = augmented_sheet(config, rows=3, draws=4)
    assert np.array_equal(np.asarray(sheet), np.asarray(augmented_sheet(config, rows=3, draws=4)))
    (original, *_) = sheet_module._some_samples(sheet_module.shard_set(str(shards)), config, each=1)
    pixels, crop = original.pixels(), np.empty((16, 16, 3), np.uint8)
    (draws,) = draw_crops(sample_seeds(config.seed, 0, 0))
    render(Decoded(pixels), train_view(*pixels.shape[:2], 16, config.augment, draws), crop, PixelBuffer())
    scale = CELL // 16
    drawn = _cell(sheet, LEFT + STEP + 4 * sheet_module._GAP, TOP)
    assert np.array_equal(drawn, np.repeat(np.repeat(crop, scale, 0), scale, 1))


def test_sheets_that_cannot_be(shards, make_config, tmp_path, write_tar):
    with pytest.raises(UserError, match="data.train is not set"):
        augmented_sheet(make_config(""))
    with pytest.raises(UserError, match="--rows and --draws must be at least 1"):
        augmented_sheet(make_config(shards), rows=0)
    with pytest.raises(UserError, match=r"cannot write .*nowhere/a\.png \(No such file"):
        save_sheet(Image.new("RGB", (4, 4)), tmp_path / "nowhere" / "a.png")
    write_tar(tmp_path / "a.tar", [("a.jpg", b"x"), ("a.cls", b"1")])
    with pytest.raises(UserError, match="hold no usable images: see what"):
        class_sheet(str(tmp_path))
