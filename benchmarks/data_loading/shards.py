"""The shards that are measured on: some of the user's, and the same photos made smaller."""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image
from webdataset.writer import TarWriter

from benchmarks.data_loading.variants import IMAGE_KEYS
from fastvit_engine.data.pixels.decode import decode_image
from fastvit_engine.data.shards.names import is_local, list_shards
from fastvit_engine.data.stream.sequential import read_shard
from fastvit_engine.errors import UserError

_MOST_BYTES = 1 << 28  # of shards: what the page cache holds, so that the disk is not what is measured


def link_shards(pattern: str, folder: Path) -> None:
    """Fills a new folder with links to the first of the shards: nothing is written beside them."""
    folder.mkdir()
    total = 0
    for number, shard in enumerate(list_shards([pattern], named="SHARDS")):
        if not is_local(shard):
            raise UserError(f"shard {shard} is not local: copy some shards to a local disk to measure on")
        total += Path(shard).stat().st_size
        if number and total > _MOST_BYTES:
            break
        (folder / f"{number:06d}-{Path(shard).name}").symlink_to(Path(shard).resolve())


def repack_shards(source: Path, folder: Path, short_side: int) -> None:
    """Writes the samples again with images of at most this short side in pixels, as JPEG of quality 90."""
    folder.mkdir()
    for shard in sorted(source.glob("*.tar")):
        with TarWriter(str(folder / shard.name)) as tar:
            for sample in read_shard(str(shard)):
                members = {name: value for name, value in sample.items() if name == "__key__" or name[:2] != "__"}
                name = next(name for name in IMAGE_KEYS.split(";") if name in members)
                tar.write({**members, name: _shrink(members[name], short_side)})


def read_photos(shards: Sequence[str], most: int) -> list[bytes]:
    """The first JPEG files."""
    found: list[bytes] = []
    for data in _jpegs(shards):
        found.append(data)
        if len(found) == most:
            break
    return found


def _jpegs(shards: Sequence[str]) -> Iterator[bytes]:
    for shard in shards:
        for sample in read_shard(shard):
            data = next((sample[name] for name in IMAGE_KEYS.split(";") if name in sample), b"")
            if data[:2] == b"\xff\xd8":
                yield data


def _shrink(data: bytes, short_side: int) -> bytes:
    image = Image.fromarray(decode_image(data))
    scale = short_side / min(image.size)
    if scale < 1:
        size = (round(image.width * scale), round(image.height * scale))
        image = image.resize(size, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
