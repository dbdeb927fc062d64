"""Images that the GPU decodes: the same crops, labels and order as the decoding processes give, but for rounding.

Without a GPU, Pillow takes the place of nvJPEG.
"""

import io
from itertools import islice

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from fastvit_engine.config import load_config
from fastvit_engine.data import prepare_data
from fastvit_engine.data.pixels.compressed import HEADER, image_size_of, read_recipes, row_bytes
from fastvit_engine.data.pixels.crops import View, render
from fastvit_engine.data.pixels.decode import PixelBuffer, open_image
from fastvit_engine.data.pixels.views import leave_compressed
from fastvit_engine.data.stream.bad_samples import sentence_about
from fastvit_engine.data.stream.batch import empty_batch
from fastvit_engine.data.stream.gpu_decode import check_nvjpeg, decode_batch, decoded_on, nvjpeg, resized_box
from fastvit_engine.errors import UserError

CPU, BATCH, SIZE = torch.device("cpu"), 12, 48


def with_pillow(jpegs):
    """As torchvision's decoder: all of them or an error."""
    try:
        images = [np.asarray(Image.open(io.BytesIO(jpeg.numpy().tobytes())).convert("RGB")) for jpeg in jpegs]
    except OSError as error:
        raise RuntimeError(str(error)) from error
    return [torch.from_numpy(image.copy()).permute(2, 0, 1) for image in images]


def picture(number, height, width):
    coarse = np.random.default_rng(number).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height)))


def jpeg(number, height=120, width=150, **options):
    buffer = io.BytesIO()
    Image.fromarray(picture(number, height, width)).save(buffer, "JPEG", quality=90, **options)
    return buffer.getvalue()


def with_markers(number, height, width):
    options = [cv2.IMWRITE_JPEG_RST_INTERVAL, 1, cv2.IMWRITE_JPEG_QUALITY, 97]
    noise = np.random.default_rng(number).integers(-9, 10, (height, width, 3))
    pixels = (picture(number, height, width) + noise).clip(0, 255).astype(np.uint8)
    return cv2.imencode(".jpg", pixels[..., ::-1], options)[1].tobytes()


@pytest.fixture(scope="module")
def mixed_shards(tmp_path_factory, write_tar):
    """40 images of many sizes: JPEGs with and without restart markers, and what nvJPEG does not take."""
    folder = tmp_path_factory.mktemp("mixed")

    def content(number):
        if number % 8 == 3:
            buffer = io.BytesIO()
            Image.fromarray(picture(number, 60, 80)).save(buffer, "PNG")
            return "png", buffer.getvalue()
        if number % 8 == 5:
            return "jpg", jpeg(number, progressive=True)
        if number % 2:
            return "jpg", with_markers(number, 100 + number, 90 + 2 * number)
        return "jpg", jpeg(number, 40 + 5 * number, 60 + 4 * number)

    members = []
    for number in range(40):
        extension, data = content(number)
        members += [(f"s{number:03d}.{extension}", data), (f"s{number:03d}.cls", str(number % 3).encode())]
    write_tar(folder / "0.tar", members[:38])
    write_tar(folder / "1.tar", members[38:])
    return folder


@pytest.fixture
def batches(make_config, mixed_shards, tmp_path):
    """batches(decoder, workers, micro_batch_size) -> the micro-batches of some steps"""

    def make(decoder, workers, micro_batch_size=BATCH):
        config = make_config(mixed_shards, batch=BATCH, num_workers=workers, decoder=decoder)
        config = config.model_copy(update={"model": config.model.model_copy(update={"image_size": SIZE})})
        data = prepare_data(config, world_size=1, index_folder=tmp_path)
        options = {"rank": 0, "world_size": 1, "micro_batch_size": micro_batch_size, "consumed": 0, "pin_memory": False}
        return data.train_batches(config, **options)

    return make


