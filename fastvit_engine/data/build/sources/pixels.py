"""Data sets that come as arrays of pixels: CIFAR, MNIST and its kin, scikit-learn's digits. They become PNGs."""

import _codecs
import gzip
import io
import pickle
import struct
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fastvit_engine.data.build.sources.context import Context
from fastvit_engine.data.build.sources.listing import Listing, ListingBuilder
from fastvit_engine.errors import UserError

CIFAR_TRAIN = ("train", *(f"data_batch_{number}" for number in range(1, 6)))
CIFAR_FILES = (*CIFAR_TRAIN, "test", "test_batch", "meta", "batches.meta")
IDX_SUFFIXES = ("-ubyte", "-ubyte.gz", ".ubyte", ".ubyte.gz")


def list_digits(context: Context) -> Listing:
    """The 1,797 handwritten digits of scikit-learn as 8x8 images, 0..16 scaled to 0..255."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("the source 'digits' comes with scikit-learn: pip install scikit-learn") from error
    scans, labels = load_digits(return_X_y=True)
    pixels = np.rint(scans.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)  # [N, 8, 8]
    builder = ListingBuilder()
    _add(builder, context, Path("digits"), pixels, [str(label) for label in labels])
    return builder.finish(context.classes or [str(digit) for digit in range(10)], "digits")


def list_cifar(path: Path, context: Context) -> Listing:
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
            classes = [bytes(label).decode() for label in names] or None
    builder = ListingBuilder()
    builder.labels_refer_to(classes)
    for name in [*train, *test]:
        batch = _unpickle(files[name](), f"{name} of {path}")
        pixels, labels = batch.get(b"data"), batch.get(b"labels", batch.get(b"fine_labels"))
        if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (3072,):
            raise UserError(f"{name} of {path} holds no uint8 array of 3,072 columns: download it again")
        if not isinstance(labels, list) or len(labels) != len(pixels):
            count = len(labels) if isinstance(labels, list) else 0
            raise UserError(f"{name} of {path} has {count:,} labels for {len(pixels):,} images: download it again")
        builder.held_out = name in test
        images = np.ascontiguousarray(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))  # [N, 32, 32, 3]
        _add(builder, context, path / name, images, [str(int(label)) for label in labels])
    return builder.finish(context.classes or classes, str(path))


def list_idx(path: Path, context: Context) -> Listing:
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


def _add(builder: ListingBuilder, context: Context, source: Path, pixels: np.ndarray, labels: list[str]) -> None:
    """Puts the pixels, [N, H, W] or [N, H, W, C], into a scratch file and their offsets into the listing."""
    raw = context.scratch_file(source, ".pixels")
    with context.writing(raw) as file:
        file.write(pixels.data)
    builder.add_file("pixels", raw, pixels.shape[1:])
    size = int(np.prod(pixels.shape[1:]))
    for index, label in enumerate(labels):
        builder.add(f"{source.name}/{index}", [label], index * size, size)


def _cifar_files(path: Path) -> dict[str, Callable[[], bytes]]:
    """A function that reads each of CIFAR's files, by the file's name."""
    if path.is_dir():
        return {name: (path / name).read_bytes for name in CIFAR_FILES if (path / name).is_file()}
    contents: dict[str, bytes] = {}
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                name = member.name.rpartition("/")[2]
                if member.isreg() and name in CIFAR_FILES:
                    file = tar.extractfile(member)
                    assert file is not None
                    contents[name] = file.read()
    except (OSError, EOFError, tarfile.TarError) as error:
        raise UserError(f"{path} is damaged or unreadable ({error}): download it again") from error
    return {name: partial(bytes, content) for name, content in contents.items()}


class _ArraysOnly(pickle.Unpickler):
    """A pickle may call any function that it names: this one finds those that NumPy arrays are made of, no others."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct")):
            return np.empty(0).__reduce__()[0]
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):  # bytes, in pickles that Python 3 wrote in an old protocol
            return _codecs.encode
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no array needs")


def _unpickle(content: bytes, where: str) -> dict[bytes, Any]:
    try:
        value = _ArraysOnly(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # a damaged pickle raises many kinds
        raise UserError(f"{where} is not one of CIFAR's pickles ({error}): download it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{where} is not one of CIFAR's pickles (it is no dictionary): download it again")
    return {key.encode() if isinstance(key, str) else key: entry for key, entry in value.items()}


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    """uint8 array of an idx file: 0, 0, type 8 = uint8, the number of dimensions, big-endian sizes, data."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.name.endswith(".gz") else path.read_bytes()
    except (OSError, EOFError) as error:
        raise UserError(f"{path} cannot be read ({error}): download it again") from error
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) < 4 + 4 * dimensions:
        raise UserError(f"{path} is not an idx file of {dimensions}-dimensional bytes: download it again")
    shape = struct.unpack(f">{dimensions}I", content[4 : 4 + 4 * dimensions])
    data = np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions)
    if data.size != np.prod(shape, dtype=np.int64):
        raise UserError(f"{path} has {data.size:,} bytes of data where {shape} are announced: download it again")
    return data.reshape(shape)
