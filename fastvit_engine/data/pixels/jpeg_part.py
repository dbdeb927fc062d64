"""The part of a JPEG that a box of its pixels needs, as a smaller JPEG: cut out of the compressed data.

Baseline data is one row of blocks after another (MCUs, of 16 x 16 pixels if the colours are halved). A decoder that is
told of fewer rows stops there, so what is below the box costs nothing. What is above, left and right of it can be
left out if there are restart markers (ITU-T T.81, E.1.4): the intervals between them are coded independently of each
other. The pixels stay the same to the byte, except at the edges of a part if the colours are interpolated.
"""

import struct
from typing import NamedTuple

import numpy as np

_BASELINE, _SCAN, _INTERVAL, _END = 0xC0, 0xDA, 0xDD, 0xD9  # markers, after 0xFF
_SKIPPED = {0xC4, 0xDB, 0xFE, *range(0xE0, 0xF0)}  # tables, comments and what applications add
_LAST = bytes([_END])
_SIZE = struct.Struct(">HH")  # height and width in a frame header
_NUMBERS = np.resize(np.arange(0xD0, 0xD8, dtype=np.uint8), 1 << 16)  # restart markers in their order
WORTH = 2500  # bytes: to leave out fewer takes longer than to decode them


class Box(NamedTuple):
    """Some of the pixels of an image."""

    top: int
    left: int
    height: int
    width: int

    @property
    def bottom(self) -> int:
        return self.top + self.height

    @property
    def right(self) -> int:
        return self.left + self.width


class Part(NamedTuple):
    """A JPEG that shows a box of another one."""

    data: bytes | bytearray
    box: Box


class _Layout(NamedTuple):
    """Where the parts of a baseline JPEG with one scan are."""

    frame: int  # the frame header, which holds the size
    scan: int  # the entropy-coded data
    interval: int  # MCUs between two restart markers; 0: there are none
    rows: int  # of pixels, in an MCU
    columns: int


def cut_out(data: bytes, height: int, width: int, box: Box, margin: int) -> Part:
    """The smallest part of a JPEG of this size that has the box and so many pixels around it; it may be all of it.

    Data above, left or right of it is left out only if all restart markers are where they must be: then what a decoder
    makes of the rest does not depend on it, damaged or not.
    """
    layout = _layout(data, height, width)
    if layout is None:
        return Part(data, Box(0, 0, height, width))
    needed = _needed(height, width, box, margin)
    return _intervals(data, height, width, layout, *needed) or _upper(data, height, width, layout, needed[2])


def whole_part(data: bytes, height: int, width: int, box: Box, margin: int) -> Part | None:
    """As `cut_out`, as a JPEG that every decoder takes: nothing is behind its last row. None if it is not baseline."""
    layout = _layout(data, height, width)
    if layout is None:
        return None
    return _intervals(data, height, width, layout, *_needed(height, width, box, margin)) or Part(
        data, Box(0, 0, height, width)
    )


def restart_interval(width: int, gray: bool) -> int:
    """MCUs between two restart markers of a JPEG of this width, gray or with colours of half the resolution.

    About an eighth of a row, so that a few bytes of a hundred go to markers; all of it if its number of MCUs has no
    such divisor.
    """
    across, least = (-(-width // 8), 4) if gray else (-(-width // 16), 1)
    return next((count for count in range(across // 8, least - 1, -1) if across % count == 0), across)


def _needed(height: int, width: int, box: Box, margin: int) -> tuple[int, int, int, int]:
    """Top, left, bottom and right of the pixels that are needed."""
    top, left = max(0, box.top - margin), max(0, box.left - margin)
    return top, left, min(height, box.bottom + margin), min(width, box.right + margin)


def _layout(data: bytes, height: int, width: int) -> _Layout | None:
    """None for a JPEG of another kind, and if its headers are damaged."""
    at, frame, interval = 2, 0, 0
    try:
        while (marker := data[at + 1]) != _SCAN:
            if marker == _BASELINE and not frame:
                frame = at
            elif marker == _INTERVAL:
                interval = data[at + 4] << 8 | data[at + 5]
            elif marker not in _SKIPPED:
                return None
            if data[at] != 0xFF:
                return None
            at += 2 + (data[at + 2] << 8 | data[at + 3])
        size, components = data[frame + 4 : frame + 9], data[frame + 9]
        one_scan = frame and data[at] == 0xFF and data[at + 4] == components in (1, 3)
        if not one_scan or size != b"\x08" + height.to_bytes(2, "big") + width.to_bytes(2, "big"):
            return None
        factors = data[frame + 11 : frame + 11 + 3 * components : 3] if components > 1 else b"\x11"
        scan = at + 2 + (data[at + 2] << 8 | data[at + 3])
    except (IndexError, OverflowError):  # damaged
        return None
    rows, columns = 8 * max(both & 15 for both in factors), 8 * max(both >> 4 for both in factors)
    return _Layout(frame, scan, interval, rows, columns) if rows and columns else None


def _upper(data: bytes, height: int, width: int, layout: _Layout, bottom: int) -> Part:
    """The rows of MCUs from the top on that are needed."""
    rows = -(-bottom // layout.rows) * layout.rows
    if rows >= height:
        return Part(data, Box(0, 0, height, width))
    shorter = bytearray(data)
    shorter[layout.frame + 5 : layout.frame + 7] = rows.to_bytes(2, "big")
    return Part(shorter, Box(0, 0, rows, width))


def _intervals(
    data: bytes, height: int, width: int, layout: _Layout, top: int, left: int, bottom: int, right: int
) -> Part | None:
    """The restart intervals that are needed; None if they cannot be told apart, or if it would save no time."""
    frame, scan, interval, rows, columns = layout
    across = -(-width // columns)  # MCUs
    if not interval:
        return None
    if across % interval == 0:  # intervals in a row
        columns *= interval
    elif interval % across == 0:  # rows in an interval
        rows, columns = rows * (interval // across), columns * across
    else:
        return None
    across, down = -(-width // columns), -(-height // rows)
    first_row, end_row = top // rows, -(-bottom // rows)
    first_column, end_column = left // columns, -(-right // columns)
    spared = across * end_row - (end_column - first_column) * (end_row - first_row)
    if (len(data) - scan) * spared < WORTH * across * down:
        return None

    starts = _starts(data, scan, across * down)
    if starts is None:
        return None
    from_row, end = first_row * across, end_row * across
    begins = starts[from_row + first_column : end : across].tolist()
    ends = starts[from_row + end_column : end + 1 : across].tolist()
    part = bytearray().join([data[:scan], *[data[begin:end] for begin, end in zip(begins, ends, strict=True)]])
    top, left = first_row * rows, first_column * columns
    box = Box(top, left, min(height, end_row * rows) - top, min(width, end_column * columns) - left)
    part[frame + 5 : frame + 9] = _SIZE.pack(box.height, box.width)
    lengths = (starts[1:] - starts[:-1]).reshape(down, across)[first_row:end_row, first_column:end_column]
    numbers = lengths.cumsum() + (scan - 1)  # where those of the restart markers are
    np.frombuffer(part, np.uint8)[numbers] = _numbers(len(numbers))
    part[-1] = _END
    return Part(part, box)


def _starts(data: bytes, scan: int, count: int) -> np.ndarray | None:
    """Where each of `count` intervals starts, int64 [count + 1]: the last number is where the last one ends.

    None if they are not exactly so many, in order.
    """
    stream = np.frombuffer(data, np.uint8, offset=scan)
    escapes = (stream[:-1] == 0xFF).nonzero()[0]
    codes = stream[1:][escapes]
    markers = codes.nonzero()[0][:count]  # 0 follows a byte of data that is 0xFF
    if codes[markers].tobytes() != _numbers(count - 1).tobytes() + _LAST:
        return None
    starts = np.empty(count + 1, np.int64)
    starts[0] = scan
    np.add(escapes[markers], scan + 2, out=starts[1:])
    return starts


def _numbers(count: int) -> np.ndarray:
    """The second bytes of the first restart markers, uint8 [count]."""
    return _NUMBERS[:count] if count <= len(_NUMBERS) else np.resize(_NUMBERS, count)
