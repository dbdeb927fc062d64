"""The views of an image that objectives compare: cropped where it is decoded, and distorted on the device."""

import colorsys
import io
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from fastvit_engine.config import load_config
from fastvit_engine.data import prepare_data
from fastvit_engine.data.pixels.decode import Decoded, PixelBuffer, decode_image, open_image
from fastvit_engine.data.pixels.distort import distort, gaussian_blur, turn_hue
from fastvit_engine.data.pixels.views import (
    choose_views,
    decode_views,
    distort_views,
    draw_views,
    training_views,
    unpack_views,
)

DINO = ["train.objective=dino", "model.name=Ti/4", "model.image_size=16", "model.num_classes=0", "ema.decay=0.9",
        "dino.local_views=3", "dino.local_size=8", "train.global_batch_size=8"]  # fmt: skip


@pytest.fixture(scope="module")
def config(shards):
    return load_config(None, [*DINO, f"data.train={shards}", "data.num_workers=0"]).config


def test_large_views_come_first_each_with_its_own_crop(config):
    views = training_views(config)
    assert [view.size for view in views] == [16, 16, 8, 8, 8]
    draws = draw_views(np.arange(200), views)
    areas = np.array([[view.height * view.width / 10**6 for view in choose_views(1000, 1000, views, of_sample)]
                      for of_sample in draws])  # fmt: skip
    (low, high), (low_of_small, high_of_small) = config.dino.global_scale, config.dino.local_scale
    assert (areas[:, :2] > low - 0.01).all() and (areas[:, :2] <= high).all()
    assert (areas[:, 2:] > low_of_small - 0.01).all() and (areas[:, 2:] < high_of_small + 0.01).all()
    assert len({tuple(of_view) for of_sample in draws for of_view in of_sample}) == 1000


def test_other_objectives_see_one_view_as_before(config):
    plain = load_config(None, ["model.image_size=32"]).config
    (view,) = training_views(plain)
    assert (view.size, view.augment, view.blur) == (32, plain.augment, 0.0)


