"""--recipe and --set of commands that read images without training: how these are read."""

import argparse
from typing import TYPE_CHECKING

from fastvit_engine.commands.parser import setting

if TYPE_CHECKING:
    from fastvit_engine.config import Resolved

# What these commands do not use, and which would stand in the way of settings that they do use.
_UNUSED = ["loss.kind=sigmoid"]


def add_settings(parser: argparse.ArgumentParser) -> None:
    """--recipe and --set: what the keys of labels and images are, and how images are cropped."""
    settings = parser.add_argument_group("settings of training (default: those of the engine)")
    settings.add_argument("--recipe", metavar="RECIPE", help="take them from a recipe: a name or a YAML file")
    settings.add_argument("--set", metavar="KEY=VALUE", type=setting, action="append", default=[],
                          help="override one value: --set data.label_key=json.labels")  # fmt: skip


def load_settings(args: argparse.Namespace) -> "Resolved":
    """The configuration that --recipe and --set make. Raises UserError."""
    from fastvit_engine.config import load_config

    soft = any(text.startswith("data.soft_labels=") for text in args.set)  # which a sigmoid would stand in the way of
    return load_config(args.recipe, [*([] if args.recipe or soft else _UNUSED), *args.set])


def num_classes_of(resolved: "Resolved") -> int | None:
    """model.num_classes if somebody has set it."""
    return None if resolved.origins["model.num_classes"] == "default" else resolved.config.model.num_classes