@pytest.mark.parametrize(("workers", "micro_batch_size"), [(0, 12), (2, 12), (3, 5)])
def test_batches_are_those_of_the_cpu_but_for_rounding(batches, workers, micro_batch_size):
    on_cpu = batches("cpu", 0)
    expected = [batch._replace(images=batch.images.clone()) for batch in islice(on_cpu, 4)]
    waiting = batches("nvjpeg", workers, micro_batch_size)
    found = list(islice(decoded_on(waiting, CPU, with_pillow), 4 * BATCH // micro_batch_size))
    for field in ("labels", "weights", "images"):
        ours, theirs = (torch.cat([getattr(batch, field) for batch in each]) for each in (found, expected))
        assert ours.shape[1:] == theirs.shape[1:]
        if field == "images":
            difference = (ours.float() - theirs[: len(ours)].float()).abs().mean(dim=(1, 2, 3))
            assert difference.max() < 6  # another crop, or the same not mirrored: from 20 on
        else:
            assert torch.equal(ours, theirs[: len(ours)])
    keys = [[key for batch in each for key in batch.keys] for each in (found, expected)]
    assert keys[0] == keys[1][: len(keys[0])]


def test_most_images_stay_compressed_and_with_markers_only_what_the_crop_needs(batches):
    rows = next(batches("nvjpeg", 0))
    recipes = read_recipes(rows.images.numpy())
    left = [recipe.size > 0 for recipe in recipes]
    numbers = [int(key[1:]) for key in rows.keys]
    never = [number % 8 in (3, 5) for number in numbers]  # PNG, progressive
    assert not any(size for size, other in zip(left, never, strict=True) if other)
    assert sum(left) > BATCH / 2
    whole, row = open_image(with_markers(1, 200, 220)), np.zeros(row_bytes(64), np.uint8)
    view = View(100, 120, 50, 60, (64, 64), decoding="fast")
    assert leave_compressed(whole, view, row)
    (recipe,) = read_recipes(row[None])
    assert recipe.size < len(whole.data) / 3
    assert with_pillow([torch.from_numpy(row[HEADER : HEADER + recipe.size])])[0].shape[1] < 100


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize(
    "box", [(0, 0, 120, 150), (7, 11, 60, 60), (33, 50, 20, 90), (100, 130, 20, 20), (13, 17, 104, 131)]
)
def test_a_crop_is_that_of_the_cpu(box, mirrored):
    """To a level if it is decoded at full size; one that is decoded smaller is averaged here in another way."""
    view = View(*box, (SIZE, SIZE), mirrored, decoding="accurate")
    image, out, row = open_image(with_markers(3, 120, 150)), np.empty((SIZE, SIZE, 3), np.uint8), np.zeros(60_000, "u1")
    render(image.decode_box(view.box, PixelBuffer(), view.reduction), view, out, PixelBuffer())
    assert leave_compressed(image, view, row)
    (recipe,) = read_recipes(row[None])
    (decoded,) = with_pillow([torch.from_numpy(row[HEADER : HEADER + recipe.size])])
    difference = np.abs(resized_box(decoded, recipe, SIZE).numpy().astype(int) - out)
    assert difference.max() <= 1 if view.reduction == 1 else difference.mean() < 1.5, view.reduction


def test_colours_that_decoders_take_differently_are_decoded_before():
    """Pillow marks a JPEG without a change of colours as RGB, by a segment of Adobe's."""
    row, view = np.zeros(row_bytes(SIZE), np.uint8), View(0, 0, 120, 150, (SIZE, SIZE))
    assert not leave_compressed(open_image(jpeg(0, keep_rgb=True)), view, row)
    gray = io.BytesIO()
    Image.fromarray(picture(0, 120, 150)).convert("L").save(gray, "JPEG")
    assert leave_compressed(open_image(gray.getvalue()), view, row)


def test_a_jpeg_that_has_no_room_is_decoded_before(batches):
    row = np.zeros(row_bytes(8), np.uint8)
    assert image_size_of(len(row)) == 8
    assert not leave_compressed(open_image(jpeg(0)), View(0, 0, 120, 150, (8, 8)), row) and not row.any()


def _batch(contents):
    rows = torch.zeros(len(contents), row_bytes(SIZE), dtype=torch.uint8)
    for row, content in zip(rows.numpy(), contents, strict=True):
        assert leave_compressed(open_image(content), View(0, 0, 120, 150, (SIZE, SIZE)), row)
    batch = empty_batch(len(contents), 0)
    return batch._replace(images=rows, weights=torch.ones(len(contents)), keys=[f"s{n}" for n in range(len(contents))])


def test_a_damaged_image_changes_no_other():
    """It decodes as far as it goes, as on the CPU; if nothing does, it is a bad sample."""
    whole, cut_short, broken = jpeg(0), jpeg(1)[:1500], bytearray(jpeg(2))
    broken[broken.index(b"\xff\xda") + 6] = 0x33  # coded by a Huffman table that is not there
    alone, batch = decode_batch(_batch([whole]), CPU, with_pillow), _batch([whole, cut_short, bytes(broken)])
    weights = batch.weights
    decoded = decode_batch(batch, CPU, with_pillow)
    assert torch.equal(decoded.images[0], alone.images[0])
    assert decoded.images[1, :8].any() and decoded.weights.tolist() == [1, 1, 0] and not decoded.images[2].any()
    (bad,) = decoded.bad
    assert sentence_about(bad).startswith("sample 's2' has an image that cannot be decoded (")
    assert weights.tolist() == [1, 1, 1]  # of the batch that was given


def test_one_batch_is_decoded_ahead_and_the_source_is_closed():
    taken, closed, given = [], [], _batch([jpeg(0)])

    def source():
        try:
            for number in range(9):
                taken.append(number)
                yield given
        finally:
            closed.append(True)

    batches = decoded_on(source(), CPU, with_pillow)
    next(batches)
    assert taken == [0, 1]
    next(batches)
    assert taken == [0, 1, 2] and not closed
    batches.close()
    assert closed
    assert len(list(decoded_on(source(), CPU, with_pillow))) == 9


@pytest.mark.parametrize(("message", "images"), [("CUDA out of memory. Tried", 1), ("nvjpegCreate failed: 5", 2)])
def test_an_error_of_the_decoder_reaches_the_training_loop(message, images):
    """torchvision raises the same for memory that is short, for a decoder that fails and for damaged images."""

    def failing(jpegs):
        raise RuntimeError(message)

    batch = _batch([jpeg(number) for number in range(images)])
    with pytest.raises(RuntimeError, match=message):
        list(decoded_on((batch for batch in [batch]), CPU, failing))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["data.order=stream"], "data.order is stream: set data.order=indexed, or data.decoder=cpu"),
        (["packing.max_patches=64"], "packing.max_patches keeps the images' proportions: set data.decoder=cpu"),
        (["train.objective=dino"], "train.objective = dino compares several: set data.decoder=cpu"),
    ],
)
def test_what_the_gpu_could_not_decode_is_refused(settings, sentence):
    with pytest.raises(UserError, match="data.decoder = nvjpeg decodes one crop per image") as error:
        load_config("quickstart", ["data.decoder=nvjpeg", *settings])
    assert sentence in str(error.value)


