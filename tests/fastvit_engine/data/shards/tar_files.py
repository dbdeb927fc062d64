"""Tar archives written by hand, header by header, so that they may hold anything."""

from fastvit_engine.data.shards.tar import BLOCK


def header(name: bytes, size: bytes, kind: bytes = b"0") -> bytes:
    """A ustar header with any size field."""
    header = bytearray(BLOCK)
    header[: len(name)] = name
    header[100:124] = b"0000644\x000000000\x000000000\x00"
    header[124:136] = size.ljust(12, b"\0")
    header[136:148] = b"00000000000\x00"
    header[156:157] = kind
    header[257:265] = b"ustar\x0000"
    return bytes(header[:148] + b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:])) + header[156:])


def pad(content: bytes) -> bytes:
    return content + bytes(-len(content) % BLOCK)


def pax(record: bytes) -> bytes:
    length = len(record) + 3
    while len(str(length)) + len(record) + 2 != length:
        length += 1
    return pax_of(b"%d %s\n" % (length, record))


def pax_of(content: bytes) -> bytes:
    return header(b"pax", b"%011o" % len(content), b"x") + pad(content)


END = bytes(2 * BLOCK)
IMAGE = header(b"a.jpg", b"00000000001") + pad(b"x")
LABEL = header(b"a.cls", b"00000000001") + pad(b"0")
