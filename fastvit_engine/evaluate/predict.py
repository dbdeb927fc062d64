"""What a model says of images that are files, without labels."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fastvit_engine.config import Config
from fastvit_engine.data.check.contact_sheet import Tile, draw_sheet
from fastvit_engine.data.pixels.eval_image import eval_image
from fastvit_engine.data.shards.image_files import has_image_suffix
from fastvit_engine.errors import UserError
from fastvit_engine.evaluate.confusion import name_of
from fastvit_engine.evaluate.record import check_scores

_COLUMNS, _MOST_SHOWN = 8, 200  # tiles of a sheet


class Prediction(NamedTuple):
    """The most probable outputs for an image."""

    path: str
    outputs: list[int]
    probabilities: list[float]  # of a softmax over all outputs


class Unreadable(NamedTuple):
    """A file that is no usable image."""

    path: str
    reason: str


def find_images(paths: Iterable[str]) -> list[Path]:
    """The files that are named, and the images in folders that are, and in folders below. Raises UserError for none."""
    found: list[Path] = []
    for text in paths:
        path = Path(text).expanduser()
        if not path.is_dir():
            found.append(path)
            continue
        inside = sorted(file for file in path.rglob("*") if has_image_suffix(file.name) and file.is_file())
        if not inside:
            raise UserError(f"{path} holds no images: name a folder of images, or the files")
        found += inside
    return found


def prepare_image(path: Path, config: Config) -> np.ndarray:
    """uint8 [S, S, 3]: an image as evaluation shows it to the model. Raises ValueError or OSError if it is unusable."""
    return eval_image(path.read_bytes(), config)


def predict(
    model: nn.Module, paths: Sequence[Path], config: Config, *, top: int, batch_size: int
) -> Iterator[Prediction | Unreadable]:
    """What `model`, in eval mode, says of each image, in order: `top` outputs. config: as `config_for` makes it.

    Raises UserError if the scores of an image are not finite.
    """
    for start in range(0, len(paths), batch_size):
        images: dict[Path, np.ndarray] = {}
        problems: dict[Path, str] = {}
        for path in paths[start : start + batch_size]:
            try:
                images[path] = prepare_image(path, config)
            except (ValueError, OSError) as error:
                problems[path] = str(getattr(error, "strerror", None) or error)
        answers: dict[Path, tuple[list[int], list[float]]] = {}
        if images:
            outputs, probabilities = most_probable(model, list(images.values()), list(images), top)
            answers = dict(zip(images, zip(outputs.tolist(), probabilities.tolist(), strict=True), strict=True))
        for path in paths[start : start + batch_size]:
            if path in problems:
                yield Unreadable(str(path), problems[path])
            else:
                yield Prediction(str(path), *answers[path])


@torch.no_grad()
def most_probable(
    model: nn.Module, images: Sequence[np.ndarray], names: Sequence[object], top: int
) -> tuple[np.ndarray, np.ndarray]:
    """The `top` outputs for each image and their probabilities, by a softmax over all: int64 and float32 [B, K].

    model: in eval mode. images: uint8 [S, S, 3], with `names` for the UserError if the scores of one are not finite.
    """
    device = next(model.parameters()).device
    logits: Tensor = model(torch.from_numpy(np.stack(images)).to(device)).float()
    check_scores(logits, names)
    probabilities, outputs = logits.softmax(dim=1).topk(min(top, logits.shape[1]), dim=1)
    return outputs.cpu().numpy(), probabilities.cpu().numpy()


def prediction_sheet(found: Sequence[Prediction], config: Config, names: Sequence[str] | None) -> Image.Image:
    """The images as the model saw them, each with its most probable class; the first 200 of more."""
    shown = found[:_MOST_SHOWN]
    tiles = []
    for one in shown:
        caption = f"{100 * one.probabilities[0]:.0f} % {name_of(one.outputs[0], names)}"
        tiles.append(Tile(prepare_image(Path(one.path), config), caption))
    rows = [tiles[start : start + _COLUMNS] for start in range(0, len(tiles), _COLUMNS)]
    more = f", the first {len(shown):,} of them" if len(shown) < len(found) else ""
    return draw_sheet(rows, title="predictions", note=f"{len(found):,} images{more}")
