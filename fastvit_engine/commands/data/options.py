"""Options that several of the `fastvit data` commands take."""

import argparse
import contextlib
import re
import sys
import textwrap
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from fastvit_engine.commands.parser import positive
from fastvit_engine.errors import UserError
from fastvit_engine.shown import say

if TYPE_CHECKING:
    from fastvit_engine.data.build.parallel import Workers


def add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=positive, metavar="N", help="processes (default: one per core)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def add_ray(parser: "argparse.ArgumentParser | argparse._ArgumentGroup") -> None:
    """--ray, behind positional arguments, since its address may be left out."""
    parser.add_argument("--ray", nargs="?", const="", type=_ray_address, metavar="ADDRESS", help="run on the Ray "
                        "cluster at HOST:PORT, whose nodes all have this package and see the same files; without "
                        "ADDRESS: RAY_ADDRESS, else the cluster of this machine, else a new one on it")  # fmt: skip


def _ray_address(text: str) -> str:
    if text.startswith("ray://"):
        raise argparse.ArgumentTypeError(
            f"{text!r} is the address of a Ray client: run the command on a node of the cluster, with --ray auto"
        )
    if not re.fullmatch(r"|auto|local|[^/\s]+:\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is neither HOST:PORT nor auto: put --ray last if it has no address")
    return text


@contextlib.contextmanager
def workers_of(ray: str | None, count: int | None) -> "Iterator[Workers | None]":
    """The workers that --ray and --workers ask for. Raises UserError if Ray is missing or cannot be reached."""
    if ray is None:
        yield count
        return
    try:
        from fastvit_engine.data.build.ray_cluster import ray_cluster
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise UserError("--ray needs the package ray: pip install 'fastvit-engine[ray]'") from error
    with ray_cluster(ray or None, count, partial(say, file=sys.stderr)) as cluster:
        yield cluster


def wrapped(text: str) -> str:
    return textwrap.fill(text, 100)
