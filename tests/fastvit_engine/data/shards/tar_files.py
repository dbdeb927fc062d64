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
# Archives whose headers lie; none of them may be read as a whole archive.
LIES = {
    "negative octal size": header(b"a.jpg", b"-0000001000") + END,
    "negative binary size": header(b"a.jpg", b"\xff" * 12) + END,
    "size that is no number": header(b"a.jpg", b"abc") + END,
    "size with an underscore": header(b"a.jpg", b"0_1") + END,
    "pax size that is no number": pax(b"size=abc") + IMAGE + END,
    "negative pax size": pax(b"size=-512") + IMAGE + END,
    "huge pax size": pax(b"size=" + b"9" * 15) + IMAGE + END,
    "pax size of thousands of digits": pax(b"size=" + b"9" * 9000) + IMAGE + END,
    "pax record of length 0 after another": pax_of(b"6 a=b\n0 path=x\n") + IMAGE + END,
    "pax record that ends in its own key": pax_of(b"3 \nx=y\n") + IMAGE + END,
    "pax record that is longer than the header": pax_of(b"99 path=x\n") + IMAGE + END,
    "pax record without a newline": pax_of(b"8 path=x") + IMAGE + END,
    "wrong checksum": IMAGE[:148] + b"0000001\0" + IMAGE[156:] + END,
    "image of 6 GB": IMAGE + header(b"b.jpg", b"\x80" + (6 * 10**9).to_bytes(11, "big")) + b"only this",
    "label of 6 GB": IMAGE + header(b"a.cls", b"\x80" + (6 * 10**9).to_bytes(11, "big")) + b"only this",
    "long name of 6 GB": header(b"x", b"\x80" + (6 * 10**9).to_bytes(11, "big"), b"L") + IMAGE + END,
    "chain of 65 pax headers": pax(b"a=b") * 65 + IMAGE + END,
    "long names that no member follows": (header(b"x", b"00000000001", b"L") + pad(b"y")) * 3 + END,
}
