"""What data.eval_transform changes: the top-1 of a finished run, and pixels and CPU time of photos.

    python -m benchmarks.evaluation_pixels RUN 'test-*.tar' 'photos-*.tar' --out evaluation_pixels.json

Takes seconds for a small model, on one CPU core. The file has the configuration of the run but its paths.
"""

import argparse
import glob
import importlib.metadata
import json
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import yaml

import fastvit_engine
from benchmarks.machine import commit, cpu_name
from fastvit_engine.config import EvalTransform
from fastvit_engine.data.pixels.crops import eval_view, render
from fastvit_engine.data.pixels.decode import PixelBuffer, open_image
from fastvit_engine.data.pixels.views import decode_views
from fastvit_engine.files import atomic_write

_TRANSFORMS: tuple[EvalTransform, ...] = get_args(EvalTransform)
_CROPS = ((224, 0.875), (384, 0.96), (16, 0.875))  # image_size, eval_crop
_ROUNDS = 3


def accuracies(run: Path, shards: str) -> dict[str, Any]:
    """Top-1 with each transform, and the number of images."""
    model = fastvit_engine.load_model(run)
    found: dict[str, Any] = {}
    for transform in _TRANSFORMS:
        model.eval_transform = transform
        accuracy = fastvit_engine.evaluate(model, shards)
        found[transform], found["images"] = accuracy.top1, accuracy.samples
    return found


def evaluated(data: bytes, size: int, eval_crop: float, transform: EvalTransform, space: PixelBuffer) -> np.ndarray:
    """uint8 [size, size, 3]: a photo as evaluation sees it."""
    image = open_image(data)
    view = eval_view(image.height, image.width, size, eval_crop, transform)
    decoded = decode_views(image, [view], space)
    out = np.empty((size, size, 3), np.uint8)
    render(decoded, view, out, PixelBuffer())
    return out


def differences(photos: list[bytes]) -> list[dict[str, Any]]:
    """dB between the pixels of timm and those of the others, in the median and at worst, at each size."""
    rows, space = [], PixelBuffer()
    for size, crop in _CROPS:
        decibels: dict[EvalTransform, list[float]] = {name: [] for name in _TRANSFORMS if name != "timm"}
        for data in photos:
            timm = evaluated(data, size, crop, "timm", space).astype(int)
            for name, values in decibels.items():
                error = ((evaluated(data, size, crop, name, space) - timm) ** 2).mean()
                values.append(10 * np.log10(255**2 / max(error, 1e-9)))
        row: dict[str, Any] = {"image_size": size, "eval_crop": crop}
        row |= {str(name): {"median": float(np.median(v)), "worst": min(v)} for name, v in decibels.items()}
        rows.append(row)
    return rows


def seconds_per_photo(photos: list[bytes]) -> dict[str, float]:
    """CPU seconds per photo with each transform, the lowest of some rounds that take turns."""
    space = PixelBuffer()
    best: dict[str, float] = dict.fromkeys(_TRANSFORMS, float("inf"))
    for _ in range(_ROUNDS):
        for transform in _TRANSFORMS:
            began = time.process_time()
            for data in photos:
                evaluated(data, *_CROPS[0], transform, space)
            best[transform] = min(best[transform], (time.process_time() - began) / len(photos))
    return best


def jpegs(pattern: str) -> Iterator[bytes]:
    """The JPEGs of some tars, in order."""
    for path in sorted(glob.glob(pattern)):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                if member.name.endswith((".jpg", ".jpeg")) and file is not None:
                    yield file.read()


def _configuration(run: Path) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((run / "config.yaml").read_text())
    config["data"] = {key: value for key, value in config["data"].items() if key not in ("train", "eval", "index")}
    return config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", type=Path, help="a finished run")
    parser.add_argument("shards", metavar="SHARDS", help="what to evaluate it on")
    parser.add_argument("photos", metavar="PHOTOS", help="tars with JPEGs as they come from a camera")
    parser.add_argument("--out", metavar="FILE", type=Path, required=True)
    args = parser.parse_args()
    photos = list(jpegs(args.photos))
    record = {
        "cpu": cpu_name(),
        "commit": commit(),
        "pillow": importlib.metadata.version("pillow"),
        "top1": accuracies(args.run, args.shards),
        "photos": len(photos),
        "decibels_from_timm": differences(photos),
        "cpu_seconds_per_photo": seconds_per_photo(photos),
        "configuration": _configuration(args.run),
    }
    atomic_write(args.out, json.dumps(record, indent=2) + "\n")
    print(json.dumps({key: value for key, value in record.items() if key != "configuration"}, indent=2))


if __name__ == "__main__":
    main()
