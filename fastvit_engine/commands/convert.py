"""`fastvit convert`: writes a model in the layout of another program."""

import argparse

from fastvit_engine.commands.model import same_file
from fastvit_engine.commands.parser import local_path, path_or_url, positive
from fastvit_engine.shown import say

_FILES = ("npz", "timm")
_TARGETS = (*_FILES, "hf", "hub-folder")


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]", purpose: str) -> None:
    parser = commands.add_parser(
        "convert",
        help=purpose,
        description="Writes a model as an official .npz (npz), one safetensors file under timm's names (timm), a\n"
        "folder for transformers' from_pretrained (hf), or a folder to upload as a model page (hub-folder). Prints\n"
        "the Python code that loads it. What the target has no room for is refused by name: nothing is written then.",
        epilog="examples:\n  fastvit convert ViT-B_16.npz b16.safetensors --to timm --head none\n"
        "  fastvit convert ViT-B_16.npz b16_384.npz --to npz --image-size 384\n"
        "  fastvit convert runs/photos photos_hf --to hf --ema\n"
        "  fastvit convert vit_base.safetensors b16.npz --to npz --name B/16",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        type=path_or_url,
        help="a run folder or a checkpoint (path or URL), a .safetensors or .npz file, or a folder with config.json "
        "and model.safetensors of transformers (vit, dinov2) or timm",
    )
    parser.add_argument("destination", metavar="DEST", type=local_path, help="the file or folder to write")
    parser.add_argument("--to", choices=_TARGETS, required=True, help="the layout: %(choices)s")
    parser.add_argument("--name", help="B/16 or vit_base_patch16_224, for weights with timm's names that do not say it")
    parser.add_argument("--image-size", metavar="N", type=positive, help="resample the position table for N x N pixels")
    parser.add_argument(
        "--interpolation",
        choices=("bilinear", "bicubic"),
        default="bilinear",
        help="how: bilinear, as the authors' code (default), or bicubic, as DINOv2 and transformers",
    )
    parser.add_argument(
        "--head", choices=("keep", "none"), default="keep", help="none: leave the head and its tanh layer out"
    )
    parser.add_argument("--ema", action="store_true", help="the moving average of a run's weights instead")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from fastvit_engine.checkpoint.load import open_model
    from fastvit_engine.config.model_shape import model_title
    from fastvit_engine.errors import UserError
    from fastvit_engine.models.weights.convert import convert
    from fastvit_engine.observe.disk import is_final, reason

    if args.to in _FILES and same_file(args.destination, args.model):
        raise UserError(f"{args.destination} is MODEL itself, which would be replaced: name another DEST")
    keep = args.head == "keep"
    model = open_model(args.model, ema=args.ema, name=args.name, head=keep)
    model = model.changed(image_size=args.image_size, num_classes=None if keep else 0, interpolation=args.interpolation)
    try:
        written = convert(model, args.destination, args.to)
    except OSError as error:
        remedy = "choose another DEST" if is_final(error) else "make room and run the same command again"
        raise UserError(f"{args.destination} could not be written ({reason(error)}): {remedy}") from error
    head = f"{model.config.num_classes:,} classes" if model.config.num_classes else "no head"
    say(f"{args.destination}: {model_title(model.config)} at {model.config.image_size} px, {head}, from {model.where}")
    for note in written.notes:
        say(f"note: {note}")
    if written.code:
        say("\n".join(["to load it:", *(f"    {line}" for line in written.code)]))
    return 0