def test_nvjpeg_is_refused_where_there_is_none():
    config = load_config("quickstart", ["data.decoder=nvjpeg"]).config
    with pytest.raises(UserError, match=r"needs an NVIDIA GPU, and this run has none: set data\.decoder=cpu"):
        check_nvjpeg(config, own_data=False, on_gpu=False, here=True)
    with pytest.raises(UserError, match=r"an iterable of your own gives pixels: set data\.decoder=cpu"):
        check_nvjpeg(config, own_data=True, on_gpu=True, here=True)
    check_nvjpeg(config, own_data=False, on_gpu=True, here=False)  # a dry run for another machine
    check_nvjpeg(load_config("quickstart", []).config, own_data=True, on_gpu=False, here=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_nvjpeg_gives_what_the_cpu_gives(batches):
    pytest.importorskip("torchvision")
    device = torch.device("cuda", 0)
    expected = [batch._replace(images=batch.images.clone()) for batch in islice(batches("cpu", 0), 4)]
    found = list(islice(decoded_on(batches("nvjpeg", 2), device, nvjpeg(device)), 4))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.images.device.type == "cuda" and ours.keys == theirs.keys and not ours.bad
        assert (ours.images.cpu().float() - theirs.images.float()).abs().mean(dim=(1, 2, 3)).max() < 6
