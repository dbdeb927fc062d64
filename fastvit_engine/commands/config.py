"""`fastvit config`: lists recipes, shows the values of one, and explains keys."""

import argparse
import re
import shutil
import textwrap
from itertools import groupby, takewhile
from typing import TYPE_CHECKING

from fastvit_engine.commands.recipe import add_init, add_recipe, settings_of, with_weights
from fastvit_engine.shown import say

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from fastvit_engine.config import Config, Resolved


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]", purpose: str) -> None:
    parser = commands.add_parser(
        "config",
        help=purpose,
        epilog="examples:\n  fastvit config list\n  fastvit config explain optimizer",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    list_ = actions.add_parser(
        "list",
        help="the recipes that come with the engine",
        epilog="example:\n  fastvit config list",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    list_.set_defaults(run=_list)
    show = actions.add_parser(
        "show",
        help="every value of a recipe and where it comes from",
        epilog="example:\n  fastvit config show vit_h14_jft --set zero.stage=2",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_recipe(show)
    add_init(show)
    show.set_defaults(run=_show)
    explain = actions.add_parser(
        "explain",
        help="what the keys mean: type, range, default",
        description="Prints the meaning, type, range and default of a key, of all keys of a section, or of every key.",
        epilog="examples:\n  fastvit config explain data.window\n  fastvit config explain optimizer --json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    explain.add_argument("key", metavar="KEY", nargs="?", help="a section or a dotted key (default: everything)")
    form = explain.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON object")
    form.add_argument("--markdown", action="store_true", help="print the text of docs/configuration.md")
    explain.set_defaults(run=_explain)


def _list(args: argparse.Namespace) -> int:
    from fastvit_engine.recipe_files import recipe_paths

    paths = recipe_paths()
    width, columns = max(map(len, paths)), shutil.get_terminal_size().columns
    for folder, names in groupby(sorted(paths, key=lambda name: (paths[name].parent.name, name)), _folder_in(paths)):
        print(f"{folder}:")
        for name in names:
            lines = textwrap.wrap(_purpose(paths[name].read_text()), max(columns - width - 4, 40))
            print(f"  {name:<{width}}  {lines[0]}", *(" " * (width + 4) + line for line in lines[1:]), sep="\n")
        print()
    print("fastvit config show NAME prints the settings of one.")
    return 0


def _folder_in(paths: "Mapping[str, Path]") -> "Callable[[str], str]":
    return lambda name: paths[name].parent.name


def _purpose(recipe: str) -> str:
    """The first sentence of the comment at the top of a recipe."""
    comment = " ".join(line.removeprefix("#").strip() for line in takewhile(_is_comment, recipe.splitlines()))
    return re.split(r"(?<=\.)\s+(?=[A-Z]|fastvit )", comment, maxsplit=1)[0]


def _is_comment(line: str) -> bool:
    return line.startswith("#")


def _show(args: argparse.Namespace) -> int:
    from fastvit_engine.config import load_config

    resolved = with_weights(load_config(args.recipe, settings_of(args)))
    _check_lengths(resolved.config)
    say(_with_sizes(resolved).to_yaml(with_origins=True), end="")
    return 0


def _with_sizes(resolved: "Resolved") -> "Resolved":
    """The same, with the number of samples beside a share of them, if the configuration knows it."""
    from dataclasses import replace

    data = resolved.config.data
    if data.subset is None:
        return resolved
    samples = "of the samples in the shards" if data.epoch_samples is None else f"{data.epoch_samples:,} samples"
    origins = {**resolved.origins, "data.subset": f"{resolved.origins['data.subset']}: {samples}"}
    return replace(resolved, origins=origins)


def _check_lengths(config: "Config") -> None:
    """Raises UserError for durations that training would refuse, unless it takes the shards to know."""
    from fastvit_engine.train.schedule import Schedule

    durations = [config.train.duration, config.evaluate.every, config.checkpoint.every, config.checkpoint.keep_every]
    durations += [config.schedule.warmup, config.schedule.cooldown, config.schedule.timescale]
    if config.data.epoch_samples is not None or not any(length and "epoch" in length for length in durations):
        Schedule(config, config.data.epoch_samples)


def _explain(args: argparse.Namespace) -> int:
    from fastvit_engine.config.explain import as_json, as_markdown, as_text, explain

    form = as_json if args.json else as_markdown if args.markdown else as_text
    print(form(explain(args.key)))
    return 0
