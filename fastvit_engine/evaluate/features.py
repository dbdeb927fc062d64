"""What a model's head sees of images: extracted from shards, and kept in a file."""

import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastvit_engine.data import Batch
from fastvit_engine.distributed.world import World
from fastvit_engine.errors import UserError
from fastvit_engine.files import atomic_writer
from fastvit_engine.models import TimmModel

# The arrays of a file with both sets of few-shot features, as `few_shot_accuracy` names its arguments.
BOTH = (("train_x", "train_y", "train_keys"), ("eval_x", "eval_y", "eval_keys"))
_COMMAND = "`fastvit features MODEL --data SHARDS --out FILE`"
_SHOWN = 5  # names of arrays in a sentence


class Features(NamedTuple):
    """What a model makes of some samples, in the order of the shards."""

    features: NDArray[np.float32]  # [N, R]
    labels: NDArray[np.int64]  # [N]
    keys: NDArray[np.str_]  # [N], of the samples


@torch.no_grad()
def extract_features(model: nn.Module, batches: Iterable[Batch], world: World | None = None) -> Features:
    """The representation of every usable image, over all processes of `world`; None: this process alone.

    Collective, and every process must get the same number of batches. Each process returns the features of all. The
    model is called as a whole, because its parameters may be sharded. Raises UserError if no image is usable, or they
    have several labels each.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device if world is None else world.device
    parts: list[tuple[Any, ...]] = []
    try:
        with _representing(model) as represent:
            for batch in batches:
                if batch.labels.ndim != 1:
                    raise UserError("features need one label per image: set data.max_labels=1")
                represented = represent(batch.images.to(device, non_blocking=True))
                kept = (batch.weights > 0).numpy()
                features = represented.float().cpu().numpy()[kept]
                keys = np.array(batch.keys, dtype=np.str_)[kept]
                parts.append((batch.seeds[kept], features, batch.labels.numpy()[kept], keys))
    finally:
        model.train(was_training)
    parts = parts if world is None else [part for of_rank in world.gather(parts) for part in of_rank]
    if not sum(len(positions) for positions, *_ in parts):
        raise UserError("no sample has a usable image: see what `fastvit data verify` says of the shards")
    positions, features, labels, keys = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    order = np.argsort(positions, kind="stable")
    return Features(features[order], labels[order], keys[order])


def check_features(found: Features, where: object) -> None:
    """Raises UserError, naming the first sample, if features are not finite. where: their source, for the sentence."""
    bad = ~np.isfinite(found.features).all(axis=1)
    if bad.any():
        raise UserError(
            f"{where}: the features of sample '{found.keys[bad.argmax()]}' are not finite: the model's weights are "
            "broken, or it overflows in this precision"
        )


@contextmanager
def _representing(model: nn.Module) -> Iterator[Callable[[Tensor], Tensor]]:
    """A function of images that gives what the head gets of them, [B, R]."""
    inner: Any = getattr(model, "module", model)  # the model that an engine wraps
    if isinstance(inner, TimmModel):
        yield partial(model, represent=True)
        return
    seen: list[Tensor] = []
    hook = inner.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))

    def represent(images: Tensor) -> Tensor:
        model(images)
        return seen.pop()

    try:
        yield represent
    finally:
        hook.remove()


def save_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Writes an .npz file, whole or not at all. Raises UserError if it cannot be written."""
    try:
        with atomic_writer(path) as file:
            named: dict[str, Any] = dict(arrays)
            np.savez(file, **named)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error}): choose another file") from error


def save_features(path: Path, features: Features) -> None:
    """Writes `features`, `labels` and `keys` as an .npz file. Raises UserError if it cannot be written."""
    save_arrays(path, features._asdict())


def save_both(path: Path, train: Features, evaluation: Features) -> None:
    """Writes the features that few-shot figures follow from as one .npz file, under the names of `BOTH`."""
    arrays: dict[str, np.ndarray] = {}
    for names, part in zip(BOTH, (train, evaluation), strict=True):
        arrays |= dict(zip(names, part, strict=True))
    save_arrays(path, arrays)


def load_features(path: Path) -> Features:
    """Reads what `save_features` wrote. Raises UserError for any other file."""
    return _features_in(path, load_arrays(path), ("features", "labels", "keys"))


def load_both(path: Path) -> tuple[Features, Features]:
    """Reads what `save_both` wrote. Raises UserError for any other file."""
    arrays = load_arrays(path)
    train, evaluation = (_features_in(path, arrays, names) for names in BOTH)
    return train, evaluation


def load_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of an .npz file; none that is pickled, which could run code. Raises UserError if it is damaged."""
    again = f"make it again with {_COMMAND}"
    try:
        found = np.load(path, allow_pickle=False)
        if not isinstance(found, np.lib.npyio.NpzFile):
            raise UserError(f"{path} holds one array, not features: {again}")
        with found as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: {again}") from error
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, MemoryError, SyntaxError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path} is not a whole file of features ({reason}): {again}") from error


def _features_in(path: Path, arrays: Mapping[str, NDArray[Any]], names: tuple[str, str, str]) -> Features:
    """The features among the arrays of a file. Raises UserError if one is missing, or is not what its name says."""
    if missing := [name for name in names if name not in arrays]:
        there = [*sorted(arrays)[:_SHOWN], *(["..."] if len(arrays) > _SHOWN else [])]
        raise UserError(
            f"{path} has no array '{missing[0]}', only {', '.join(there) or 'none'}: give a file of `fastvit "
            "features` for each of the two sets, or the one that `fastvit fewshot` wrote with --features-out"
        )
    features, labels, keys = (arrays[name] for name in names)
    if (
        features.ndim != 2
        or labels.shape != features.shape[:1]
        or keys.shape != labels.shape
        or features.dtype.kind != "f"
        or labels.dtype.kind not in "iu"
        or keys.dtype.kind != "U"
        or not features.size
    ):
        forms = ", ".join(f"{name} {array.dtype} {list(array.shape)}" for name, array in
                          zip(names, (features, labels, keys), strict=True))  # fmt: skip
        raise UserError(f"{path} holds no features and labels ({forms}): make it again with {_COMMAND}")
    if labels.min() < 0:
        raise UserError(f"{path} has the label {labels.min()}, and classes are counted from 0: correct its labels")
    return Features(features.astype(np.float32, copy=False), labels.astype(np.int64), keys)
