"""Data sets that come as arrays of pixels: CIFAR, MNIST and its kin, scikit-learn's digits. They become PNGs."""

import gzip
import io
import lzma
import math
import pickle
import struct
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, cast

import numpy as np

from fastvit_engine.data.build.sources.context import Context
from fastvit_engine.data.build.sources.listing import Listing, ListingBuilder
from fastvit_engine.data.shards.archive import open_forward
from fastvit_engine.data.shards.remote_path import AnyPath
from fastvit_engine.data.shards.tar import TarError, iterate_members
from fastvit_engine.errors import UserError
from fastvit_engine.storage.source import one_line

CIFAR_TRAIN = ("train", *(f"data_batch_{number}" for number in range(1, 6)))
CIFAR_FILES = (*CIFAR_TRAIN, "test", "test_batch", "meta", "batches.meta")
IDX_SUFFIXES = ("-ubyte", "-ubyte.gz", ".ubyte", ".ubyte.gz")

_LARGEST = 1 << 33  # bytes of pixels in one file; they are held in memory
_LARGEST_PICKLE = 1 << 30  # CIFAR-100's has 155 MB
_CHUNK = 1 << 24  # bytes read at once: a size that is a lie must not reserve memory


def list_digits(context: Context) -> Listing:
    """The 1,797 handwritten digits of scikit-learn as 8x8 images, 0..16 scaled to 0..255."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("the source 'digits' comes with scikit-learn: pip install scikit-learn") from error
    scans, labels = load_digits(return_X_y=True)
    context.describe("scikit-learn's handwritten digits")
    pixels = np.rint(scans.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)  # [N, 8, 8]
    builder = ListingBuilder()
    _add(builder, context, Path("digits"), pixels, [str(label) for label in labels])
    return builder.finish(context.classes or [str(digit) for digit in range(10)], "digits")


def list_cifar(path: AnyPath, context: Context) -> Listing:
    """The Python version of CIFAR-10 or CIFAR-100 (fine labels): its folder or its tar.gz."""
    files = _cifar_files(path)
    train = [name for name in CIFAR_TRAIN if name in files]
    test = [name for name in ("test", "test_batch") if name in files]
    if not train:
        raise UserError(f"{path} has no data_batch_1 or train: give the folder or tar.gz of CIFAR's Python version")
    classes: list[str] | None = None
    for name in ("meta", "batches.meta"):
        if name in files:
            meta = _unpickle(files[name](), f"{name} of {path}")
            names = meta.get(b"label_names") or meta.get(b"fine_label_names") or []
            classes = _class_names(names, f"{name} of {path}")
    builder = ListingBuilder()
    builder.labels_refer_to(classes)
    for name in [*train, *test]:
        batch = _unpickle(files[name](), f"{name} of {path}")
        array, labels = batch.get(b"data"), batch.get(b"labels", batch.get(b"fine_labels"))
        pixels = array.pixels if isinstance(array, _Array) else None
        if pixels is None or pixels.shape[1:] != (3072,):
            raise UserError(f"{name} of {path} holds no uint8 array of 3,072 columns: download it again")
        if not isinstance(labels, list) or len(labels) != len(pixels):
            count = len(labels) if isinstance(labels, list) else 0
            raise UserError(f"{name} of {path} has {count:,} labels for {len(pixels):,} images: download it again")
        if not all(type(label) is int for label in labels):
            raise UserError(f"{name} of {path} has labels that are no numbers: download it again")
        builder.held_out = name in test
        images = np.ascontiguousarray(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))  # [N, 32, 32, 3]
        _add(builder, context, path / name, images, [str(label) for label in labels])
    return builder.finish(context.classes or classes, str(path))


def list_idx(path: AnyPath, context: Context) -> Listing:
    """A folder with ...images-idx3-ubyte[.gz] and ...labels-idx1-ubyte[.gz] of MNIST's format; t10k is held out."""
    images = sorted(file for file in path.iterdir() if "images" in file.name and file.name.endswith(IDX_SUFFIXES))
    images.sort(key=lambda file: file.name.startswith(("t10k", "test")))
    if not images:
        raise UserError(f"{path} has no ...images-idx3-ubyte file: give the folder with MNIST's four files")
    builder = ListingBuilder()
    for file in images:
        labels_file = file.with_name(file.name.replace("images", "labels").replace("idx3", "idx1"))
        if not labels_file.exists():
            twin = labels_file.name.removesuffix(".gz")
            labels_file = labels_file.with_name(twin if labels_file.name.endswith(".gz") else twin + ".gz")
        if not labels_file.exists():
            raise UserError(f"{file} has no file of labels {labels_file.name} beside it: put it there")
        pixels, labels = _read_idx(file, 3), _read_idx(labels_file, 1)
        if len(pixels) != len(labels):
            raise UserError(f"{labels_file} has {len(labels):,} labels for the {len(pixels):,} images of {file}")
        builder.held_out = file.name.startswith(("t10k", "test")) and len(images) > 1
        _add(builder, context, file, pixels, [str(int(label)) for label in labels])
    return builder.finish(context.classes, str(path))


