"""Makes images to measure data loading with, if you have none: noise with the spectrum and size of photos."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def write_shards(folder: Path, samples: int, *, height: int = 375, width: int = 500, per_shard: int = 100) -> Path:
    """WebDataset shards of random JPEGs with labels below 1,000, the same on every machine. Returns the folder.

    Amplitudes fall with frequency as in photos, so that a JPEG of quality 90 has a photo's size; edges and faces it has
    none, and decoders may take another time for real ones.
    """
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.Generator(np.random.Philox(0))
    for first in range(0, samples, per_shard):
        with tarfile.open(folder / f"noise-{first // per_shard:04d}.tar", "w") as tar:
            for number in range(first, min(samples, first + per_shard)):
                label = str(int(generator.integers(1000))).encode()
                for name, content in (("jpg", noise_jpeg(generator, height, width)), ("cls", label)):
                    member = tarfile.TarInfo(f"{number:06d}.{name}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return folder


AMPLITUDE, SLOPE = 16.0, 0.1  # of the finest noise out of 255, and how amplitudes grow with size


def noise_jpeg(generator: np.random.Generator, height: int, width: int) -> bytes:
    image = np.full((height, width, 3), 128.0)
    cell = max(height, width)
    while cell >= 1:
        rows, columns = -(-height // cell) + 1, -(-width // cell) + 1
        coarse = generator.normal(0, AMPLITUDE * cell**SLOPE, (rows, columns, 3)).astype(np.float32)
        for channel in range(3):
            plane = Image.fromarray(coarse[..., channel]).resize(
                (columns * cell, rows * cell), Image.Resampling.BILINEAR
            )
            image[..., channel] += np.asarray(plane)[:height, :width]
        cell //= 2
    buffer = io.BytesIO()
    Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
