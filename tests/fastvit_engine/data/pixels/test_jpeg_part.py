"""A box of a JPEG has the pixels that it has in the whole, to the byte, however little is decoded."""

import base64
import io
from collections.abc import Callable

import cv2
import numpy as np
import pytest
import simplejpeg
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from fastvit_engine.data.pixels.decode import Decoding, Jpeg, PixelBuffer, open_image
from fastvit_engine.data.pixels.jpeg_part import Box, cut_out, restart_interval
from tests.in_full import IN_FULL

# 16 x 72 pixels; Pillow writes all colours of a baseline JPEG in one scan.
_THREE_SCANS = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABQODxIPDRQSEBIXFRQYHjIhHhwcHj0sLiQySUBMS0dARkVQWnNiUFVtVkVGZIhlbXd7"
    "gYKBTmCNl4x9lnN+gXz/2wBDARUXFx4aHjshITt8U0ZTfHx8fHx8fHx8fHx8fHx8fHx8fHx8fHx8fHx8fHx8fHx8fHx8fHx8fHx8"
    "fHx8fHx8fHz/wAARCABIABADASIAAhEBAxEB/8QAFQABAQAAAAAAAAAAAAAAAAAABQb/xAAXEAADAQAAAAAAAAAAAAAAAAAAAQQx"
    "/9oACAEBAAA/AJqNYOxrAaNYOxrAWNYOxrAaNYOxrAWNYOxrAaNYOxrAaNYOxrAWNYOxrAaNYOxrD//EABUBAQEAAAAAAAAAAAAA"
    "AAAAAAIE/8QAFhEBAQEAAAAAAAAAAAAAAAAAAAMB/9oACAECEQA/AJbYdsO2HbDs/8QAFQEBAQAAAAAAAAAAAAAAAAAABAP/xAAX"
    "EQADAQAAAAAAAAAAAAAAAAAAAgQB/9oACAEDEQA/AAVKJqURUoipS9WH/9k="
)

_SAMPLING = {  # how much of the colours is kept, as OpenCV numbers it
    "4:4:4": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
    "4:2:2": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_422,
    "4:2:0": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420,
    "4:4:0": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_440,
    "4:1:1": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_411,
}
_DECODING = st.sampled_from(["accurate", "tensorflow", "fast"])
_examples = settings(
    max_examples=600 if IN_FULL else 150, deadline=None, suppress_health_check=[HealthCheck.filter_too_much]
)


def _picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Colours that change from pixel to pixel, a little, and from block to block."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (8, 5, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height))).astype(int)
    return (smooth + random.integers(-20, 21, smooth.shape)).clip(0, 255).astype(np.uint8)


