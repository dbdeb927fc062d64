"""`fastvit flops`: parameters and multiply-accumulates of models, and the paper's table of what pretraining costs."""

import argparse
import contextlib
import json
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from fastvit_engine.commands.loading import loading_pytorch
from fastvit_engine.commands.parser import positive
from fastvit_engine.errors import UserError
from fastvit_engine.shown import say

if TYPE_CHECKING:
    from fastvit_engine.config import ModelConfig
    from fastvit_engine.models.table6 import Row

_IMAGE_SIZE, _NUM_CLASSES = 224, 1000
_VITS = ("Ti/16", "S/16", "B/32", "B/16", "L/32", "L/16", "H/14", "g/14", "G/14")
_REMARK = (
    "exaFLOPs are 6 x MACs x epochs x 303 M images. In all seven rows of ResNets, counting gives 3.1 to 4.1 % more\n"
    "than the paper has. Its two rows of R50+L/16 are not in the ratio of their epochs; that of 14 epochs fits."
)


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]", purpose: str) -> None:
    parser = commands.add_parser(
        "flops",
        help=purpose,
        description="Counts parameters, and multiply-accumulates (MACs) of a forward pass of one image, of models by\n"
        "their names: Vision Transformers, hybrids, ResNets and those of timm. Needs neither weights nor their memory.",
        epilog="examples:\n  fastvit flops H/14 R50+B/16 R152x4\n  fastvit flops L/16 --image-size 384 --json\n"
        "  fastvit flops L/16 --patch-drop 0.5\n"
        "  fastvit flops --table6",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", metavar="NAME", nargs="*", help="as in model.name (default: those of the papers)")
    parser.add_argument("--image-size", metavar="N", type=positive, help=f"in pixels (default: {_IMAGE_SIZE})")
    parser.add_argument(
        "--num-classes", metavar="N", type=_classes, help=f"of the head, 0 for none (default: {_NUM_CLASSES})"
    )
    parser.add_argument(
        "--patch-drop",
        metavar="SHARE",
        type=_share,
        default=0.0,
        help="of the patches, which the model does not see, as tokens.patch_drop (default: 0)",
    )
    parser.add_argument(
        "--table6", action="store_true", help="Table 6 of the ViT paper: exaFLOPs of pretraining, counted and printed"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_run)


def _share(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= (share := float(text)) < 1:
            return share
    raise argparse.ArgumentTypeError(f"{text} is no share from 0 up to, but not including, 1")


def _classes(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} is less than 0")
    return number


def _run(args: argparse.Namespace) -> int:
    if args.table6 and (args.names or args.image_size is not None or args.num_classes is not None):
        given = args.names[0] if args.names else "--num-classes" if args.image_size is None else "--image-size"
        raise UserError(f"--table6 has the models, image size and classes of the paper: leave {given} out")
    if args.table6:
        with loading_pytorch():
            from fastvit_engine.models.table6 import table6

        rows = table6()
        say(json.dumps({"table6": [row._asdict() for row in rows]}) if args.json else _table6(rows))
        return 0
    from fastvit_engine.config.model_shape import visible_patches
    from fastvit_engine.config.resnet_shape import BIT_NAMES, HYBRID_NAMES
    from fastvit_engine.config.timm_model import is_timm

    names = args.names or [*_VITS, *HYBRID_NAMES, *BIT_NAMES]
    configs = [_config(name, args.image_size, args.num_classes) for name in names]
    with loading_pytorch():
        from fastvit_engine.models import forward_macs, parameter_count, resolve_shape
        from fastvit_engine.models.timm_measure import forward_flops

    models = []
    for config in configs:
        shape = None if is_timm(config) else resolve_shape(config)
        if args.patch_drop and (shape is None or shape.resnet is not None):
            raise UserError(
                f"--patch-drop is for models with patches of pixels alone, and {config.name} is none of them"
            )
        visible = None if shape is None else visible_patches(shape.patches, args.patch_drop)
        models.append({
            "name": config.name,
            "parameters": parameter_count(config),
            "macs": forward_flops(config) // 2 if shape is None else forward_macs(config, visible),
            "tokens": shape.prefix + visible if shape is not None and shape.is_transformer and visible else None,
            "image_size": config.image_size,
        })  # fmt: skip
    say(json.dumps({"models": models}) if args.json else _models(models))
    return 0


def _config(name: str, image_size: int | None, num_classes: int | None) -> "ModelConfig":
    """The section `model`. Raises UserError if there is no such model."""
    from fastvit_engine.config import ModelConfig
    from fastvit_engine.config.model_shape import resolve_shape
    from fastvit_engine.config.timm_model import check_timm_model, is_timm

    size, classes = image_size or _IMAGE_SIZE, _NUM_CLASSES if num_classes is None else num_classes
    try:
        config = ModelConfig(name=name, image_size=size, num_classes=classes)
    except ValidationError as error:
        problem = error.errors()[0]
        option = f"--{'-'.join(str(problem['loc'][0]).split('_'))}"
        raise UserError(f"{option} {problem['input']}: {problem['msg'].lower()}") from error
    check_timm_model(config)
    if not is_timm(config):
        resolve_shape(config)
    return config


def _models(models: list[dict[str, Any]]) -> str:
    rows = [["model", "parameters", "GMACs", "tokens", "image"]]
    rows += [
        [
            model["name"],
            f"{model['parameters']:,}",
            f"{model['macs'] / 1e9:.3f}",
            "none" if model["tokens"] is None else f"{model['tokens']:,}",
            f"{model['image_size']} px",
        ]
        for model in models
    ]
    return _aligned(rows)


def _table6(rows: list["Row"]) -> str:
    lines = [["model", "epochs", "exaFLOPs", "paper", "difference", "parameters", "GMACs"]]
    lines += [
        [
            row.name,
            str(row.epochs),
            f"{row.exaflops:,.1f}",
            f"{row.paper:,}",
            f"{round(100 * row.difference, 1) + 0.0:+.1f} %",  # which makes 0 of a -0
            f"{row.parameters:,}",
            f"{row.macs / 1e9:.3f}",
        ]
        for row in rows
    ]
    return f"{_aligned(lines)}\n{_REMARK}"


def _aligned(rows: list[list[str]]) -> str:
    """Names to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )
