"""`fastvit bench`: the suite in the folder `benchmarks/` of a checkout."""

import argparse
import sys
from pathlib import Path

from fastvit_engine.commands.parser import local_path
from fastvit_engine.commands.recipe import add_recipe

_ALL = "measure operations, training steps, data loading and the loop's own cost, one after the other"


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]", purpose: str) -> None:
    bench = commands.add_parser(
        "bench",
        help=purpose,
        description="Measures this engine and its peers on this machine, whatever it is; a peer that is not installed\n"
        "is left out with the reason, one whose results are wrong gets no ratio. Needs a checkout of the repository.",
        epilog="examples:\n  fastvit bench all --quick\n  fastvit bench kernels --ops attention --models H/14\n"
        "  fastvit bench train --variants fastvit timm --shards data/photos",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = bench.add_subparsers(dest="action", required=True, metavar="WHAT")

    kernels = _suite(actions, "kernels", "measure operations, each against those who can do it",
                     "--ops attention --shape H/14", "--ops layer_norm --provider mine.py:layer_norm")  # fmt: skip
    kernels.add_argument("--ops", nargs="+", metavar="NAME", help="operations (default all)")
    kernels.add_argument("--shape", "--models", nargs="+", metavar="NAME", dest="models",
                         help="sizes such as H/14 (default all)")  # fmt: skip
    kernels.add_argument("--providers", nargs="+", metavar="NAME", help="such as fastvit, eager (default all)")
    kernels.add_argument("--provider", action="append", metavar="FILE.py:FUNCTION", help="also measure a kernel of "
                         "yours for the operation of --ops: it takes the tensors by name, see --list")  # fmt: skip
    kernels.add_argument("--list", action="store_true", help="only list operations, providers and sizes")
    kernels.add_argument("--dtypes", nargs="+", metavar="NAME", help="fp32, bf16, fp16 (default bf16; on a CPU fp32)")

    train = _suite(actions, "train", "measure whole training steps")
    train.add_argument("--models", nargs="+", metavar="NAME", help="such as H/14 (default all)")
    train.add_argument("--variants", nargs="+", metavar="NAME", help="such as fastvit, timm (default all)")
    train.add_argument("--shards", metavar="SHARDS", help="also measure steps on images from these shards")
    train.add_argument(
        "--no-shards", action="store_true", help="--quick: only images in memory, not from noise in shards"
    )
    train.add_argument("--no-control", action="store_true", help="do not measure the first variant again at the end")
    train.add_argument("--batch", type=int, metavar="N", help="images per step (default: by the model)")
    train.add_argument("--largest-batch", action="store_true", help="also find the largest batch that fits a GPU")

    data = _suite(actions, "data", "measure data loading: this engine, WebDataset's usual recipe, timm, DALI and SPDL")
    data.add_argument("shards", nargs="?", metavar="SHARDS", help="your shards (default: images of noise)")
    data.add_argument("--image-size", type=int, metavar="PIXELS", help="of the crops (default 224)")
    data.add_argument("--workers", type=int, metavar="N", help="processes of each loader (default: one per core)")
    data.add_argument("--rounds", type=int, metavar="N", help="number of repetitions (default 9)")
    data.add_argument("--repack", type=int, metavar="PIXELS", help="measure on the images with this short side too "
                      "(default 256)")  # fmt: skip

    _suite(actions, "overhead", "measure what the training loop costs beyond a plain one, on a CPU")
    _suite(actions, "all", _ALL)

    faults = actions.add_parser(
        "faults",
        help="train a recipe while its processes are killed: which share of the time is useful",
        description="Trains a recipe twice on CPU processes, in peace and with a SIGKILL of a random rank every so\n"
        "often. Says which share of the time went into steps that count (goodput), how long training stands\n"
        "still after a kill, how many steps are lost, and whether both records are equal to the bit.",
        epilog="example:\n  fastvit bench faults cifar10_cpu --set data.train='cifar10/train-*.tar' --minutes 5",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_recipe(faults)
    faults.add_argument("--minutes", type=float, metavar="M", help="length of a run (default: train.duration)")
    faults.add_argument("--every", type=float, metavar="SECONDS", default=60.0, help="between two kills (default 60)")
    faults.add_argument("--processes", type=int, metavar="N", default=2, help="of the run (default 2)")
    faults.add_argument("--seed", type=int, metavar="N", default=0, help="of the ranks that are chosen (default 0)")
    _add_output(faults)
    faults.set_defaults(run=_run, quick=False)

    readme = actions.add_parser("readme", help="write the results into docs/verification.md", description="Writes the\n"
                     "table of results in docs/verification.md, from the newest files of each machine.",
                     epilog="example:\n  fastvit bench readme --check",
                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    readme.add_argument(
        "--check", action="store_true", help="only say whether it is up to date (exit code 1: it is not)"
    )
    readme.set_defaults(run=_run)


def _suite(
    actions: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, purpose: str, *examples: str
) -> argparse.ArgumentParser:
    lines = "\n".join(f"  fastvit bench {name} {options}" for options in ("--quick", *examples))
    parser = actions.add_parser(name, help=purpose, description=f"{purpose[0].upper()}{purpose[1:]}.",
                                epilog=f"example{'s' if examples else ''}:\n{lines}",
                                formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="few rounds, nothing that compiles for long")
    parser.add_argument("--minutes", type=float, metavar="M", help="begin nothing new after M minutes a suite")
    _add_output(parser)
    parser.set_defaults(run=_run)
    return parser


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        type=local_path,
        metavar="DIR",
        help="write to DIR/<machine>/ (default benchmarks/results; --quick: nowhere)",
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def _run(args: argparse.Namespace) -> int:
    from fastvit_engine.errors import UserError

    checkout = Path(__file__).parents[2]
    if not (checkout / "benchmarks" / "suite.py").is_file():
        raise UserError(
            "fastvit bench needs the folder benchmarks/ of a checkout, which an installed package does not have: "
            "clone the repository and run pip install --editable ./kernels --editable '.[train,bench]' there"
        )
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    from benchmarks.suite import run

    return run(args)