def _add(builder: ListingBuilder, context: Context, source: AnyPath, pixels: np.ndarray, labels: list[str]) -> None:
    """Puts the pixels, [N, H, W] or [N, H, W, C], into a scratch file and their offsets into the listing."""
    raw = context.scratch_file(source, ".pixels")
    with context.writing(raw) as file:
        file.write(pixels.data)
    builder.add_file("pixels", raw, pixels.shape[1:])
    size = int(np.prod(pixels.shape[1:]))
    for index, label in enumerate(labels):
        builder.add(f"{source.name}/{index}", [label], index * size, size)


def _cifar_files(path: AnyPath) -> dict[str, Callable[[], bytes]]:
    """A function that reads each of CIFAR's files, by the file's name."""
    if path.is_dir():
        return {name: partial(_read_file, path / name) for name in CIFAR_FILES if (path / name).is_file()}
    contents: dict[str, bytes] = {}
    try:
        with open_forward(str(path)) as (read, size):
            for member in iterate_members(read, size):
                name = member.name.rpartition("/")[2]
                if member.is_file and name in CIFAR_FILES:
                    if member.size > _LARGEST_PICKLE:
                        raise TarError(f"has a {name} of {member.size:,} bytes", member.start)
                    contents[name] = read(member.data, member.size)
    except (OSError, EOFError, TarError, zlib.error, lzma.LZMAError) as error:
        reason = f"it {error}" if isinstance(error, TarError) else one_line(error)
        raise UserError(f"{path} is damaged or unreadable ({reason}): download it again") from error
    return {name: partial(bytes, content) for name, content in contents.items()}


def _read_file(path: AnyPath) -> bytes:
    try:
        if (size := path.stat().st_size) > _LARGEST_PICKLE:
            raise UserError(f"{path} has {size:,} bytes, which no file of CIFAR has: download it again")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): make it readable") from error


def _class_names(names: Any, where: str) -> list[str] | None:
    """Class names as text; None if there are none."""
    try:
        return [label if isinstance(label, str) else cast(bytes, label).decode() for label in names] or None
    except (AttributeError, TypeError, UnicodeDecodeError) as error:
        raise UserError(f"{where} has class names that are no text: download it again") from error


class _ArrayKind:
    """What an array's pickle names as its type; it cannot be called to make an array of any size."""


class _ElementType:
    """NumPy's `dtype`, by name alone."""

    def __init__(self, name: str | bytes, *options: bool) -> None:
        self.name = name.decode() if isinstance(name, bytes) else name

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """The order of bytes and the like, which single bytes have not."""


