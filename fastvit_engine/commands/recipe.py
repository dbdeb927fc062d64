"""The arguments that name a recipe and change it, shared by the commands that take one."""

import argparse
from typing import TYPE_CHECKING

from fastvit_engine.commands.parser import setting
from fastvit_engine.errors import UserError

if TYPE_CHECKING:
    from fastvit_engine.config import Resolved


def add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a name from `fastvit config list`, or a YAML file")
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        type=setting,
        action="append",
        default=[],
        help="override one value: --set train.precision=fp32",
    )


def add_init(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--init",
        metavar="MODEL",
        help="start from these weights: a run folder or a checkpoint, an .npz or .safetensors file, or a folder with "
        "config.json and model.safetensors; sets init.from",
    )


def settings_of(args: argparse.Namespace) -> list[str]:
    """The overrides of a command line, --init among them. Raises UserError if init.from is set twice."""
    if args.init is None:
        return list(args.set)
    if args.init.strip() in ("", "~", "null", "Null", "NULL"):  # for init.from, these mean none
        raise UserError(f"--init '{args.init}' names no model: name one, or leave --init out to start from scratch")
    if any(setting.partition("=")[0].strip() == "init.from" for setting in args.set):
        raise UserError(f"--init {args.init} and --set init.from=... say the same thing twice: leave one of them out")
    return [*args.set, f"init.from={args.init}"]


def with_weights(resolved: "Resolved") -> "Resolved":
    """The configuration as a run that starts from `init.from` would have it."""
    if resolved.config.init.from_ is None:  # which needs no PyTorch
        return resolved

    from fastvit_engine.train.first_weights import fill_in

    return fill_in(resolved, None, resume=False).apply(resolved)
