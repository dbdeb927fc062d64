"""Command line.

python -m fastvit_kernels.hub --out fastvit-kernels
"""

import argparse
import sys
from pathlib import Path

from fastvit_kernels.hub.build import build


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fastvit_kernels.hub",
        description="Write this package as a kernel of the Hugging Face Hub, for `kernels` to load. Works offline.",
        epilog="example: python -m fastvit_kernels.hub --out fastvit-kernels --version 2",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write: new or empty")
    parser.add_argument("--name", default="fastvit-kernels", help="of the kernel, default fastvit-kernels")
    parser.add_argument("--version", type=int, default=1, help="of the kernel, default 1: on the Hub, the branch v1")
    arguments = parser.parse_args()
    try:
        variants = build(arguments.out, arguments.name, arguments.version)
    except (ValueError, OSError) as error:
        print(f"fastvit_kernels.hub: {error}", file=sys.stderr)
        return 2
    for variant in variants:
        print(variant)
    print(f'next: kernels.get_local_kernel(Path("{arguments.out}")), see {arguments.out / "README.md"}')
    return 0


if __name__ == "__main__":
    sys.exit(main())