class _Array:
    """An array as NumPy pickles it. Its own `__setstate__` crashes on states that are damaged."""

    def __init__(self, kind: Any, shape: Any, code: Any) -> None:
        self.pixels: np.ndarray | None = None  # None: of another type than uint8

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, element, is_fortran, content = state
        if isinstance(element, _ElementType) and element.name in ("u1", "uint8"):
            self.pixels = np.frombuffer(content, np.uint8).reshape(shape, order="F" if is_fortran else "C")


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    """Bytes in pickles that Python 3 wrote in an old protocol."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it has bytes encoded as {encoding!r}")
    return text.encode("latin1")


_FOUND = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _ArrayKind,
    ("numpy", "dtype"): _ElementType,
    ("_codecs", "encode"): _latin1,
}
# What writes dictionaries of lists, numbers, texts and arrays; other opcodes can ask for any memory, or endless time.
_OPCODES = """
PROTO FRAME STOP MARK MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1
BINFLOAT SHORT_BINSTRING BINSTRING SHORT_BINBYTES BINBYTES BINBYTES8 SHORT_BINUNICODE BINUNICODE BINUNICODE8 EMPTY_LIST
APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT GLOBAL STACK_GLOBAL REDUCE BUILD
"""


class _ArraysOnly(pickle._Unpickler):  # in Python: the one in C reserves memory for whatever number a memo is put under
    """A pickle may call any function that it names: this one finds those that NumPy arrays are made of, no others."""

    stack: list[Any]
    pop_mark: Callable[[], list[Any]]
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]] for name in _OPCODES.split()
    }

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def load_setitems(self) -> None:
        self._set(self.pop_mark())

    def _set(self, items: list[Any]) -> None:
        """Keys are text: to hash tuples of tuples of tuples may take for ever."""
        if not all(isinstance(key, str | bytes) for key in items[::2]):
            raise pickle.UnpicklingError("it has keys that are no text")
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    dispatch[pickle.SETITEM[0]], dispatch[pickle.SETITEMS[0]] = load_setitem, load_setitems

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _FOUND:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no array needs")
        return _FOUND[module, name]


def _unpickle(content: bytes, where: str) -> dict[bytes, Any]:
    try:
        value = _ArraysOnly(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # a damaged pickle raises many kinds
        reason = f"{type(error).__name__}: {one_line(error)}"[:200]
        reason = one_line(error)[:200] if isinstance(error, pickle.UnpicklingError) else reason
        raise UserError(f"{where} is not one of CIFAR's pickles ({reason}): download it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{where} is not one of CIFAR's pickles (it is no dictionary): download it again")
    return {key.encode() if isinstance(key, str) else key: entry for key, entry in value.items()}


def _read_idx(path: AnyPath, dimensions: int) -> np.ndarray:
    """uint8 array of an idx file: 0, 0, type 8 = uint8, the number of dimensions, big-endian sizes, data."""
    try:
        with path.open("rb") as opened, gzip.open(opened) if path.name.endswith(".gz") else opened as file:
            header = file.read(4 + 4 * dimensions)
            if header[:4] != bytes([0, 0, 8, dimensions]) or len(header) < 4 + 4 * dimensions:
                raise UserError(f"{path} is not an idx file of {dimensions}-dimensional bytes: download it again")
            shape = struct.unpack(f">{dimensions}I", header[4:])
            size = math.prod(shape)
            if size > _LARGEST:
                raise UserError(f"{path} announces {shape}, which are more than {_LARGEST:,} bytes: download it again")
            data = _take(cast(BinaryIO, file), size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({one_line(error)}): download it again") from error
    if len(data) != size:
        found = f"{len(data):,}" if len(data) < size else f"more than {size:,}"
        raise UserError(f"{path} has {found} bytes of data where {shape} are announced: download it again")
    return np.frombuffer(data, np.uint8).reshape(shape)


def _take(file: BinaryIO, size: int) -> bytes:
    """The next `size` bytes, fewer at the end of the file."""
    data = bytearray()
    while len(data) < size and (chunk := file.read(min(_CHUNK, size - len(data)))):
        data += chunk
    return bytes(data)
