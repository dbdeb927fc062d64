"""`fastvit doctor`: checks the machine, the software, the data and the network before a run, or when one is odd."""

import argparse
import shutil
import sys
from typing import TYPE_CHECKING

from fastvit_engine.commands.parser import output_path_or_url, path_or_url, setting
from fastvit_engine.errors import UserError
from fastvit_engine.shown import say

if TYPE_CHECKING:
    from fastvit_engine.doctor.examine import Request

_WIDTH = 100  # columns, if the output is no terminal


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]", purpose: str) -> None:
    parser = commands.add_parser(
        "doctor",
        help=purpose,
        description="Checks what a run depends on: software that fits together, GPUs and their links, compilers,\n"
        "kernels, the data and how fast it is read and decoded, disks, memory and limits. Started by torchrun or srun\n"
        "as a run is, it checks all nodes and compares them, and rank 0 reports.",
        epilog="exit code: 0 if nothing is a problem, 1 if something is, 2 for arguments that cannot be used.\n\n"
        "examples:\n  torchrun --nproc-per-node gpu -m fastvit_engine doctor --data s3://bucket/i1k\n"
        "  fastvit doctor --recipe vit_b16_i1k --data data/i1k --out runs/b16",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", metavar="SHARDS", type=_shards, help="check these shards: sets data.train")
    parser.add_argument("--recipe", metavar="RECIPE", help="check for this recipe: a name or a YAML file")
    parser.add_argument("--set", metavar="KEY=VALUE", type=setting, action="append", default=[],
                        help="override one value of it: --set zero.offload=optimizer")  # fmt: skip
    parser.add_argument("--out", metavar="DIR", type=output_path_or_url, help="run folder (default: runs/<name of the "
                        "recipe>)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_run)


def _shards(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty: name a folder, a shard, a pattern or a URL")
    return path_or_url(text)


def _run(args: argparse.Namespace) -> int:
    from fastvit_engine.doctor.examine import examine
    from fastvit_engine.doctor.report import as_json, as_text, problems

    request = _request(args)

    def tell(line: str) -> None:
        if sys.stderr.isatty():
            say(line, file=sys.stderr)

    found = examine(request, tell)
    if found is None:  # rank 0 reports
        return 0
    if args.json:
        print(as_json(found))
    else:
        width = shutil.get_terminal_size((_WIDTH, 24)).columns if sys.stdout.isatty() else _WIDTH
        say(as_text(found, width))
    return 1 if problems(found) else 0


def _request(args: argparse.Namespace) -> "Request":
    """What a run would use; without a configuration if the packages that read one are missing, which is a finding."""
    from fastvit_engine.doctor.examine import Request

    try:
        from fastvit_engine.config import load_config
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("fastvit_engine"):
            raise
        return Request(None, args.out or "runs/run", classes_known=False)
    if args.data is not None and any(one.partition("=")[0].strip() == "data.train" for one in args.set):
        raise UserError("--data and --set data.train=... say the same thing twice: leave one of them out")
    unused = [] if args.recipe else ["loss.kind=sigmoid"]
    data = [] if args.data is None else [f"data.train={args.data}"]
    resolved = load_config(args.recipe, [*unused, *args.set, *data])
    known = resolved.origins["model.num_classes"] != "default"
    return Request(resolved.config, args.out or f"runs/{resolved.config.name}", classes_known=known)