@pytest.mark.parametrize(("order", "workers"), [("indexed", 2), ("stream", 0)])
def test_a_batch_holds_the_views_of_its_images(config, tmp_path, photo, order, workers):
    """Whatever process has decoded them: each view is the crop that the sample's seed says."""
    data = config.data.model_copy(update={"num_workers": workers, "order": order})
    config = config.model_copy(update={"data": data})
    plan = prepare_data(config, world_size=1, index_folder=tmp_path)
    batches = plan.train_batches(config, rank=0, world_size=1, micro_batch_size=4, consumed=0, pin_memory=False)
    views = training_views(config)
    for batch in islice(batches, 2):
        assert batch.images.shape == (4, 2 * 3 * 16**2 + 3 * 3 * 8**2) and batch.labels.tolist() == [0] * 4
        unpacked = unpack_views(batch.images, views)
        for row, (key, draws) in enumerate(zip(batch.keys, draw_views(batch.seeds, views), strict=True)):
            pixels = decode_image(photo(int(key[1:])))
            for view, crop, found in zip(views, choose_views(30, 40, views, draws), unpacked, strict=True):
                box = pixels[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
                assert found[row].shape == (view.size, view.size, 3)
                assert abs(float(found[row].float().mean()) - box.mean()) < 12


@pytest.mark.parametrize("small", [0.02, 0.3])
def test_views_are_decoded_together(config, monkeypatch, small):
    """What any of them needs, as small as all of them allow; each has the pixels of the whole image."""
    monkeypatch.setattr("fastvit_engine.data.pixels.jpeg_part.WORTH", 1)
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((600, 400)).save(buffer, "JPEG", restart_marker_blocks=1)
    image, views = open_image(buffer.getvalue()), training_views(config)[-2:]
    augment = views[0].augment.model_copy(update={"crop_scale": (small, small)})
    views, decoded_share = [view._replace(augment=augment) for view in views], []
    for draws in draw_views(np.arange(20), views):
        chosen = choose_views(400, 600, views, draws)
        decoded = decode_views(image, chosen, PixelBuffer())
        assert decoded.reduction == min(view.reduction for view in chosen)
        whole = Decoded(image.decode(PixelBuffer(), decoded.reduction, decoding="fast"), reduction=decoded.reduction)
        for view in chosen:
            assert np.array_equal(decoded.cut(view.box), whole.cut(view.box))
        decoded_share.append(decoded.pixels.size / whole.pixels.size)
    assert small < np.mean(decoded_share) < 0.9


@pytest.mark.parametrize("objective", ["dino", "moco"])
def test_views_are_blurred_unless_they_are_not_to_be(config, objective):
    """Colours are changed as before. A deviation below a quarter of a pixel blurs nothing."""
    train = config.train.model_copy(update={"objective": objective})
    sharp = getattr(config, objective).model_copy(update={"blur": False})
    both = [config.model_copy(update={"train": train, objective: own}) for own in (getattr(config, objective), sharp)]
    (views, plain), seeds = map(training_views, both), np.arange(1000)
    assert len(views) == {"dino": 5, "moco": 2}[objective]
    generator = torch.Generator().manual_seed(0)
    images = [torch.randint(0, 256, (1000, v.size, v.size, 3), dtype=torch.uint8, generator=generator) for v in views]
    pairs = zip(distort_views(images, views, seeds), distort_views(images, plain, seeds), strict=True)
    blurred = [(one != other).flatten(1).any(dim=1).float().mean().item() for one, other in pairs]
    assert blurred == pytest.approx([0.92 * view.blur for view in views], abs=0.05)
    assert all(view.blur == 0 and view.distorted for view in plain)


def test_what_an_image_gets_depends_on_its_seed_alone():
    images = torch.randint(0, 256, (6, 12, 12, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    seeds = np.arange(6) + 10**12
    whole = distort(images, seeds, blur=0.5, invert=0.3)
    for row in range(6):
        alone = distort(images[row : row + 1], seeds[row : row + 1], blur=0.5, invert=0.3)[0]
        assert (alone.int() - whole[row].int()).abs().max() <= 1
    assert whole.dtype == torch.uint8 and not torch.equal(whole, images)


def test_odds_and_ranges_of_what_is_done():
    """A flat colour tells what was done to it: levels below 128 are not inverted, and white becomes dark."""
    seeds = np.arange(4000)
    dark, white = (torch.tensor(colour, dtype=torch.uint8).expand(4000, 2, 2, 3).contiguous()
                   for colour in ([100, 60, 40], [255, 255, 255]))  # fmt: skip
    done = distort(dark, seeds, blur=0.0, invert=0.2)[:, 0, 0].int()
    assert (done.amax(1) - done.amin(1) <= 1).float().mean() == pytest.approx(0.2, abs=0.03)  # grey
    assert (done == dark[0, 0, 0]).all(1).float().mean() == pytest.approx(0.2 * 0.8, abs=0.03)  # neither that nor more
    grey = 1.4 * (0.299 * 100 + 0.587 * 60 + 0.114 * 40)  # of the brightest, from which contrast and colour move away
    assert 150 < done[:, 0].max() <= grey + (140 - grey) * 1.4 * 1.2 + 1
    levels = distort(white, seeds, blur=0.0, invert=0.2)[:, 0, 0, 0]
    assert (levels < 103).float().mean() == pytest.approx(0.2, abs=0.03) and levels[levels > 102].min() >= 153


def test_hue_is_turned_as_colorsys_does():
    pixels = torch.rand(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    turn = torch.tensor([0.07, -0.05])
    turned = turn_hue(pixels, turn)
    for image in range(2):
        for place in range(5):
            hue, saturation, value = colorsys.rgb_to_hsv(*pixels[image, :, place, place].tolist())
            expected = colorsys.hsv_to_rgb((hue + turn[image].item()) % 1, saturation, value)
            assert turned[image, :, place, place].tolist() == pytest.approx(expected, abs=1e-5)
    grey = torch.full((1, 3, 2, 2), 0.4)
    torch.testing.assert_close(turn_hue(grey, torch.tensor([0.1])), grey)


@pytest.mark.parametrize("sigma", [0.1, 0.8, 2.0])
def test_blur_is_a_gaussian_of_each_images_own_deviation(sigma):
    pixels = torch.zeros(2, 3, 31, 31)
    pixels[:, :, 15, 15] = 1
    blurred = gaussian_blur(pixels, torch.tensor([sigma, 1.0]))
    assert blurred[0].sum().item() == pytest.approx(3, abs=1e-4)
    rows = torch.arange(31) - 15.0
    deviation = (blurred[0, 0].sum(0) * rows**2).sum().sqrt().item()
    assert deviation == pytest.approx(sigma if sigma > 0.5 else 0, abs=0.05)
    dot = Image.fromarray(np.uint8(255 * pixels[1].permute(1, 2, 0).numpy())).filter(ImageFilter.GaussianBlur(1.0))
    assert blurred[1, 0, 15, 15].item() == pytest.approx(np.asarray(dot)[15, 15, 0] / 255, abs=0.02)
