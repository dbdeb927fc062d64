"""The arguments that name a trained model and how images are read for it, shared by the commands that use one."""

import argparse
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from fastvit_engine.commands.parser import positive
from fastvit_engine.commands.settings import add_settings
from fastvit_engine.errors import UserError
from fastvit_engine.shown import say

if TYPE_CHECKING:
    from fastvit_engine.models import AnyModel

MODEL_HELP = (
    "a run folder (its latest checkpoint) or a checkpoint, path or URL; a .safetensors or .npz file; or a folder of "
    "transformers or timm with config.json"
)
_INTERPOLATION, _BATCH_SIZE, _PRECISION = "bilinear", 64, "fp32"


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Which weights, at which resolution and precision; and --recipe and --set for how images are read."""
    parser.add_argument("--name", help="B/16 or vit_base_patch16_224, for weights with timm's names that do not say it")
    parser.add_argument("--ema", action="store_true", help="use the moving average of a run's weights")
    parser.add_argument(
        "--image-size", metavar="N", type=positive, help="pixels, if not the model's: its position table is resampled"
    )
    parser.add_argument(
        "--interpolation",
        choices=("bilinear", "bicubic"),
        default=_INTERPOLATION,
        help="how: bilinear, as the authors' code (default), or bicubic, as DINOv2 and transformers",
    )
    parser.add_argument(
        "--batch-size",
        metavar="N",
        type=positive,
        default=_BATCH_SIZE,
        help="images per forward pass (default: %(default)s)",
    )
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16"),
        default=_PRECISION,
        help="number format of weights and activations; bf16 is what a run in bf16 evaluates with (default: fp32)",
    )
    add_settings(parser)


def given_model_options(args: argparse.Namespace) -> list[str]:
    """Which of the options of `add_model_options` somebody has set to another value than their default."""
    usual = {"interpolation": _INTERPOLATION, "batch_size": _BATCH_SIZE, "precision": _PRECISION}
    keys = ("name", "ema", "image_size", "interpolation", "batch_size", "precision", "recipe", "set")
    return [f"--{key.replace('_', '-')}" for key in keys if (value := getattr(args, key)) and value != usual.get(key)]


def load(source: str, args: argparse.Namespace) -> "AnyModel":
    """The model that an argument names, on the first GPU or the CPU. Raises UserError."""
    import warnings

    import torch

    from fastvit_engine.checkpoint.load import load_model
    from fastvit_engine.trusted_folders import trust_compiled_code

    trust_compiled_code()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = load_model(
            source, image_size=args.image_size, ema=args.ema, name=args.name, interpolation=args.interpolation
        )
    for one in caught:
        if issubclass(one.category, UserWarning):
            say(f"note: {one.message}", file=sys.stderr)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device, torch.bfloat16 if args.precision == "bf16" else torch.float32)


def check_output(path: Path, option: str, inputs: Iterable[str | Path | None] = ()) -> None:
    """Raises UserError if a file cannot be written there, or would replace an input, before hours of work are lost."""
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"{path} cannot be written: {path.parent} is no folder that you may write to")
    if os.path.isdir(path):  # unlike Path.is_dir, also of a name that is too long
        raise UserError(f"{path} cannot be written: it is a folder, and {option} names a file")
    for source in inputs:
        if source is not None and same_file(path, source):
            raise UserError(f"{path} is an input of this command, which {option} would replace: name another file")


def check_output_folder(path: Path) -> None:
    """Raises UserError if files cannot be written into a folder of this name, which need not exist."""
    there = next(folder for folder in (path.absolute(), *path.absolute().parents) if os.path.exists(folder))
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"{path} cannot be written: {there} is no folder that you may write to")


def same_file(path: Path, source: str | Path) -> bool:
    """Whether both name one existing file; a pattern or a URL names none."""
    try:
        return os.path.isfile(path) and os.path.samefile(path, source)
    except (OSError, ValueError):
        return False
