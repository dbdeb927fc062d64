"""The arguments that name a trained model and how images are read for it, shared by the commands that use one."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from fastvit_engine.commands.data.options import add_settings
from fastvit_engine.commands.parser import positive
from fastvit_engine.errors import UserError

if TYPE_CHECKING:
    from fastvit_engine.models import VisionTransformer

MODEL_HELP = (
    "a run folder (its latest checkpoint) or a checkpoint, path or URL; a .safetensors or .npz file; or a folder of "
    "transformers or timm with config.json"
)


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
        default="bilinear",
        help="how: bilinear, as the authors' code (default), or bicubic, as DINOv2 and transformers",
    )
    parser.add_argument(
        "--batch-size", metavar="N", type=positive, default=64, help="images per forward pass (default: 64)"
    )
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16"),
        default="fp32",
        help="number format of weights and activations; bf16 is what a run in bf16 evaluates with (default: fp32)",
    )
    add_settings(parser)


def load(source: str, args: argparse.Namespace) -> "VisionTransformer":
    """The model that an argument names, on the first GPU or the CPU. Raises UserError."""
    import torch

    from fastvit_engine.checkpoint.load import load_model
    from fastvit_engine.trusted_folders import trust_compiled_code

    trust_compiled_code()
    model = load_model(
        source, image_size=args.image_size, ema=args.ema, name=args.name, interpolation=args.interpolation
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device, torch.bfloat16 if args.precision == "bf16" else torch.float32)


def check_folder_of(path: Path) -> None:
    """Raises UserError if a file cannot be written there, before hours of work are lost to that."""
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"{path} cannot be written: {path.parent} is no folder that you may write to")