def _with_pillow(pixels: np.ndarray, mode: str = "RGB", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def _with_opencv(pixels: np.ndarray, interval: int, sampling: str, quality: int, progressive: bool = False) -> bytes:
    options = {
        cv2.IMWRITE_JPEG_RST_INTERVAL: interval,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR: _SAMPLING[sampling],
        cv2.IMWRITE_JPEG_QUALITY: quality,
        cv2.IMWRITE_JPEG_PROGRESSIVE: int(progressive),
    }
    flat = [int(value) for pair in options.items() for value in pair]
    return cv2.imencode(".jpg", pixels, flat)[1].tobytes()


@st.composite
def _jpegs(draw: st.DrawFn) -> bytes:
    """Of all kinds and sizes, with and without restart markers."""
    pixels = _picture(draw(st.integers(1, 150)), draw(st.integers(1, 150)), draw(st.integers(0, 9)))
    quality, interval = draw(st.integers(20, 98)), draw(st.sampled_from([0, 1, 1, 2, 3, 4, 5, 8, 10, 20]))
    if draw(st.booleans()):
        return _with_opencv(pixels, interval, draw(st.sampled_from([*_SAMPLING])), quality, draw(st.booleans()))
    mode = draw(st.sampled_from(["RGB", "RGB", "L", "L", "CMYK"]))
    rows = draw(st.sampled_from([0, 0, 1, 2]))
    markers = {"restart_marker_rows": rows} if rows else {"restart_marker_blocks": interval}
    return _with_pillow(pixels, mode, quality=quality, progressive=draw(st.integers(0, 3)) == 0, **markers)


@st.composite
def _boxes(draw: st.DrawFn, height: int, width: int) -> Box:
    top, left = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
    return Box(top, left, draw(st.integers(1, height - top)), draw(st.integers(1, width - left)))


@pytest.fixture(autouse=True)
def _everything_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of the small pictures of these tests."""
    monkeypatch.setattr("fastvit_engine.data.pixels.jpeg_part.WORTH", 1)


@_examples
@given(data=_jpegs(), draw=st.data(), reduction=st.sampled_from([1, 1, 2, 4, 8]), decoding=_DECODING)
def test_a_box_has_the_pixels_of_the_whole(
    data: bytes, draw: st.DataObject, reduction: int, decoding: Decoding
) -> None:
    image = open_image(data)
    box = draw.draw(_boxes(image.height, image.width))
    whole = image.decode(PixelBuffer(), reduction, decoding=decoding)
    decoded = image.decode_box(box, PixelBuffer(), reduction, decoding=decoding)
    rows = slice(box.top // reduction, -(-box.bottom // reduction))
    columns = slice(box.left // reduction, -(-box.right // reduction))
    assert np.array_equal(decoded.cut(box), whole[rows, columns])
    # All that was decoded, but for the edges that are not the image's own.
    height, width = decoded.pixels.shape[:2]
    assert decoded.top + height <= len(whole) and decoded.left + width <= whole.shape[1]


def _entropy_coded(data: bytes | bytearray) -> slice:
    scan = data.index(b"\xff\xda")
    return slice(scan + 2 + int.from_bytes(data[scan + 2 : scan + 4], "big"), len(data) - 2)


def _outcome(decode: Callable[[], np.ndarray]) -> np.ndarray | None:
    try:
        return decode()
    except ValueError:
        return None


@_examples
@given(
    interval=st.sampled_from([0, 1, 2, 5, 10, 20]),
    sampling=st.sampled_from(["4:4:4", "4:2:0"]),
    damages=st.lists(
        st.tuples(
            st.floats(0, 0.999),
            st.sampled_from(["change", "cut", "insert", "marker", "truncate"]),
            st.binary(min_size=1, max_size=3),
        ),
        min_size=1,
        max_size=3,
    ),
    draw=st.data(),
    decoding=_DECODING,
)
def test_damaged_data_decodes_as_in_the_whole(interval, sampling, damages, draw, decoding) -> None:
    """Inside of the box and outside of it; and it is refused or not, whatever the box."""
    data = bytearray(_with_opencv(_picture(100, 160), interval, sampling, 80))
    for share, kind, word in damages:
        scan = _entropy_coded(data)
        at = scan.start + int(share * (scan.stop - scan.start))
        if kind == "change":
            data[at : at + len(word)] = word
        elif kind == "cut":
            del data[at : at + len(word)]
        elif kind == "insert":
            data[at:at] = word
        elif kind == "marker":
            data[at : at + 2] = bytes([0xFF, 0xC0 + word[0] % 64])
        else:
            del data[at:]
    image = Jpeg(bytes(data), 100, 160)
    box = draw.draw(_boxes(100, 160))
    whole = _outcome(lambda: image.decode(PixelBuffer(), decoding=decoding))
    part = _outcome(lambda: image.decode_box(box, PixelBuffer(), decoding=decoding).cut(box))
    assert (whole is None) == (part is None)
    if whole is not None:
        assert np.array_equal(part, whole[box.top : box.bottom, box.left : box.right])


def test_damage_behind_a_box_ends_the_decoding_of_no_part() -> None:
    data = bytearray(_with_opencv(_picture(100, 160), 1, "4:4:4", 80))
    del data[1225:]
    assert data[1161] == 0xFF
    data[1162] = 2  # no restart marker any more, and no other one
    image, box = Jpeg(bytes(data), 100, 160), Box(0, 0, 1, 1)
    with pytest.raises(ValueError, match="Unsupported marker"):
        simplejpeg.decode_jpeg(bytes(cut_out(image.data, 100, 160, box, 2).data), "RGB", strict=False)
    assert np.array_equal(image.decode_box(box, PixelBuffer()).cut(box), image.decode(PixelBuffer())[:1, :1])


@pytest.mark.parametrize(
    ("interval", "box", "expected"),
    [
        (1, Box(40, 70, 20, 10), Box(32, 64, 32, 16)),  # MCUs of 16 x 16
        (2, Box(40, 70, 20, 10), Box(32, 64, 32, 32)),
        (5, Box(40, 70, 20, 10), Box(32, 0, 32, 80)),
        (10, Box(40, 70, 20, 10), Box(32, 0, 32, 160)),
        (20, Box(40, 70, 20, 10), Box(32, 0, 32, 160)),  # two rows in an interval
        (40, Box(70, 70, 20, 10), Box(64, 0, 36, 160)),
        (3, Box(40, 70, 20, 10), Box(0, 0, 64, 160)),  # they begin anywhere in a row
        (7, Box(40, 70, 20, 10), Box(0, 0, 64, 160)),
        (0, Box(40, 70, 20, 10), Box(0, 0, 64, 160)),
        (1, Box(40, 70, 60, 90), Box(32, 64, 68, 96)),
        (1, Box(0, 0, 100, 160), Box(0, 0, 100, 160)),
        (1, Box(0, 0, 16, 160), Box(0, 0, 16, 160)),
    ],
)
def test_no_more_is_decoded_than_the_markers_allow(interval, box, expected):
    data = _with_opencv(_picture(100, 160), interval, "4:2:0", 80)
    part = cut_out(data, 100, 160, box, margin=0)
    assert part.box == expected and Image.open(io.BytesIO(part.data)).size == (expected.width, expected.height)
    decoded = Jpeg(data, 100, 160).decode_box(box, PixelBuffer(), decoding="fast")
    assert decoded.pixels.shape == (expected.height, expected.width, 3)
    if expected.top:
        assert len(part.data) < len(data) * 0.8 and part.data[-2:] == b"\xff\xd9"


def test_colours_are_interpolated_from_pixels_around_the_box():
    data = _with_opencv(_picture(100, 160), 1, "4:2:0", 80)
    assert cut_out(data, 100, 160, Box(32, 64, 16, 16), margin=0).box == Box(32, 64, 16, 16)
    assert cut_out(data, 100, 160, Box(32, 64, 16, 16), margin=2).box == Box(16, 48, 48, 48)
    assert cut_out(data, 100, 160, Box(34, 66, 12, 12), margin=2).box == Box(32, 64, 16, 16)


def _swap(data: bytearray) -> None:
    data[data.index(b"\xff\xd1") + 1] = 0xD2


def _drop(data: bytearray) -> None:
    at = data.index(b"\xff\xd1")
    del data[at : at + 2]


def _fill(data: bytearray) -> None:
    """A marker may have any number of 0xFF before it."""
    data.insert(data.index(b"\xff\xd1"), 0xFF)


def _add(data: bytearray) -> None:
    data[-2:-2] = b"\xff\xd0"


def _end(data: bytearray) -> None:
    del data[-2:]


def _another_scan(data: bytearray) -> None:
    data[-2:] = b"\xff\xda"


def _another_interval(data: bytearray) -> None:
    at = data.index(b"\xff\xdd")
    data[at + 4 : at + 6] = b"\x00\x02"


def _another_frame(data: bytearray) -> None:
    at = data.index(b"\xff\xc0")
    data[at:at] = data[at : at + 19]


def _other_size(data: bytearray) -> None:
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 7] = b"\x00\x70"


@pytest.mark.parametrize(
    "damage", [_swap, _drop, _fill, _add, _end, _another_scan, _another_interval, _another_frame, _other_size]
)
def test_nothing_is_left_out_if_a_marker_is_not_where_it_must_be(damage):
    data = bytearray(_with_opencv(_picture(100, 160), 1, "4:2:0", 80))
    assert cut_out(bytes(data), 100, 160, Box(40, 70, 20, 10), 0).box == Box(32, 64, 32, 16)
    damage(data)
    part = cut_out(bytes(data), 100, 160, Box(40, 70, 20, 10), 0)
    assert (part.box.top, part.box.left, part.box.width) == (0, 0, 160)


def test_bytes_after_the_end_do_not_matter():
    data = _with_opencv(_picture(100, 160), 1, "4:2:0", 80)
    box = Box(40, 70, 20, 10)
    assert cut_out(data + b"\xff\xd0trailing\xff", 100, 160, box, 0) == cut_out(data, 100, 160, box, 0)


def test_what_is_not_worth_it_is_decoded(monkeypatch):
    monkeypatch.setattr("fastvit_engine.data.pixels.jpeg_part.WORTH", 10**6)
    data = _with_opencv(_picture(100, 160), 1, "4:2:0", 80)
    assert cut_out(data, 100, 160, Box(40, 70, 20, 10), 0).box == Box(0, 0, 64, 160)


def test_an_image_of_many_intervals():
    """More than are numbered beforehand."""
    pixels = np.zeros((2064, 8200), np.uint8)
    pixels[1496:] = 200  # from a block on, so that nothing is lost
    data = _with_pillow(pixels, "L", restart_marker_blocks=1)
    decoded = open_image(data).decode_box(Box(1490, 8100, 20, 20), PixelBuffer())
    assert decoded.pixels.shape[0] < 50 and decoded.pixels.shape[1] < 50
    assert np.array_equal(decoded.cut(Box(1490, 8100, 20, 20))[..., 0], pixels[1490:1510, 8100:8120])


def test_a_jpeg_with_a_scan_for_each_colour_is_decoded_whole():
    image = open_image(_THREE_SCANS)
    assert _THREE_SCANS.count(b"\xff\xda") == 3
    assert len(image.decode_box(Box(0, 0, 8, 8), PixelBuffer()).pixels) == image.height == 72


@pytest.mark.parametrize("end", [3, 20, 200, 250])
def test_a_jpeg_that_ends_in_its_headers_is_not_cut(end):
    broken = Jpeg(_with_pillow(_picture(300, 200))[:end], 300, 200)
    with pytest.raises(ValueError):
        broken.decode_box(Box(0, 0, 10, 10), PixelBuffer())


def test_a_jpeg_that_the_fast_decoder_refuses_goes_to_pillow(monkeypatch):
    def refuse(*args, **options):
        raise ValueError

    pixels = _picture(100, 160)
    data, box = _with_opencv(pixels, 1, "4:2:0", 80), Box(40, 70, 20, 10)
    image = open_image(data)
    monkeypatch.setattr("simplejpeg.decode_jpeg", refuse)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))[40:60, 70:80]
    assert np.array_equal(image.decode_box(box, PixelBuffer()).cut(box), expected)


@pytest.mark.parametrize(
    ("width", "gray", "interval"),
    [(341, False, 2), (384, False, 3), (256, False, 2), (512, False, 4), (360, False, 1), (100, False, 7),
     (1, False, 1), (256, True, 4), (341, True, 43), (384, True, 6), (30, True, 4)],
)  # fmt: skip
def test_intervals_are_about_an_eighth_of_the_width(width, gray, interval):
    across = -(-width // (8 if gray else 16))
    assert restart_interval(width, gray) == interval and across % interval == 0
