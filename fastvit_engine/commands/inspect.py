"""`fastvit inspect`: pictures of what a model has learned and where it looks, and the numbers behind them."""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fastvit_engine.commands.model import MODEL_HELP, add_model_options, check_output_folder, load
from fastvit_engine.commands.parser import local_path, path_or_url, positive
from fastvit_engine.errors import UserError
from fastvit_engine.shown import say, shown

if TYPE_CHECKING:
    from torch import Tensor

    from fastvit_engine.config import Config

_FIGURES = ("filters", "pos_embed", "attention_distance", "rollout")
_OF_IMAGES = _FIGURES[2:]


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]", purpose: str) -> None:
    parser = commands.add_parser(
        "inspect",
        help=purpose,
        description="Draws what a model has learned, as figures 6 and 7 of the ViT paper do:\n"
        "  filters             principal components of the patch filters\n"
        "  pos_embed           similarity of the position embeddings that are added at the input\n"
        "  attention_distance  how far each head of each block looks, over the images\n"
        "  rollout             how much of each patch arrives at the output, for the first images\n"
        "The last two need --images. Each figure is written as .png and .svg, for light pages and, as NAME-dark, for\n"
        "dark ones; and the numbers as inspect.npz. If DIR is `inspect` in the folder of a run, the report\n"
        "of the run shows the figures.",
        epilog="examples:\n  fastvit inspect runs/b16 --images data/photos --out runs/b16/inspect\n"
        "  fastvit inspect ViT-B_16.npz --figures filters pos_embed --out figures",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", type=path_or_url, help=MODEL_HELP)
    parser.add_argument(
        "--images", metavar="SHARDS", help="shards, as --data of `fastvit features`; or a folder of images"
    )
    parser.add_argument("--out", metavar="DIR", type=local_path, required=True, help="folder for the figures")
    parser.add_argument("--figures", nargs="+", choices=_FIGURES, help="default: all that can be drawn")
    parser.add_argument(
        "--limit", metavar="N", type=positive, default=128, help="only the first N images (default: 128)"
    )
    parser.add_argument(
        "--split",
        choices=("train", "eval"),
        default="eval",
        help="which shards of a folder that has both (default: eval)",
    )
    parser.add_argument("--json", action="store_true", help="print the paths, and the shapes of the arrays, as JSON")
    add_model_options(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    figures = args.figures or (_FIGURES if args.images else _FIGURES[:2])
    if not args.images and (without := [figure for figure in figures if figure in _OF_IMAGES]):
        raise UserError(f"--figures {without[0]} looks at images: name shards or a folder of them with --images")
    if args.images and not any(figure in _OF_IMAGES for figure in figures):
        raise UserError(f"--images has no effect on --figures {' '.join(figures)}: leave it out")
    check_output_folder(args.out)

    from fastvit_engine.commands.settings import load_settings
    from fastvit_engine.observe.optional import require

    require("fastvit inspect", "figures", "matplotlib")
    resolved = load_settings(args)

    from fastvit_engine.evaluate.features import save_arrays
    from fastvit_engine.evaluate.figures import Subject, draw
    from fastvit_engine.evaluate.inspection import grid_of, inspect_images, inspect_weights, with_attention
    from fastvit_engine.evaluate.one_pass import config_for

    model = with_attention(load(args.model, args))
    if not args.figures and model.patch_positions() is None:
        figures = tuple(figure for figure in figures if figure != "pos_embed")
        say(f"note: no figure pos_embed, as model.pos_embed is {model.config.pos_embed}", file=sys.stderr)
    if not args.figures and model.shape.is_hybrid:
        figures = tuple(figure for figure in figures if figure != "filters")
        say(f"note: no figure filters, as patches of {model.config.name} are of no pixels", file=sys.stderr)
    if not figures:
        raise UserError("nothing is left to draw: see where the model looks with --images")
    arrays = inspect_weights(model, figures)
    if args.images:
        arrays |= inspect_images(model, _images(args, config_for(model, resolved)), figures)
    args.out.mkdir(parents=True, exist_ok=True)
    save_arrays(args.out / "inspect.npz", arrays)
    subject = Subject(f"{model.config.name} of {args.model}", grid_of(model), model.shape.patch_size)
    paths = [path for figure in figures for path in draw(figure, arrays, subject, args.out)]
    if args.json:
        shapes = {name: list(array.shape) for name, array in arrays.items()}
        print(json.dumps({"figures": [str(path) for path in paths], "arrays": shapes}))
        return 0
    for figure in figures:
        say(f"{args.out / figure}.png (and .svg, -dark.png, -dark.svg)")
    say(f"{args.out / 'inspect.npz'}: {', '.join(f'{name} {list(array.shape)}' for name, array in arrays.items())}")
    return 0


def _images(args: argparse.Namespace, config: "Config") -> Iterator["Tensor"]:
    """Batches of images as evaluation shows them to the model, uint8 [B, S, S, 3]: at most args.limit of them."""
    import torch

    from fastvit_engine.evaluate.one_pass import OnePass
    from fastvit_engine.evaluate.predict import find_images, prepare_image
    from fastvit_engine.observe.progress import WorkProgress

    if not _is_folder_of_images(args.images):
        shards = OnePass.over(args.images, args.split, config, named="--images", limit=args.limit)
        batches = list(shards.batches(args.batch_size, doing="reading", progress=WorkProgress()))
        for note in shards.notes:
            say(f"note: {note}", file=sys.stderr)
        usable = [(batch.seeds[row], batch.images[row]) for batch in batches for row in batch.weights.nonzero()[:, 0]]
        if usable:  # batches of several workers come in any order
            yield torch.stack([image for _, image in sorted(usable, key=lambda one: int(one[0]))])
        return
    taken = 0
    for path in find_images([args.images]):
        if taken == args.limit:
            break
        try:
            yield torch.from_numpy(prepare_image(path, config))[None]
            taken += 1
        except (ValueError, OSError) as error:
            say(f"fastvit: {shown(str(path))} cannot be used: {error}", file=sys.stderr)


def _is_folder_of_images(text: str) -> bool:
    """Raises UserError if a folder holds both shards and images, of which either could be meant."""
    from fastvit_engine.data.shards.image_files import has_image_suffix

    folder = Path(text).expanduser()
    if not folder.is_dir():
        return False
    inside = [path.name for path in folder.rglob("*") if path.is_file()]
    images = [name for name in inside if has_image_suffix(name)]
    shards = [name for name in inside if ".tar" in name]
    if images and shards:
        raise UserError(
            f"--images {text} holds shards ({shards[0]}) and images ({images[0]}): name the shards as a pattern, "
            f"{text}/*.tar, or a folder of images alone"
        )
    return bool(images)
